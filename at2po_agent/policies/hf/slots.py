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
from typing import NamedTuple

import torch
from torch import Tensor

from at2po_agent.policies.hf.prefix_cache import Segment

_SMALLEST_ROOM = 64


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
        self._places = []
        rows = [0] * len(kinds)
        for layer in shapes:
            pair = []
            for shape in layer:
                plane = kinds.index(shape)
                pair.append((plane, rows[plane]))
                rows[plane] += 1
            self._places.append((pair[0], pair[1]))
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
        self._sit(seat, arena)
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
                source = [
                    self._region(plane, seat)[:, :, : seat.length] for plane in range(len(self._planes))
                ]
                self.leave(seat)
                self._sit(seat, target)
                for plane, part in enumerate(source):
                    self._region(plane, seat)[:, :, : seat.length] = part
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
                seat = arena.seats.pop()
                assert seat is not None
                source = [
                    self._region(plane, seat)[:, :, : seat.length] for plane in range(len(self._planes))
                ]
                self._settle(seat, arena, hole)
                for plane, part in enumerate(source):
                    self._region(plane, seat)[:, :, : seat.length] = part

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
        return min(_place_size(positions), max(self.max_tokens, positions))

    def _region(self, plane: int, seat: Seat) -> Tensor:
        """All layers of one sequence: [layers, heads, room, width]."""
        heads, width = self._kinds[plane]
        part = self._planes[plane][:, seat.first * heads : (seat.first + seat.room) * heads]
        return part.view(-1, heads, seat.room, width)

    def _sit(self, seat: Seat, arena: Arena) -> None:
        """Take the first free place of an arena."""
        seats = arena.seats
        index = seats.index(None) if None in seats else len(seats)
        if index == len(seats):
            seats.append(seat)
        seat.arena = self.arenas.index(arena)
        self._settle(seat, arena, index)

    def _settle(self, seat: Seat, arena: Arena, index: int) -> None:
        arena.seats[index] = seat
        seat.index, seat.first, seat.room = index, arena.first + index * arena.room, arena.room

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
        arenas, first = [], 0
        for number, (room, capacity) in enumerate(wanted):
            seats = old[room].seats if room in old else []
            arena = Arena(room, first, capacity, seats)
            arenas.append(arena)
            for index, seat in enumerate(seats):
                if seat is not None:
                    seat.arena = number
                    self._settle(seat, arena, index)
            first += room * capacity
        for plane, (heads, width) in enumerate(self._kinds):
            before = self._planes[plane]
            after = before.new_zeros((before.shape[0], (first + 1) * heads, width))  # one spare place
            for arena in arenas:
                if arena.room in old and arena.seats:
                    size = len(arena.seats) * arena.room * heads
                    source, target = old[arena.room].first * heads, arena.first * heads
                    after[:, target : target + size] = before[:, source : source + size]
            self._planes[plane] = after
        self.arenas = arenas
        self.layers = [self._views(keys, values) for keys, values in self._places]

    def _views(self, keys: tuple[int, int], values: tuple[int, int]) -> LayerViews:
        tensors, arenas = [], []
        for plane, row in (keys, values):
            heads, width = self._kinds[plane]
            whole = self._planes[plane][row]
            tensors.append(whole)
            arenas.append(
                [
                    whole[arena.first * heads : (arena.first + arena.capacity * arena.room) * heads].view(
                        arena.capacity, heads, arena.room, width
                    )
                    for arena in self.arenas
                ]
            )
        return LayerViews(tensors[0], tensors[1], arenas[0], arenas[1])


def _place_size(room: int) -> int:
    """The next of 2^k and 3 * 2^k."""
    size = _SMALLEST_ROOM
    while size < room:
        if 3 * size // 2 >= room:
            return 3 * size // 2
        size *= 2
    return size
