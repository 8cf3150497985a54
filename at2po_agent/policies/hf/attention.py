"""Attention of a packed batch over arenas: one row of N tokens from many sequences.

The batch holds prompt tokens first, then padding, then the newest token of every seat, in seat order.
`PackedAttention` works out once for a batch, and then uses in every layer:

- where each token's KV are written: its own seat, and others that share the prompt in the same step;
- who attends to whom: one call of dense attention for the newest tokens of each arena, whose seats lie side
  by side, and one for each group of prompt runs of similar length in one arena.

The same sequence gets the same numbers whatever it shares a batch with, bit for bit in float32 on the CPUs
that were tried: how many positions a query reads depends on its own position alone, and the number of rows of
every matrix is a multiple of four, at least sixteen (fewer rows take other code in the matrix library).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from at2po_agent.policies.hf.slots import Seat, Slots
from at2po_agent.types import IntArray

_NEVER = float("-inf")
_LONGEST_PIECE = 128
_FEWEST_ROWS = 16
# Two query heads to a KV head would need two rows only. But two take other code than prompts do, with other
# rounding: what was evicted and computed again would decide results.
_ROWS_MULTIPLE = 4


class ExtraWrite(NamedTuple):
    """Sends a token's KV to another seat too.

    Attributes:
        source: The token: its index in the packed batch, or the seat whose newest token it is.
        seat: The other seat.
        position: The place there.
    """

    source: int | Seat
    seat: Seat
    position: int


class PromptRun(NamedTuple):
    """Consecutive prompt tokens of a seat: position and packed index of the first, and how many."""

    seat: Seat
    position: int
    first: int
    length: int


class _Span(NamedTuple):
    """Seats first..last-1 of the batch sit in one arena; attention reads all of its room."""

    arena: int
    first: int
    last: int
    reach: int


class _Group(NamedTuple):
    """P runs of at most Q tokens in one arena.

    Attributes:
        arena: Number of the arena.
        places: The runs' places there.
        queries: int64[P, Q], packed index of each query, padded with 0.
        positions: int64[P, Q], of the queries.
        source: Which of the P * Q queries are real.
        target: Their packed index.
        reach: Positions that attention reads: the room of a sequence that ends at any of the queries.
    """

    arena: int
    places: slice | Tensor
    queries: Tensor
    positions: Tensor
    source: Tensor
    target: Tensor
    reach: int


class PackedAttention:
    """Stores the KV of one packed batch, and attends with its queries.

    Args:
        slots: The storage.
        order: All seats; the newest token of each stands at its length.
        runs: The prompt tokens.
        writes: Further places of KV.

    Attributes:
        before: Rows before the newest tokens: prompt tokens and padding.
        live: Newest tokens.
        positions: int64[N], of all rows.
    """

    def __init__(
        self, slots: Slots, order: Sequence[Seat], runs: Sequence[PromptRun], writes: Sequence[ExtraWrite]
    ) -> None:
        self._device, self._layers = slots.device, slots.layers
        # The packed batch is [prompt tokens | padding | newest tokens]; each row has a position and a seat's
        # number. Padding belongs to no seat: number `live` stands for the spare place.
        prompts, live = sum(run.length for run in runs), len(order)
        self.before = rows_for(prompts + live) - live
        self._padding = slice(prompts, self.before)
        self.live = live
        lengths = np.array([seat.length for seat in order], dtype=np.int64)
        parts = [np.arange(run.position, run.position + run.length) for run in runs]
        self.positions: IntArray = np.concatenate(
            [*parts, np.zeros(self.before - prompts, np.int64), lengths]
        )
        owners = [np.full(run.length, run.seat.number) for run in runs]
        numbers = np.concatenate([*owners, np.full(self.before - prompts, live), np.arange(live)])
        # Every row's KV are written once to its own seat; extra writes repeat rows of the batch below them.
        written = self.positions
        self._source: Tensor | None = None
        if writes:
            numbers = np.concatenate([numbers, [write.seat.number for write in writes]])
            written = np.concatenate([written, [write.position for write in writes]])
            sources = [self.before + one.number if isinstance(one, Seat) else one for one, _, _ in writes]
            self._source = self._tensor(np.concatenate([np.arange(len(self.positions)), sources]))
        # Storage rows depend on the number of heads, so `write` finishes them; here: (first, room, position).
        places = np.array([*((seat.first, seat.room) for seat in order), slots.spare], dtype=np.int64)
        self._first_rows = self._tensor(np.column_stack([places[numbers], written]))
        self._rows: dict[int, Tensor] = {}
        self._last = self._tensor(lengths)
        self._spans = _spans(order, slots)
        self._groups = _groups(runs, slots)
        self._biases: dict[tuple[int | None, int], tuple[list[Tensor], list[Tensor]]] = {}

    def _write(self, states: Tensor, storage: Tensor) -> None:
        """Store one layer's keys or values.

        Args:
            states: float[N, heads, width].
            storage: float[tokens * heads, width], written in place.
        """
        if self._source is not None:
            states = states[self._source]
        heads, width = states.shape[1:]
        if heads not in self._rows:
            # A place of `room` positions holds its heads one after another: head h of position p lies at
            # row first * heads + h * room + p.
            first, room, position = self._first_rows.unbind(1)
            lanes = torch.arange(heads, device=self._device) * room[:, None]
            self._rows[heads] = (lanes + (first * heads + position)[:, None]).flatten()
        storage.index_copy_(0, self._rows[heads], states.reshape(-1, width))

    def attend(
        self,
        number: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
    ) -> Tensor:
        """Store a layer's keys and values, and attend with its queries.

        Args:
            number: Number of the layer.
            queries: float[N, heads, width].
            keys: float[N, KV heads, width].
            values: float[N, KV heads, width of the values].
            scale: Factor of the scores; None means 1 / sqrt(width).
            window: How many positions back a query sees, itself included; None for all.

        Returns:
            float[N, heads, width of the values].
        """
        layer = self._layers[number]
        self._write(keys, layer.keys)
        self._write(values, layer.values)
        heads, kv_heads, width = queries.shape[1], keys.shape[1], values.shape[2]
        repeats = heads // kv_heads
        live_biases, group_biases = self._bias(window, repeats, queries.dtype)
        out = queries.new_empty((queries.shape[0], heads, width))
        if self._padding.start < self._padding.stop:
            out[self._padding] = 0
        # The query heads of one KV head become its queries: no key or value is repeated.
        newest = queries[self.before :].reshape(self.live, kv_heads, repeats, -1)
        newest = F.pad(newest, (0, 0, 0, -repeats % _ROWS_MULTIPLE))
        attended = out[self.before :].view(self.live, kv_heads, repeats, width)
        # Newest tokens: the seats of an arena are consecutive rows and consecutive places, so one dense call
        # reads them without gathering. The bias hides what lies beyond a sequence's length.
        for span, bias in zip(self._spans, live_biases, strict=True):
            result = F.scaled_dot_product_attention(
                newest[span.first : span.last],
                layer.arena_keys[span.arena][: span.last - span.first],
                layer.arena_values[span.arena][: span.last - span.first],
                attn_mask=bias,
                scale=scale,
            )
            attended[span.first : span.last] = result[:, :, :repeats]
        # Prompt tokens: the runs of a group are padded to one length, and read as far as their room reaches.
        for group, bias in zip(self._groups, group_biases, strict=True):
            count, length = group.queries.shape
            grouped = queries[group.queries].view(count, length, kv_heads, repeats, -1)
            result = F.scaled_dot_product_attention(
                grouped.permute(0, 2, 3, 1, 4).reshape(count, kv_heads, repeats * length, -1),
                layer.arena_keys[group.arena][:, :, : group.reach][group.places],
                layer.arena_values[group.arena][:, :, : group.reach][group.places],
                attn_mask=bias,
                scale=scale,
            )
            result = result.view(count, kv_heads, repeats, length, width).permute(0, 3, 1, 2, 4)
            out[group.target] = result.reshape(count * length, heads, width)[group.source]
        return out

    def _bias(
        self, window: int | None, repeats: int, dtype: torch.dtype
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Added to scores: float[seats, 1, 1, reach] per span, float[P, 1, repeats * Q, reach] per group."""
        key = (window, repeats)
        if key in self._biases:
            return self._biases[key]

        def bias(positions: Tensor, reach: int) -> Tensor:
            """0 for keys that a query at its position sees, minus infinity for others."""
            keys = torch.arange(reach, device=positions.device)
            hidden = keys > positions.unsqueeze(-1)
            if window is not None:
                hidden |= keys <= positions.unsqueeze(-1) - window
            zeros = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            return zeros.masked_fill_(hidden, _NEVER)[:, None]

        self._biases[key] = (
            [bias(self._last[span.first : span.last, None], span.reach) for span in self._spans],
            [bias(group.positions.repeat(1, repeats), group.reach) for group in self._groups],
        )
        return self._biases[key]

    def _tensor(self, values: IntArray) -> Tensor:
        return torch.from_numpy(values).to(self._device)


