"""Whatever is seated, moved or freed: each sequence reads what was written for it, within the budget."""

from __future__ import annotations

import random

import pytest
import torch

from at2po_agent.policies.hf.slots import LayerShape, Seat, Slots

SHAPES = [
    LayerShape((2, 4), (2, 4)),
    LayerShape((1, 3), (2, 4)),
]  # two kinds of layer: three planes, two kinds


def make_slots(max_tokens: int = 100_000) -> Slots:
    return Slots(SHAPES, max_tokens=max_tokens, dtype=torch.float32, device=torch.device("cpu"))


def write(slots: Slots, seat: Seat, length: int, mark: float) -> None:
    """Extend a sequence to `length` with values that name it and the position."""
    before = seat.length
    parts = tuple(torch.zeros_like(part) for part in slots.read(seat, before, length))
    for part in parts:
        part += mark + torch.arange(before, length).view(1, 1, -1, 1)
    slots.write(seat, before, parts, length - before)
    seat.length = length


@pytest.mark.parametrize("seed", range(8))
def test_every_sequence_keeps_its_own_values(seed: int) -> None:
    rng, slots = random.Random(seed), make_slots()
    live: dict[int, Seat] = {}
    for ticket in range(400):
        action = rng.random()
        if action < 0.4 or not live:
            length = rng.choice([1, 30, 64, 65, 200])
            seat = slots.seat(ticket, length)
            assert seat is not None
            write(slots, seat, length, 1000.0 * ticket)
            live[ticket] = seat
        elif action < 0.6:
            slots.leave(live.pop(rng.choice(list(live))))
        elif action < 0.8:
            assert slots.grow()
            for owner, seat in live.items():
                write(slots, seat, seat.length + 1, 1000.0 * owner)
        else:
            slots.compact()
            order = slots.order()
            assert sorted(seat.ticket for seat in order) == sorted(live)
            for arena in slots.arenas:
                assert None not in arena.seats
    for ticket, seat in live.items():
        for part in slots.read(seat, 0, seat.length):
            expected = 1000.0 * ticket + torch.arange(seat.length).view(1, 1, -1, 1)
            torch.testing.assert_close(part, expected.expand_as(part))


def test_rooms_grow_by_at_most_one_half() -> None:
    slots = make_slots()
    rooms = []
    for length in (1, 64, 65, 96, 97, 128, 129, 192, 193, 1000):
        seat = slots.seat(length, length)
        assert seat is not None
        rooms.append(seat.room)
    assert rooms == [64, 64, 96, 96, 128, 128, 192, 192, 256, 1024]


def test_the_budget_is_kept_and_freed_room_is_used_again() -> None:
    slots = make_slots(max_tokens=300)
    seats = []
    while (seat := slots.seat(len(seats), 64)) is not None:
        seats.append(seat)
    assert len(seats) == 4  # 4 * 64 <= 300 < 5 * 64
    slots.leave(seats[1])
    again = slots.seat(9, 64)
    assert again is not None
    slots.leave(again)
    assert slots.seat(10, 96) is not None  # 3 * 64 + 96: the hole is closed to make room
    assert slots.seat(11, 64) is None


def test_a_sequence_that_finds_no_room_stays_where_it_is() -> None:
    slots = make_slots(max_tokens=128)
    first, second = slots.seat(0, 64), slots.seat(1, 64)
    assert first is not None
    assert second is not None
    write(slots, first, 64, 5.0)
    assert not slots.grow()
    torch.testing.assert_close(slots.read(first, 0, 64)[0][0, 0, :, 0], 5.0 + torch.arange(64.0))


def test_the_largest_sequence_may_take_the_whole_budget() -> None:
    slots = make_slots(max_tokens=100)  # the next room up would be 128
    seat = slots.seat(0, 70)
    assert seat is not None
    assert seat.room <= 100


def test_clear_leaves_no_values_behind() -> None:
    slots = make_slots()
    seat = slots.seat(0, 10)
    assert seat is not None
    write(slots, seat, 10, float("nan"))
    slots.clear()
    again = slots.seat(1, 10)
    assert again is not None
    assert all(torch.equal(part, torch.zeros_like(part)) for part in slots.read(again, 0, 10))
