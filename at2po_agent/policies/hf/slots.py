"""Keys and values of many sequences, kept side by side in arenas of equal room.

A sequence has a seat: a place of fixed room in the arena of the next larger room. It moves up when it
outgrows its arena, and arenas stay compact, so attention runs over a few dense blocks and reads hardly any
padding. All arenas of one kind of layer lie in one tensor; writes go there by row number, all tokens of a
step at once.

Knows shapes, devices and seats; no model, no requests.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

_SMALLEST_ROOM = 64
Segment: TypeAlias = tuple[Tensor, ...]
"""KV of a run of tokens: one tensor [layers, heads, tokens, width] per group of equally shaped layers."""


class LayerShape(NamedTuple):
    """Heads and width of a layer's keys, and of its values."""

    keys: tuple[int, int]
    values: tuple[int, int]


@dataclass(slots=True, eq=False)
class Seat:
    """Locates the KV of a sequence.

    Attributes:
        ticket: The sequence.
        length: Positions that hold its KV.
        arena: Number of its arena.
        index: Its place there.
        first: Tokens before its place in the storage.
        room: Positions of its place.
        number: Its place in the order of the current step.
    """

    ticket: int
    length: int = 0
    arena: int = 0
    index: int = 0
    first: int = 0
    room: int = 0
    number: int = 0


@dataclass(slots=True, eq=False)
class Arena:
    """Places of equal room.

    Attributes:
        room: Positions of a place.
        first: Tokens before it in the storage.
        capacity: Places.
        seats: Who sits where; None is a hole.
    """

    room: int
    first: int
    capacity: int
    seats: list[Seat | None]


class LayerViews(NamedTuple):
    """One layer's storage.

    Attributes:
        keys: float[tokens * heads, width].
        values: As `keys`.
        arena_keys: The same storage per arena, float[places, heads, room, width].
        arena_values: As `arena_keys`.
    """

    keys: Tensor
    values: Tensor
    arena_keys: list[Tensor]
    arena_values: list[Tensor]