def rows_for(rows: int) -> int:
    """Round the rows of a matrix up: a multiple of four, at least sixteen."""
    return max(-(-rows // _ROWS_MULTIPLE) * _ROWS_MULTIPLE, _FEWEST_ROWS)


def _spans(order: Sequence[Seat], slots: Slots) -> list[_Span]:
    spans, first = [], 0
    for arena, seats in itertools.groupby(order, key=lambda seat: seat.arena):
        last = first + len(list(seats))
        spans.append(_Span(arena, first, last, slots.arenas[arena].room))
        first = last
    return spans


def _groups(runs: Sequence[PromptRun], slots: Slots) -> list[_Group]:
    """Group runs that sit in one arena, read equally far, and are of like length (within a factor of 2).

    A run is cut where its queries begin to read further, and where it is long. How far a query reads then
    depends on its own position alone, never on what it was fed with: equal sequences get equal numbers in any
    batch.
    """

    def tensor(values: IntArray) -> Tensor:
        return torch.from_numpy(values).to(slots.device)

    cuts = []
    for seat, position, first, length in runs:
        while length:
            reach = slots.room_for(position + 1)
            size = min(length, reach - position, _LONGEST_PIECE)
            piece = PromptRun(seat, position, first, size)
            cuts.append(((seat.arena, reach, -size, seat.index, position), piece))
            position, first, length = position + size, first + size, length - size
    cuts.sort()
    groups, start = [], 0
    while start < len(cuts):
        (arena, reach, longest, *_), _ = cuts[start]
        end = start
        while end < len(cuts) and cuts[end][0][:2] == (arena, reach) and 2 * cuts[end][0][2] <= longest:
            end += 1
        together = sorted((cut for _, cut in cuts[start:end]), key=lambda cut: cut.seat.index)
        start = end
        # Pad the queries of the group to one length; `real` are those that stand for a token.
        steps = np.arange(-(longest // _ROWS_MULTIPLE) * _ROWS_MULTIPLE)  # `longest` is negative
        sizes = np.array([cut.length for cut in together])[:, None]
        queries = np.where(steps < sizes, np.array([cut.first for cut in together])[:, None] + steps, 0)
        positions = np.array([cut.position for cut in together])[:, None] + steps
        real = (steps < sizes).flatten()
        places = [cut.seat.index for cut in together]
        consecutive = places == list(range(places[0], places[0] + len(places)))
        groups.append(
            _Group(
                arena=arena,
                places=slice(places[0], places[-1] + 1) if consecutive else tensor(np.array(places)),
                queries=tensor(queries),
                positions=tensor(positions),
                source=tensor(np.flatnonzero(real)),
                target=tensor(queries.flatten()[real]),
                reach=reach,
            )
        )
    return groups
