"""Attention of a packed batch over arenas: one row of N tokens from many sequences, no padding between them.

The batch holds prompt tokens first and then the newest token of every seat, in seat order. A `Plan` says
where each token's KV are written (to several places, where sequences of one step share a prompt) and who
attends to whom: one call for the newest tokens of each arena, one for each group of prompt pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from at2po_agent.policies.slots import LayerViews, Seat, Slots
from at2po_agent.types import IntArray

_NEVER = float("-inf")
_LONGEST_PIECE = 128


class Write(NamedTuple):
    """A token's KV also go to another seat: index in the packed batch, seat, position."""

    source: int
    seat: Seat
    position: int


class Piece(NamedTuple):
    """Consecutive prompt tokens of a seat: position and packed index of the first, and how many."""

    seat: Seat
    position: int
    first: int
    length: int


class _Span(NamedTuple):
    """Seats first..last-1 sit in one arena; the longest reaches `reach` positions."""

    arena: int
    first: int
    last: int
    reach: int


class _Group(NamedTuple):
    """P pieces of at most Q tokens in one arena.

    Attributes:
        arena: Number of the arena.
        places: The pieces' places there.
        queries: int64[P, Q], packed index of each query, padded with 0.
        positions: int64[P, Q], of the queries.
        source: Which of the P * Q queries are real.
        target: Their packed index.
        reach: Positions that any query may see.
    """

    arena: int
    places: slice | Tensor
    queries: Tensor
    positions: Tensor
    source: Tensor
    target: Tensor
    reach: int