class Slots:
    """The seats and their storage.

    Args:
        shapes: One per layer.
        max_tokens: Most positions of all places together.
        dtype: Of keys and values.
        device: Their device.
    """

    def __init__(
        self, shapes: Sequence[LayerShape], *, max_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        kinds = sorted({shape for layer in shapes for shape in layer})
        # Keys and values of one shape share a plane; `_places` says which, and the row there: [layer][k, v].
        self._places: list[list[tuple[int, int]]] = []
        rows = [0] * len(kinds)
        for layer in shapes:
            self._places.append([])
            for shape in layer:
                plane = kinds.index(shape)
                self._places[-1].append((plane, rows[plane]))
                rows[plane] += 1
        self._kinds = kinds
        self._planes = [
            torch.zeros((number, 0, width), dtype=dtype, device=device)
            for number, (_, width) in zip(rows, kinds, strict=True)
        ]
        self.device = device
        self.max_tokens = max_tokens
        self.arenas: list[Arena] = []
        self.layers: list[LayerViews] = []
        self._lay_out([])

    def seat(self, ticket: int, room: int) -> Seat | None:
        """Give a sequence a place of at least `room` positions; None where no more fit."""
        arena = self._arena(room)
        if arena is None:
            return None
        seat = Seat(ticket)
        self._sit(seat, arena, _free_place(arena))
        return seat

    def leave(self, seat: Seat) -> None:
        """Free a place."""
        self.arenas[seat.arena].seats[seat.index] = None

    def grow(self) -> bool:
        """Move every sequence that has no room for one more position up; False where no more fit."""
        for arena in list(self.arenas):
            for seat in [seat for seat in arena.seats if seat is not None and seat.length >= arena.room]:
                target = self._arena(seat.length + 1)
                if target is None:
                    return False
                self._move(seat, target, _free_place(target))
        return True

    def compact(self) -> None:
        """Close all holes."""
        for arena in self.arenas:
            if None not in arena.seats:
                continue
            for hole in [index for index, seat in enumerate(arena.seats) if seat is None]:
                while arena.seats and arena.seats[-1] is None:
                    arena.seats.pop()
                if hole >= len(arena.seats):
                    break
                last = arena.seats[-1]
                assert last is not None
                self._move(last, arena, hole)
                arena.seats.pop()

    def order(self) -> list[Seat]:
        """All seats, arena by arena; numbers them."""
        seats = [seat for arena in self.arenas for seat in arena.seats if seat is not None]
        for number, seat in enumerate(seats):
            seat.number = number
        return seats

    def read(self, seat: Seat, start: int, end: int) -> Segment:
        """A copy of the KV of positions start..end-1."""
        return tuple(self._region(plane, seat)[:, :, start:end].clone() for plane in range(len(self._planes)))

    def write(self, seat: Seat, start: int, segment: Segment, length: int) -> None:
        """Put the first `length` tokens of a segment at `start`."""
        for plane, part in enumerate(segment):
            self._region(plane, seat)[:, :, start : start + length] = part[:, :, :length]

    def clear(self) -> None:
        """Free all places and zero the storage: NaN left there would reach other sequences as 0 * NaN."""
        for arena in self.arenas:
            arena.seats.clear()
        for plane in self._planes:
            plane.zero_()

    @property
    def spare(self) -> tuple[int, int]:
        """(first, room) of a place for keys and values that are never read."""
        return sum(arena.room * arena.capacity for arena in self.arenas), 1

    def room_for(self, positions: int) -> int:
        """The room of a sequence with so many positions: the next of 64, 96, 128, 192, 256, 384, ..."""
        size = _SMALLEST_ROOM
        while size < positions and 3 * size // 2 < positions:
            size *= 2
        room = size if size >= positions else 3 * size // 2
        return min(room, max(self.max_tokens, positions))

    def _region(self, plane: int, seat: Seat) -> Tensor:
        """All layers of one sequence: [layers, heads, room, width]."""
        heads, width = self._kinds[plane]
        part = self._planes[plane][:, seat.first * heads : (seat.first + seat.room) * heads]
        return part.view(-1, heads, seat.room, width)

    def _sit(self, seat: Seat, arena: Arena, index: int) -> None:
        """Take a place."""
        arena.seats[index] = seat
        seat.arena, seat.index, seat.room = self.arenas.index(arena), index, arena.room
        seat.first = arena.first + index * arena.room

    def _move(self, seat: Seat, arena: Arena, index: int) -> None:
        """Take another place, and the KV along."""
        planes = range(len(self._planes))
        source = [self._region(plane, seat)[:, :, : seat.length] for plane in planes]
        self.leave(seat)
        self._sit(seat, arena, index)
        for plane, part in enumerate(source):
            self._region(plane, seat)[:, :, : seat.length] = part

    def _arena(self, room: int) -> Arena | None:
        """An arena with a free place of this room, made or enlarged where needed."""
        size = self.room_for(room)
        arena = next((arena for arena in self.arenas if arena.room == size), None)
        if arena is not None and (len(arena.seats) < arena.capacity or None in arena.seats):
            return arena
        wanted = [(other.room, other.capacity) for other in self.arenas if other.room != size]
        bisect.insort(wanted, (size, max(2 * arena.capacity, 8) if arena is not None else 8))
        if sum(room * capacity for room, capacity in wanted) > self.max_tokens:
            self.compact()
            needed = {other.room: len(other.seats) for other in self.arenas}
            needed[size] = needed.get(size, 0) + 1
            wanted = sorted((room, capacity) for room, capacity in needed.items() if capacity)
            if sum(room * capacity for room, capacity in wanted) > self.max_tokens:
                return None
        self._lay_out(wanted)
        return next(arena for arena in self.arenas if arena.room == size)

    def _lay_out(self, wanted: Sequence[tuple[int, int]]) -> None:
        """Make new storage for arenas of (room, capacity), and take over who sits in the old one."""
        old = {arena.room: arena for arena in self.arenas}
        self.arenas, first = [], 0
        for room, capacity in wanted:
            arena = Arena(room, first, capacity, old[room].seats if room in old else [])
            self.arenas.append(arena)
            for index, seat in enumerate(arena.seats):
                if seat is not None:
                    self._sit(seat, arena, index)
            first += room * capacity
        for plane, (heads, width) in enumerate(self._kinds):
            before = self._planes[plane]
            after = before.new_zeros((before.shape[0], (first + 1) * heads, width))  # one spare place
            for arena in self.arenas:
                if arena.room in old and arena.seats:
                    size = len(arena.seats) * arena.room * heads
                    source, target = old[arena.room].first * heads, arena.first * heads
                    after[:, target : target + size] = before[:, source : source + size]
            self._planes[plane] = after
        self.layers = []
        for places in self._places:
            wholes, views = [], []
            for plane, row in places:
                heads, width = self._kinds[plane]
                whole = self._planes[plane][row]
                wholes.append(whole)
                views.append(
                    [
                        whole[arena.first * heads :][: arena.capacity * arena.room * heads].view(
                            arena.capacity, heads, arena.room, width
                        )
                        for arena in self.arenas
                    ]
                )
            self.layers.append(LayerViews(wholes[0], wholes[1], views[0], views[1]))


def _free_place(arena: Arena) -> int:
    """The first free place of an arena that has one."""
    if None not in arena.seats:
        arena.seats.append(None)
    return arena.seats.index(None)
