"""Keys and values of many sequences in fixed slots, behind transformers' `Cache` interface.

One forward pass gets a *packed* batch, a single row of N tokens from many sequences: no padding reaches the
model's matrices. Each token's KV go to the slot and position that the step's `Plan` names (to several slots,
where sequences of the same step share it), and attention runs over the slots: one call for the last token of
every live slot, one for each group of prompt pieces. It is registered with transformers as an attention
implementation, so any decoder that uses the attention interface works unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from at2po_agent.policies.prefix_cache import Segment
from at2po_env.errors import PolicyError

ATTENTION = "at2po_slots"
_NEVER = float("-inf")


class Group(NamedTuple):
    """Prompt pieces of several slots, attended together: P pieces of at most Q tokens over T positions.

    Attributes:
        slots: int64[P].
        index: int64[P, Q], where the packed batch holds each query; padded with 0.
        real: bool[P, Q], False where padded.
        positions: int64[P, Q], of the queries in their sequences.
        reach: T, positions that any query may see.
    """

    slots: Tensor
    index: Tensor
    real: Tensor
    positions: Tensor
    reach: int


@dataclass
class Plan:
    """Where the tokens of one packed batch go, and what they attend to.

    Attributes:
        source: int64[W], packed index of each KV write; None when it is 0..N-1.
        slots: int64[W], slot of each write.
        positions: int64[W], position of each write.
        live: n, slots 0..n-1 whose last token stands at the end of the packed batch, in slot order.
        last: int64[n], position of that token.
        reach: Longest live length after this step.
        groups: The other tokens.
    """

    source: Tensor | None
    slots: Tensor
    positions: Tensor
    live: int
    last: Tensor
    reach: int
    groups: list[Group] = field(default_factory=list)
    _biases: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)

    def live_bias(self, dtype: torch.dtype, window: int | None) -> Tensor:
        """float[n, 1, 1, T] added to the scores of the last tokens."""
        key = (-1, window)
        if key not in self._biases:
            self._biases[key] = _bias(self.last[:, None], self.reach, dtype, window)
        return self._biases[key]

    def group_bias(self, number: int, dtype: torch.dtype, window: int | None, repeats: int) -> Tensor:
        """float[P, 1, repeats * Q, T] added to the scores of a group, its queries repeated per query head."""
        key = (number, window)
        if key not in self._biases:
            group = self.groups[number]
            bias = _bias(group.positions, group.reach, dtype, window)
            self._biases[key] = bias.repeat(1, 1, repeats, 1)
        return self._biases[key]


def _bias(positions: Tensor, reach: int, dtype: torch.dtype, window: int | None) -> Tensor:
    keys = torch.arange(reach, device=positions.device)
    hidden = keys > positions.unsqueeze(-1)
    if window is not None:
        hidden |= keys <= positions.unsqueeze(-1) - window
    return (
        torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, _NEVER).unsqueeze(1)
    )


class _SlotLayer(CacheLayerMixin):
    """One layer's buffers [slots, heads, positions, width]; `update` writes where the plan says."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.plan: Plan | None = None
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the slots own the buffers."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write KV [1, heads, N, width] and return the whole buffers."""
        del args, kwargs
        assert self.plan is not None
        assert self.keys is not None
        assert self.values is not None
        plan = self.plan
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            rows = states[0].transpose(0, 1)
            if plan.source is not None:
                rows = rows[plan.source]
            buffer[plan.slots, :, plan.positions] = rows
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Unused: masks come from the plan."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Unused: positions are always given."""
        return 0

    def get_max_length(self) -> int:
        """No maximum of its own."""
        return -1


class _SlotCache(Cache):
    """What the model's layers call; `Slots` sets the plan before each forward pass."""

    def __init__(self, layers: list[CacheLayerMixin]) -> None:
        super().__init__(layers=layers)  # type: ignore[arg-type]


class _Place(NamedTuple):
    """Which plane and which row of it hold a layer's keys or values."""

    plane: int
    row: int


