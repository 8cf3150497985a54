"""Running a transformers model on a packed batch, through its own cache and attention interfaces.

The model's layers call `update` of our cache, which stores keys and values in their seats, and then the
attention function registered here. Any decoder whose attention goes through transformers'
`AttentionInterface` works unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from at2po_agent.policies.hf.attention import PackedAttention, rows_for
from at2po_agent.policies.hf.slots import LayerShape, LayerViews, Slots
from at2po_env.errors import PolicyError

_ATTENTION = "at2po_slots"


class _SlotLayer(CacheLayerMixin):
    """One layer's view of the slots."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.batch: PackedAttention | None = None
        self.views: LayerViews | None = None
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the slots own the storage."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Store KV [1, heads, N, width]; returns the layer's storage, for the attention function alone."""
        del args, kwargs
        assert self.batch is not None
        assert self.views is not None
        self.batch.write(key_states[0].transpose(0, 1), self.views.keys)
        self.batch.write(value_states[0].transpose(0, 1), self.views.values)
        return self.views, None

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Unused: the packed batch knows who sees whom."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Unused: positions are always given."""
        return 0

    def get_max_length(self) -> int:
        """No maximum of its own."""
        return -1


class ModelDecoder:
    """Any supported model.

    Args:
        model: The model.

    Raises:
        PolicyError: The model keeps something else than keys and values of every token, or does not take its
            attention from transformers' interface.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.shapes = _probe(model)
        self._layers = [_SlotLayer() for _ in self.shapes]
        self._cache = Cache(layers=list(self._layers))

    def refresh(self) -> None:
        """The weights have changed; nothing is kept of them here."""

    def forward(self, tokens: Tensor, positions: Tensor, batch: PackedAttention, slots: Slots) -> Tensor:
        """Run a packed batch of N tokens; returns the logits [n, V] after each seat's newest token."""
        model, config = self._model, self._model.config
        for layer, views in zip(self._layers, slots.layers, strict=True):
            layer.batch, layer.views = batch, views
        training, implementation = model.training, config._attn_implementation
        try:
            if training:
                model.eval()  # type: ignore[no-untyped-call]
            config._attn_implementation = _ATTENTION
            output = model(
                input_ids=tokens[None],
                position_ids=positions[None],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=rows_for(batch.live),
                packed_batch=batch,
            )
        finally:
            config._attn_implementation = implementation
            if training:
                model.train()
        logits: Tensor = output.logits[0, -batch.live :]
        return logits


def _probe(model: PreTrainedModel) -> list[LayerShape]:
    """Run one token and look at what the model keeps of it."""
    if not model._supports_attention_backend:
        raise PolicyError(
            f"{type(model).__name__} does not use transformers' attention interface, which the sampler "
            "needs; use a decoder that does (Qwen, Llama, Mistral, ...)"
        )
    with torch.no_grad():
        tokens = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
        cache = model(input_ids=tokens, use_cache=True).past_key_values
    layers = cache.layers if isinstance(cache, DynamicCache) else []
    shapes = [
        LayerShape((layer.keys.shape[1], layer.keys.shape[3]), (layer.values.shape[1], layer.values.shape[3]))
        for layer in layers
        if isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None
    ]
    if not shapes or len(shapes) != len(layers):
        raise PolicyError(
            f"{type(model).__name__} keeps other state than keys and values of every token "
            f"({sorted({type(layer).__name__ for layer in layers})}); the sampler does not support it"
        )
    return shapes


def _slot_attention(
    module: nn.Module, query: Tensor, key: Any, value: Any, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Transformers' signature: query float[1, heads, N, width], key what `update` returned."""
    del module, value, attention_mask
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise PolicyError("attention with soft-capped scores or sinks is not supported by the sampler")
    batch: PackedAttention = kwargs["packed_batch"]
    attended = batch.attend(
        query[0].transpose(0, 1), key, scale=kwargs.get("scaling"), window=kwargs.get("sliding_window")
    )
    return attended.unsqueeze(0), None


AttentionInterface.register(_ATTENTION, _slot_attention)
