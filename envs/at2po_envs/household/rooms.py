"""Draws games from a seed: kitchens, bathrooms, bedrooms and living rooms that can be solved by construction.

What fits where, and what can be cleaned, heated, cooled, sliced or opened, are the lists of ALFRED, as the
distribution `alfworld` 0.4.2 has them, without sliced objects. Which rooms have what is a choice of ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from at2po_envs.household.pddl import FAMILIES, Fact, Goal, Problem

Rng = np.random.Generator
T = TypeVar("T")

_TABLE = """AlarmClock Apple BaseballBat BasketBall Book Bowl Box Bread ButterKnife CD Candle CellPhone
Cloth CreditCard Cup DishSponge Egg Fork Glassbottle HandTowel Kettle KeyChain Knife Ladle
Laptop Lettuce Mug Newspaper Pan PaperTowel Pen Pencil PepperShaker Plate Pot Potato
RemoteControl SaltShaker SoapBar SoapBottle Spatula Spoon SprayBottle Statue TennisRacket
TissueBox ToiletPaper ToiletPaperRoll Tomato Vase Watch WateringCan WineBottle"""
_SEAT = "BasketBall Book Box CellPhone Cloth CreditCard KeyChain Laptop Newspaper Pillow RemoteControl"
_DRESSER = """AlarmClock BasketBall Book Bowl Box CD Candle CellPhone Cloth CreditCard Cup Glassbottle
KeyChain Laptop Mug Newspaper Pen Pencil Plate RemoteControl SprayBottle Statue TennisRacket
TissueBox ToiletPaper ToiletPaperRoll Vase Watch WateringCan WineBottle"""

FITS: Mapping[str, frozenset[str]] = {
    receptacle: frozenset(things.split())
    for receptacle, things in {
        "ArmChair": _SEAT,
        "BathtubBasin": "Cloth DishSponge HandTowel SoapBar",
        "Bed": "BaseballBat BasketBall Book CellPhone Laptop Newspaper Pillow TennisRacket",
        "Cabinet": """Book Bowl Box CD Candle Cloth Cup DishSponge Glassbottle HandTowel Kettle Ladle Mug
            Newspaper Pan PepperShaker Plate Plunger Pot SaltShaker SoapBar SoapBottle
            SprayBottle TissueBox ToiletPaper ToiletPaperRoll Vase WateringCan WineBottle""",
        "CoffeeMachine": "Mug",
        "CoffeeTable": _TABLE,
        "CounterTop": _TABLE,
        "Desk": _DRESSER + " SoapBottle",
        "DiningTable": _TABLE,
        "Drawer": """Book ButterKnife CD Candle CellPhone Cloth CreditCard DishSponge Fork HandTowel KeyChain
            Knife Ladle Newspaper Pen Pencil PepperShaker RemoteControl SaltShaker SoapBar
            SoapBottle Spatula Spoon SprayBottle TissueBox ToiletPaper ToiletPaperRoll Watch
            WateringCan""",
        "Dresser": _DRESSER,
        "Fridge": "Apple Bowl Bread Cup Egg Glassbottle Lettuce Mug Pan Plate Pot Potato Tomato WineBottle",
        "GarbageCan": """Apple Bread CD Cloth DishSponge Egg HandTowel Lettuce Newspaper PaperTowel Pen
            Pencil Potato SoapBar SoapBottle SprayBottle TissueBox ToiletPaper ToiletPaperRoll Tomato
            WineBottle""",
        "HandTowelHolder": "HandTowel",
        "Microwave": "Apple Bowl Bread Cup Egg Glassbottle Mug Plate Potato Tomato",
        "Safe": "CD CellPhone CreditCard KeyChain Statue Vase Watch",
        "Shelf": """AlarmClock Book Bowl Box CD Candle CellPhone Cloth CreditCard Cup DishSponge Glassbottle
            HandTowel Kettle KeyChain Mug Newspaper PaperTowel Pen Pencil PepperShaker Plate
            Pot RemoteControl SaltShaker SoapBar SoapBottle SprayBottle Statue TissueBox
            ToiletPaper ToiletPaperRoll Vase Watch WateringCan WineBottle""",
        "SideTable": _TABLE,
        "SinkBasin": """Apple Bowl ButterKnife Cloth Cup DishSponge Egg Fork Glassbottle HandTowel Kettle
            Knife Ladle Lettuce Mug Pan Plate Pot Potato SoapBar Spatula Spoon Tomato""",
        "Sofa": _SEAT,
        "StoveBurner": "Kettle Pan Pot",
        "TVStand": "TissueBox",
        "Toaster": "",
        "Toilet": """Candle Cloth DishSponge HandTowel Newspaper PaperTowel SoapBar SoapBottle SprayBottle
            TissueBox ToiletPaper ToiletPaperRoll""",
        "ToiletPaperHanger": "ToiletPaper ToiletPaperRoll",
        "TowelHolder": "Towel",
    }.items()
}
"""Which objects each receptacle holds."""

PROPERTIES: Mapping[str, frozenset[str]] = {
    name: frozenset(things.split())
    for name, things in {
        "cleanable": """Apple Bowl ButterKnife Cloth Cup DishSponge Egg Fork Kettle Knife Ladle Lettuce Mug
            Pan Plate Pot Potato SoapBar Spatula Spoon Tomato""",
        "heatable": "Apple Bread Cup Egg Mug Plate Potato Tomato",
        "coolable": "Apple Bowl Bread Cup Egg Lettuce Mug Pan Plate Pot Potato Tomato WineBottle",
        "sliceable": "Apple Bread Egg Lettuce Potato Tomato",
        "isreceptacleobject": "Bowl Box Cup Mug Pan Plate Pot",
        "toggleable": "DeskLamp",
    }.items()
}
ALWAYS_CLOSED = ("Fridge", "Microwave", "Safe")
SOMETIMES_CLOSED = ("Cabinet", "Drawer")
LAMP_STANDS = ("Desk", "Dresser", "SideTable", "Shelf", "DiningTable")


class Room(NamedTuple):
    """A kind of room: how many of each receptacle it has, from and to, and what may be in it.

    `things` can be carried, and are parted by blanks; `fixed` cannot.
    """

    receptacles: Mapping[str, tuple[int, int]]
    things: str
    fixed: tuple[str, ...]


ROOMS: Mapping[str, Room] = {
    "kitchen": Room(
        {
            "Cabinet": (2, 9),
            "CoffeeMachine": (1, 1),
            "CounterTop": (1, 3),
            "DiningTable": (0, 1),
            "Drawer": (1, 5),
            "Fridge": (1, 1),
            "GarbageCan": (1, 1),
            "Microwave": (1, 1),
            "Shelf": (0, 3),
            "SinkBasin": (1, 1),
            "StoveBurner": (1, 4),
            "Toaster": (1, 1),
        },
        """Apple Bowl Bread ButterKnife Cup DishSponge Egg Fork Glassbottle Kettle Knife Ladle Lettuce
                Mug Pan PepperShaker Plate Pot Potato SaltShaker SoapBottle Spatula Spoon
                Statue Tomato Vase WineBottle""",
        ("HousePlant", "PaperTowelRoll"),
    ),
    "bathroom": Room(
        {
            "BathtubBasin": (0, 1),
            "Cabinet": (1, 4),
            "CounterTop": (1, 1),
            "Drawer": (0, 4),
            "GarbageCan": (1, 1),
            "HandTowelHolder": (1, 2),
            "Shelf": (0, 3),
            "SinkBasin": (1, 2),
            "Toilet": (1, 1),
            "ToiletPaperHanger": (1, 1),
            "TowelHolder": (0, 1),
        },
        "Candle Cloth DishSponge HandTowel SoapBar SoapBottle SprayBottle TissueBox ToiletPaper Towel",
        ("Mirror", "ScrubBrush"),
    ),
    "bedroom": Room(
        {
            "ArmChair": (0, 1),
            "Bed": (1, 1),
            "Desk": (1, 1),
            "Drawer": (1, 6),
            "Dresser": (0, 1),
            "GarbageCan": (1, 1),
            "Safe": (0, 1),
            "Shelf": (0, 5),
            "SideTable": (1, 2),
        },
        """AlarmClock BaseballBat BasketBall Book Bowl Box CD CellPhone Cloth CreditCard KeyChain
                Laptop Mug Pen Pencil Pillow TennisRacket TissueBox""",
        ("Mirror", "TeddyBear"),
    ),
    "livingroom": Room(
        {
            "ArmChair": (1, 2),
            "CoffeeTable": (1, 1),
            "DiningTable": (0, 1),
            "Drawer": (0, 4),
            "Dresser": (0, 1),
            "GarbageCan": (1, 1),
            "Safe": (0, 1),
            "Shelf": (0, 4),
            "SideTable": (1, 3),
            "Sofa": (1, 1),
            "TVStand": (0, 1),
        },
        """Book Box CellPhone CreditCard KeyChain Laptop Newspaper Pillow Plate RemoteControl Statue
                TissueBox Vase Watch WateringCan""",
        ("HousePlant", "Television"),
    ),
}

# Family: the rooms in which ALFRED has it, what the object must be, the receptacle that makes it so.
_FAMILY_ROOMS: Mapping[str, tuple[tuple[str, ...], str, str]] = {
    "pick_and_place_simple": (("kitchen", "bathroom", "bedroom", "livingroom"), "", ""),
    "look_at_obj_in_light": (("bedroom", "livingroom"), "", ""),
    "pick_clean_then_place_in_recep": (("kitchen", "bathroom"), "cleanable", "SinkBasin"),
    "pick_heat_then_place_in_recep": (("kitchen",), "heatable", "Microwave"),
    "pick_cool_then_place_in_recep": (("kitchen",), "coolable", "Fridge"),
    "pick_two_obj_and_place": (("kitchen", "bathroom", "bedroom", "livingroom"), "", ""),
}
_ASKED: Mapping[str, tuple[str, str]] = {
    "pick_and_place_simple": ("put a {obj} in {recep}", "put some {obj} on {recep}"),
    "look_at_obj_in_light": ("look at {obj} under the {recep}", "examine the {obj} with the {recep}"),
    "pick_clean_then_place_in_recep": (
        "put a clean {obj} in {recep}",
        "clean some {obj} and put it in {recep}",
    ),
    "pick_heat_then_place_in_recep": ("put a hot {obj} in {recep}", "heat some {obj} and put it in {recep}"),
    "pick_cool_then_place_in_recep": ("put a cool {obj} in {recep}", "cool some {obj} and put it in {recep}"),
    "pick_two_obj_and_place": ("put two {obj} in {recep}", "find two {obj} and put them in {recep}"),
}
assert set(_FAMILY_ROOMS) == set(_ASKED) == set(FAMILIES)

SIZES = ("small", "full")


def draw_game(family: str, size: str, rng: Rng) -> tuple[Problem, str]:
    """Draw a game of a family.

    Args:
        family: One of `pddl.FAMILIES`.
        size: "full": rooms about as large as the published ones; "small": few receptacles and objects.
        rng: Where everything is drawn from.

    Returns:
        The problem, and the task in words.
    """
    rooms, needed, server = _FAMILY_ROOMS[family]
    room = ROOMS[_pick(rooms, rng)]
    receptacles: list[str] = []
    for kind, (fewest, most) in room.receptacles.items():
        receptacles += [kind] * (min(fewest, 2) if size == "small" else int(rng.integers(fewest, most + 1)))
    # The object has a place to go to and another to come from; the target does not wash or heat it by itself.
    goals = []
    for thing in room.things.split():
        if not needed or thing in PROPERTIES[needed]:
            homes = sorted({kind for kind in receptacles if thing in FITS[kind]})
            if family == "look_at_obj_in_light":
                goals += [(thing, "DeskLamp")] if homes else []
            elif len(homes) > 1:
                goals += [(thing, kind) for kind in homes if kind != server]
    wanted, target = _pick(goals, rng)
    placed = _place(room, receptacles, wanted, target, family, size, rng)
    goal = Goal(family, f"{wanted}Type".lower(), f"{target}Type".lower())
    problem = _describe(receptacles, placed, goal, rng)
    asked = _ASKED[family][int(rng.integers(2))]
    return problem, asked.format(obj=wanted.lower(), recep=target.lower())


def _pick(options: Sequence[T], rng: Rng) -> T:
    return options[int(rng.integers(len(options)))]


def _place(
    room: Room, receptacles: Sequence[str], wanted: str, target: str, family: str, size: str, rng: Rng
) -> list[tuple[str, int]]:
    """Draw the objects and the receptacle, by its number, that each of them is in."""
    most = 1 if size == "small" else 3
    placed: list[tuple[str, int]] = []
    copies = {wanted: 2 if family == "pick_two_obj_and_place" else 1}
    copies[wanted] += int(rng.integers(0, most))
    others = [thing for thing in room.things.split() if thing != wanted]
    share = 0.3 if size == "small" else 0.8
    for thing in others:
        if rng.random() < share:
            copies[thing] = int(rng.integers(1, most + 1))
    for thing, count in copies.items():
        homes = [
            number
            for number, kind in enumerate(receptacles)
            if thing in FITS[kind] and not (thing == wanted and kind == target)
        ]
        placed += [(thing, _pick(homes, rng)) for _ in range(count) if homes]
    stands = [number for number, kind in enumerate(receptacles) if kind in LAMP_STANDS]
    if stands and (target == "DeskLamp" or rng.random() < 0.3):
        placed.append(("DeskLamp", _pick(stands, rng)))
    for thing in room.fixed:
        if size == "full" and rng.random() < 0.5:
            placed.append((thing, int(rng.integers(len(receptacles)))))
    return placed


def _describe(receptacles: Sequence[str], placed: Sequence[tuple[str, int]], goal: Goal, rng: Rng) -> Problem:
    """Write down the facts, as the published problems do; ids are numbered at random."""
    ids = iter(rng.permutation(len(receptacles) + len(placed)) + 10)
    names = [
        f"{kind.removesuffix('Basin')}_bar_{next(ids)}_bar_{kind}"
        if kind.endswith("Basin")
        else f"{kind}_bar_{next(ids)}"
        for kind in receptacles
    ]
    things = [f"{thing}_bar_{next(ids)}" for thing, _ in placed]
    # One receptacle in eight is at the place of the one before it.
    places: list[int] = []
    for _ in receptacles:
        places.append(places[-1] if places and rng.random() < 0.125 else len(places))
    types = {"agent1": "agent"}
    facts: list[Fact] = [("atlocation", "agent1", "loc_bar_start")]
    carriers, carried = (
        sorted(set(receptacles)),
        sorted({thing for kind in receptacles for thing in FITS[kind]}),
    )
    for name, kind, place in zip(names, receptacles, places, strict=True):
        facts += [("receptacletype", name, f"{kind}Type"), ("receptacleatlocation", name, f"loc_bar_{place}")]
        if kind in ALWAYS_CLOSED or (kind in SOMETIMES_CLOSED and rng.random() < 0.8):
            facts.append(("openable", name))
    for name, (thing, number) in zip(things, placed, strict=True):
        facts += [
            ("objecttype", name, f"{thing}Type"),
            ("inreceptacle", name, names[number]),
            ("objectatlocation", name, f"loc_bar_{places[number]}"),
        ]
        facts += [(prop, name) for prop, having in PROPERTIES.items() if thing in having]
        if any(thing in fits for fits in FITS.values()):
            facts.append(("pickupable", name))
    facts += [
        ("cancontain", f"{kind}Type", f"{thing}Type") for kind in carriers for thing in sorted(FITS[kind])
    ]
    types.update(dict.fromkeys((f"{kind}Type" for kind in carriers), "rtype"))
    kept = sorted({*carried, *(thing for thing, _ in placed), "Knife", "ButterKnife"})
    types.update(dict.fromkeys((f"{thing}Type" for thing in kept), "otype"))
    types.update(dict.fromkeys(names, "receptacle"))
    types.update(dict.fromkeys(things, "object"))
    types.update(
        dict.fromkeys(("loc_bar_start", *(f"loc_bar_{place}" for place in sorted(set(places)))), "location")
    )
    return Problem(
        {entity.lower(): kind for entity, kind in types.items()},
        tuple(tuple(word.lower() for word in fact) for fact in facts),
        goal,
    )