class Plan:
    """Where the tokens of one packed batch go, and what they attend to.

    Args:
        slots: The storage.
        order: All seats; the newest token of each stands at its length.
        pieces: The prompt tokens.
        writes: Further places of their KV.
    """

    def __init__(
        self, slots: Slots, order: Sequence[Seat], pieces: Sequence[Piece], writes: Sequence[Write]
    ) -> None:
        self._device = slots.device
        self.live = len(order)
        self.prompts = sum(piece.length for piece in pieces)
        lengths = np.array([seat.length for seat in order], dtype=np.int64)
        places = np.array([slots.place(seat) for seat in order], dtype=np.int64)
        positions = [np.arange(piece.position, piece.position + piece.length) for piece in pieces]
        self.positions: IntArray = np.concatenate([*positions, lengths])
        owners = [np.full(piece.length, piece.seat.number) for piece in pieces]
        numbers = np.concatenate([*owners, np.arange(self.live)])
        written = self.positions
        self._source: Tensor | None = None
        if writes:
            numbers = np.concatenate([numbers, [write.seat.number for write in writes]])
            written = np.concatenate([written, [write.position for write in writes]])
            further = np.array([write.source for write in writes], dtype=np.int64)
            self._source = self._tensor(np.concatenate([np.arange(len(self.positions)), further]))
        self._first_rows = self._tensor(np.column_stack([places[numbers], written]))
        self._rows: dict[int, Tensor] = {}
        self._last = self._tensor(lengths)
        self._spans = _spans(order, lengths, slots)
        self._groups = _groups(pieces, slots)
        self._biases: dict[int | None, tuple[list[Tensor], list[Tensor]]] = {}

    def write(self, states: Tensor, storage: Tensor) -> None:
        """Store one layer's keys or values.

        Args:
            states: float[N, heads, width].
            storage: float[tokens * heads, width], written in place.
        """
        if self._source is not None:
            states = states[self._source]
        heads, width = states.shape[1:]
        if heads not in self._rows:
            first, room, position = self._first_rows.unbind(1)
            lanes = torch.arange(heads, device=self._device) * room[:, None]
            self._rows[heads] = (lanes + (first * heads + position)[:, None]).flatten()
        storage.index_copy_(0, self._rows[heads], states.reshape(-1, width))

    def attend(
        self, queries: Tensor, layer: LayerViews, *, scale: float | None = None, window: int | None = None
    ) -> Tensor:
        """Attention of all tokens; their KV must have been written.

        Args:
            queries: float[N, heads, width].
            layer: The layer's storage.
            scale: Factor of the scores; None means 1 / sqrt(width).
            window: How many positions back a query sees, itself included; None for all.

        Returns:
            float[N, heads, width of the values].
        """
        live_biases, group_biases = self._bias(window, queries.dtype)
        heads = queries.shape[1]
        kv_heads, width = layer.arena_keys[0].shape[1], layer.arena_values[0].shape[3]
        out = queries.new_empty((queries.shape[0], heads, width))
        newest, attended = queries[self.prompts :], out[self.prompts :]
        for span, bias in zip(self._spans, live_biases, strict=True):
            count = span.last - span.first
            # The query heads of one KV head become its queries: no key or value is repeated.
            result = F.scaled_dot_product_attention(
                newest[span.first : span.last].reshape(count, kv_heads, heads // kv_heads, -1),
                layer.arena_keys[span.arena][:count, :, : span.reach],
                layer.arena_values[span.arena][:count, :, : span.reach],
                attn_mask=bias,
                scale=scale,
            )
            attended[span.first : span.last] = result.view(count, heads, width)
        for group, bias in zip(self._groups, group_biases, strict=True):
            count, length = group.queries.shape
            grouped = queries[group.queries].view(count, length, kv_heads, heads // kv_heads, -1)
            result = F.scaled_dot_product_attention(
                grouped.permute(0, 2, 3, 1, 4).reshape(count, kv_heads, heads // kv_heads * length, -1),
                layer.arena_keys[group.arena][:, :, : group.reach][group.places],
                layer.arena_values[group.arena][:, :, : group.reach][group.places],
                attn_mask=bias.repeat(1, 1, heads // kv_heads, 1),
                scale=scale,
            )
            result = result.view(count, kv_heads, heads // kv_heads, length, width).permute(0, 3, 1, 2, 4)
            out[group.target] = result.reshape(count * length, heads, width)[group.source]
        return out

    def _bias(self, window: int | None, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """Added to the scores: float[seats, 1, 1, reach] per span, float[P, 1, Q, reach] per group."""
        if window not in self._biases:
            widest = max(span.reach for span in self._spans)
            live = _bias(self._last, widest, window, dtype)[:, None, None]
            groups = [_bias(group.positions, group.reach, window, dtype)[:, None] for group in self._groups]
            self._biases[window] = (
                [live[span.first : span.last, :, :, : span.reach] for span in self._spans],
                groups,
            )
        return self._biases[window]

    def _tensor(self, values: IntArray) -> Tensor:
        return torch.from_numpy(values).to(self._device)


def _bias(positions: Tensor, reach: int, window: int | None, dtype: torch.dtype) -> Tensor:
    keys = torch.arange(reach, device=positions.device)
    hidden = keys > positions.unsqueeze(-1)
    if window is not None:
        hidden |= keys <= positions.unsqueeze(-1) - window
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, _NEVER)


def _spans(order: Sequence[Seat], lengths: IntArray, slots: Slots) -> list[_Span]:
    spans, first = [], 0
    while first < len(order):
        last = first
        while last < len(order) and order[last].arena == order[first].arena:
            last += 1
        arena = order[first].arena
        spans.append(_Span(arena, first, last, _reach(slots, arena, int(lengths[first:last].max()) + 1)))
        first = last
    return spans


def _groups(pieces: Sequence[Piece], slots: Slots) -> list[_Group]:
    """Pieces of similar length in one arena, together; long ones are cut and read no keys after their end."""
    cuts = [
        Piece(
            piece.seat, piece.position + start, piece.first + start, min(_LONGEST_PIECE, piece.length - start)
        )
        for piece in pieces
        for start in range(0, piece.length, _LONGEST_PIECE)
    ]
    cuts.sort(key=lambda cut: (cut.seat.arena, -cut.length, cut.seat.index, cut.position))
    groups, first = [], 0
    while first < len(cuts):
        last = first
        while (
            last < len(cuts)
            and cuts[last].seat.arena == cuts[first].seat.arena
            and 2 * cuts[last].length >= cuts[first].length
        ):
            last += 1
        groups.append(_group(sorted(cuts[first:last], key=lambda cut: cut.seat.index), slots))
        first = last
    return groups


def _group(cuts: Sequence[Piece], slots: Slots) -> _Group:
    device = slots.device
    count, length = len(cuts), max(cut.length for cut in cuts)
    steps = np.arange(length)
    sizes = np.array([cut.length for cut in cuts])[:, None]
    index = np.where(steps < sizes, np.array([cut.first for cut in cuts])[:, None] + steps, 0)
    real = (steps < sizes).flatten()
    places = [cut.seat.index for cut in cuts]
    consecutive = places == list(range(places[0], places[0] + count))
    return _Group(
        arena=cuts[0].seat.arena,
        places=slice(places[0], places[0] + count) if consecutive else torch.tensor(places, device=device),
        queries=torch.from_numpy(index).to(device),
        positions=torch.from_numpy(np.array([cut.position for cut in cuts])[:, None] + steps).to(device),
        source=torch.from_numpy(np.flatnonzero(real)).to(device),
        target=torch.from_numpy(index.flatten()[real]).to(device),
        reach=_reach(slots, cuts[0].seat.arena, max(cut.position + cut.length for cut in cuts)),
    )


def _reach(slots: Slots, arena: int, positions: int) -> int:
    """Positions that attention reads in an arena, at least those given."""
    multiple = slots.reach_multiple
    return min(-(-positions // multiple) * multiple, slots.arenas[arena].room)