class Slots:
    """Growing buffers [layers, slots, heads, positions, width], one plane per shape of layer.

    Args:
        model: Probed once with one token for the shapes of its layers.

    Raises:
        PolicyError: The model keeps something else than keys and values per token, or does not take its attention
            from transformers' attention interface.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        shapes = _probe(model)
        kinds = list(dict.fromkeys(shape for pair in shapes for shape in pair))
        rows = [0] * len(kinds)
        self._places: list[tuple[_Place, _Place]] = []
        for pair in shapes:
            places = []
            for shape in pair:
                plane = kinds.index(shape)
                places.append(_Place(plane, rows[plane]))
                rows[plane] += 1
            self._places.append((places[0], places[1]))
        self._planes = [
            torch.zeros((number, 0, heads, 0, width), dtype=model.dtype, device=model.device)
            for number, (heads, width) in zip(rows, kinds, strict=True)
        ]
        self._layers = [_SlotLayer() for _ in shapes]
        self.cache = _SlotCache(list(self._layers))
        self.count = 0
        self.positions = 0
        self.token_bytes = sum(
            plane.element_size() * plane.shape[0] * plane.shape[2] * plane.shape[4] for plane in self._planes
        )

    @property
    def device(self) -> torch.device:
        """Where the buffers live."""
        return self._planes[0].device

    def resize(self, count: int, positions: int) -> None:
        """Set the number of slots and of positions; what fits of what they hold stays."""
        for number, plane in enumerate(self._planes):
            layers, old_count, heads, old_positions, width = plane.shape
            both = (min(count, old_count), min(positions, old_positions))
            sized = plane.new_zeros((layers, count, heads, positions, width))
            sized[:, : both[0], :, : both[1]] = plane[:, : both[0], :, : both[1]]
            self._planes[number] = sized
        self.count, self.positions = count, positions
        for layer, (keys, values) in zip(self._layers, self._places, strict=True):
            layer.keys = self._planes[keys.plane][keys.row]
            layer.values = self._planes[values.plane][values.row]

    def read(self, slot: int, start: int, end: int) -> Segment:
        """A copy of the KV of positions start..end-1."""
        return tuple(plane[:, slot, :, start:end].clone() for plane in self._planes)

    def write(self, slot: int, start: int, segment: Segment, length: int) -> None:
        """Put the first `length` tokens of a segment at `start`."""
        for plane, part in zip(self._planes, segment, strict=True):
            plane[:, slot, :, start : start + length] = part[:, :, :length]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot to another one."""
        for plane in self._planes:
            plane[:, target, :, :length] = plane[:, source, :, :length]

    def wipe(self) -> None:
        """Zero all buffers: what a failed forward pass left must not reach later sequences through 0 * NaN."""
        for plane in self._planes:
            plane.zero_()

    def forward(self, tokens: Tensor, positions: Tensor, plan: Plan) -> Tensor:
        """Run the packed batch; returns the logits [n, V] that follow each live slot's last token."""
        model, config = self._model, self._model.config
        for layer in self._layers:
            layer.plan = plan
        training, implementation = model.training, config._attn_implementation
        try:
            if training:
                model.eval()
            config._attn_implementation = ATTENTION
            output = model(
                input_ids=tokens[None],
                position_ids=positions[None],
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=plan.live,
                slot_plan=plan,
            )
        finally:
            config._attn_implementation = implementation
            if training:
                model.train()
        logits: Tensor = output.logits[0]
        return logits


def _probe(model: PreTrainedModel) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """((heads, width) of the keys, of the values) for each layer."""
    if not model._supports_attention_backend:
        raise PolicyError(
            f"{type(model).__name__} does not use transformers' attention interface, which the slots need; "
            "use a decoder that does (Qwen, Llama, Mistral, Gemma, ...)"
        )
    with torch.no_grad():
        tokens = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
        cache = model(input_ids=tokens, use_cache=True).past_key_values
    layers = cache.layers if isinstance(cache, DynamicCache) else []
    if not layers or not all(isinstance(layer, DynamicLayer) and layer.keys is not None for layer in layers):
        raise PolicyError(
            f"{type(model).__name__} keeps other state than keys and values of every token "
            f"({type(cache).__name__}: {sorted({type(layer).__name__ for layer in layers})}); not supported"
        )
    return [
        ((layer.keys.shape[1], layer.keys.shape[3]), (layer.values.shape[1], layer.values.shape[3]))
        for layer in layers
    ]


def slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed batch over slot buffers; the signature is transformers'.

    Args:
        module: The attention layer.
        query: float[1, query heads, N, width].
        key: float[slots, KV heads, positions, width], what the cache returned.
        value: As `key`.
        attention_mask: Ignored; the plan knows who sees whom.
        kwargs: `slot_plan`, and what the layer passes: `scaling`, `sliding_window`.

    Returns:
        float[1, N, query heads, width] and no weights.
    """
    del module, attention_mask
    plan: Plan = kwargs["slot_plan"]
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise PolicyError("attention with soft-capped scores or sinks is not supported by the slots")
    window, scale = kwargs.get("sliding_window"), kwargs.get("scaling")
    heads, kv_heads, width = query.shape[1], key.shape[1], query.shape[3]
    repeats = heads // kv_heads
    rows = query[0].transpose(0, 1)
    others = rows.shape[0] - plan.live
    # The query heads of one KV head become its queries: no key or value is repeated.
    live = F.scaled_dot_product_attention(
        rows[others:].reshape(plan.live, kv_heads, repeats, width),
        key[: plan.live, :, : plan.reach],
        value[: plan.live, :, : plan.reach],
        attn_mask=plan.live_bias(query.dtype, window),
        scale=scale,
    ).reshape(plan.live, heads, value.shape[3])
    if not others:
        return live.unsqueeze(0), None
    out = live.new_empty((rows.shape[0], heads, value.shape[3]))
    out[others:] = live
    for number, group in enumerate(plan.groups):
        pieces, length = group.index.shape
        queries = rows[group.index].view(pieces, length, kv_heads, repeats, width).permute(0, 2, 3, 1, 4)
        attended = F.scaled_dot_product_attention(
            queries.reshape(pieces, kv_heads, repeats * length, width),
            key[:, :, : group.reach][group.slots],
            value[:, :, : group.reach][group.slots],
            attn_mask=plan.group_bias(number, query.dtype, window, repeats),
            scale=scale,
        )
        attended = attended.view(pieces, kv_heads, repeats, length, -1).permute(0, 3, 1, 2, 4)
        out[group.index[group.real]] = attended[group.real].reshape(-1, heads, value.shape[3])
    return out.unsqueeze(0), None


def plan_groups(
    pieces: Sequence[tuple[int, int, Sequence[int]]], *, device: torch.device, longest: int = 128
) -> list[Group]:
    """Arrange prompt pieces into groups of similar length.

    Args:
        pieces: (slot, position of the first query, packed indices of the queries), at consecutive positions.
        device: Where the tensors go.
        longest: Longer pieces are cut: a cut sees no positions beyond its own end.
    """
    cuts = [
        (slot, start + offset, index[offset : offset + longest])
        for slot, start, index in pieces
        for offset in range(0, len(index), longest)
    ]
    cuts.sort(key=lambda cut: (-len(cut[2]), -cut[1], cut[0]))
    groups, first = [], 0
    while first < len(cuts):
        length = len(cuts[first][2])
        last = first
        while last < len(cuts) and 2 * len(cuts[last][2]) >= length:
            last += 1
        groups.append(_group(cuts[first:last], length, device))
        first = last
    return groups


def _group(cuts: Sequence[tuple[int, int, Sequence[int]]], length: int, device: torch.device) -> Group:
    index = torch.tensor([[*packed, *([0] * (length - len(packed)))] for _, _, packed in cuts], device=device)
    sizes = torch.tensor([len(packed) for _, _, packed in cuts], device=device)
    steps = torch.arange(length, device=device)
    return Group(
        slots=torch.tensor([slot for slot, _, _ in cuts], device=device),
        index=index,
        real=steps < sizes[:, None],
        positions=torch.tensor([start for _, start, _ in cuts], device=device)[:, None] + steps,
        reach=max(start + len(packed) for _, start, packed in cuts),
    )


AttentionInterface.register(ATTENTION, slot_attention)
