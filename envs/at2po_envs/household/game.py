"""A game of the household, and one moment of it.

A `Game` is what never changes during an episode. A `Household` is one moment: an immutable value, so a fork
only hands it on. Objects, receptacles and places are numbers in the order of their ids, which is the order in
which the original lists them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from at2po_env.errors import DataError
from at2po_env.forking import Shared
from at2po_envs.household.pddl import Goal, Problem
from at2po_envs.household.published import Words

NOWHERE = -1
_SLICERS = ("knifetype", "butterknifetype")
SERVERS = {"clean": "sinkbasintype", "heat": "microwavetype", "cool": "fridgetype"}


class Household(NamedTuple):
    """One moment of a game. Sets of objects or receptacles are integers, bit N for number N.

    Attributes:
        game: What never changes.
        at: The place of the agent.
        holding: The object in its hand, or -1.
        contents: Of each receptacle, its objects in order.
        lying: Pairs (object, place): the object is at the place, in whatever receptacle.
        taken: Pairs (object, receptacle): the object was taken from there and not put back.
        opened: Receptacles that are open.
        clean: Objects that were cleaned; likewise `hot`, `cool`, `toggled` and `sliced`.
    """

    game: Game
    at: int
    holding: int
    contents: tuple[tuple[int, ...], ...]
    lying: frozenset[tuple[int, int]]
    taken: frozenset[tuple[int, int]]
    opened: int = 0
    clean: int = 0
    hot: int = 0
    cool: int = 0
    toggled: int = 0
    sliced: int = 0


class Game(Shared):
    """A game: its entities, what never changes about them, the goal, and the first moment.

    Args:
        problem: The problem.
        words: The sentences of this game.
        task: The task in words.
        name: What identifies the game; in errors also its file.

    Raises:
        DataError: The facts describe no household that can be played.
    """

    def __init__(self, problem: Problem, words: Words, task: str, name: str) -> None:
        self.problem, self.words, self.task, self.name = problem, words, task, name
        self.goal: Goal = problem.goal
        facts: dict[str, list[tuple[str, ...]]] = {}
        for predicate, *arguments in problem.facts:
            facts.setdefault(predicate, []).append(tuple(arguments))
        # Entities are those that stand in a fact, and so are the numbers in their names.
        present = sorted({entity for _, *arguments in problem.facts for entity in arguments})
        named = names_of(present)
        kinds: dict[str, list[str]] = {}
        for entity in present:
            kinds.setdefault(problem.types[entity], []).append(entity)
        self.objects, self.receptacles = tuple(kinds.get("object", ())), tuple(kinds.get("receptacle", ()))
        self.places = tuple(kinds.get("location", ()))
        self.object_names = tuple(named[entity] for entity in self.objects)
        self.receptacle_names = tuple(named[entity] for entity in self.receptacles)
        self.place_names = tuple(named[entity] for entity in self.places)
        self.object_at = {named[entity]: number for number, entity in enumerate(self.objects)}
        self.receptacle_at = {named[entity]: number for number, entity in enumerate(self.receptacles)}
        numbers = [
            {entity: number for number, entity in enumerate(entities)}
            for entities in (self.objects, self.receptacles, self.places)
        ]
        self._read_lasting(facts, numbers)
        self.start = self._read_start(facts, numbers)

    def _read_lasting(
        self, facts: Mapping[str, list[tuple[str, ...]]], numbers: Sequence[Mapping[str, int]]
    ) -> None:
        """Read what never changes; `numbers` are those of objects, receptacles and places."""
        objects, receptacles, places = numbers
        of = partial(_set_of, facts, objects)
        self.pickupable, self.sliceable, self.toggleable = of("pickupable"), of("sliceable"), of("toggleable")
        self.receptive = of("isreceptacleobject")
        self.openable = _set_of(facts, receptacles, "openable")
        self.fit_for = {"clean": of("cleanable"), "heat": of("heatable"), "cool": of("coolable")}
        where = [NOWHERE] * len(receptacles)
        for receptacle, place in facts.get("receptacleatlocation", ()):
            if where[receptacles[receptacle]] != NOWHERE:
                raise DataError(f"{self.name}: {receptacle} is at two places. Expected one")
            where[receptacles[receptacle]] = places[place]
        self.place_of = tuple(where)
        self.here = tuple(
            tuple(number for number, place in enumerate(where) if place == here)
            for here in range(len(places))
        )
        self.types = _pairs(facts.get("objecttype", ()), objects)
        self.receptacle_types = _pairs(facts.get("receptacletype", ()), receptacles)
        fits = {(kind, what) for kind, what in facts.get("cancontain", ())}
        self.accepts = tuple(
            sum(
                1 << number
                for number, types in enumerate(self.types)
                if any((kind, what) in fits for kind in kinds for what in types)
            )
            for kinds in self.receptacle_types
        )
        self.serves = {
            verb: tuple(kind in kinds for kinds in self.receptacle_types) for verb, kind in SERVERS.items()
        }
        self.slices = tuple(any(kind in _SLICERS for kind in types) for types in self.types)
        self.inner = _inside(facts.get("inreceptacleobject", ()), objects, self.name)
        self.goal_objects = tuple(n for n, types in enumerate(self.types) if self.goal.object_type in types)
        self.goal_targets = tuple(
            number
            for number, types in enumerate(
                self.types if self.goal.family == "look_at_obj_in_light" else self.receptacle_types
            )
            if self.goal.target_type in types
        )
        # The commands that depend on the place alone.
        everywhere = ["inventory", "look", *(["help"] if self.words.helps else [])]
        self.routine = tuple(
            (
                *everywhere,
                *[
                    f"go to {self.receptacle_names[number]}"
                    for number, place in enumerate(where)
                    if place not in (NOWHERE, here)
                ],
                *[f"examine {self.receptacle_names[number]}" for number in self.here[here]],
            )
            for here in range(len(places))
        )

    def _read_start(
        self, facts: Mapping[str, list[tuple[str, ...]]], numbers: Sequence[Mapping[str, int]]
    ) -> Household:
        """Read the first moment; `numbers` are those of objects, receptacles and places."""
        objects, receptacles, places = numbers
        at, holds = facts.get("atlocation", []), facts.get("holds", [])
        if len(at) != 1 or len(holds) > 1 or len(holds) != len(facts.get("holdsany", [])):
            raise DataError(
                f"{self.name}: agents are at {len(at)} places and hold {len(holds)} objects. Expected one "
                "agent at one place, with at most one object (holds, and holdsAny beside it)"
            )

        of = partial(_set_of, facts, objects)
        contents: list[set[int]] = [set() for _ in self.receptacles]
        for thing, receptacle in facts.get("inreceptacle", ()):
            contents[receptacles[receptacle]].add(objects[thing])
        return Household(
            game=self,
            at=places[at[0][1]],
            holding=objects[holds[0][1]] if holds else NOWHERE,
            contents=tuple(tuple(sorted(inside)) for inside in contents),
            lying=frozenset((objects[o], places[place]) for o, place in facts.get("objectatlocation", ())),
            taken=frozenset(),
            opened=_set_of(facts, receptacles, "opened"),
            clean=of("isclean"),
            hot=of("ishot"),
            cool=of("iscool"),
            toggled=of("istoggled"),
            sliced=of("issliced"),
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Game):
            return NotImplemented
        return self is other or (self.name, self.words, self.problem) == (
            other.name,
            other.words,
            other.problem,
        )

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return f"Game({self.name!r})"


def names_of(entities: Sequence[str]) -> dict[str, str]:
    """Name entities as the original does: "apple 2".

    The name is the id up to "_bar_", with "basin" after it if that stands anywhere in the id. Ids are counted
    downwards in their order: of three cabinets the first is cabinet 3.

    Args:
        entities: Ids, sorted.
    """
    plain = {
        entity: entity.split("_bar_", 1)[0] + ("basin" if "basin" in entity else "")
        for entity in entities
        if "_bar_" in entity
    }
    left = Counter(plain.values())
    named = {}
    for entity in entities:
        if entity not in plain:
            named[entity] = f"{entity} "
            continue
        named[entity] = f"{plain[entity]} {left[plain[entity]]}"
        left[plain[entity]] -= 1
    return named


def _set_of(facts: Mapping[str, list[tuple[str, ...]]], numbers: Mapping[str, int], predicate: str) -> int:
    """Return the entities of which a predicate holds: bit N for number N."""
    return sum(1 << numbers[entity] for (entity,) in set(facts.get(predicate, ())))


def _pairs(facts: Iterable[tuple[str, ...]], numbers: Mapping[str, int]) -> tuple[frozenset[str], ...]:
    found: list[set[str]] = [set() for _ in numbers]
    for entity, kind in facts:
        found[numbers[entity]].add(kind)
    return tuple(frozenset(kinds) for kinds in found)


def _inside(
    facts: Iterable[tuple[str, ...]], objects: Mapping[str, int], name: str
) -> dict[int, tuple[int, ...]]:
    """Return what is inside of objects, and refuse an object that is within itself."""
    inside: dict[int, tuple[int, ...]] = {}
    for inner, outer in sorted(facts):
        inside[objects[outer]] = (*inside.get(objects[outer], ()), objects[inner])
    for first in inside:
        reached, edge = set[int](), [first]
        while edge:
            for thing in inside.get(edge.pop(), ()):
                if thing == first:
                    raise DataError(f"{name}: {list(objects)[first]} is within itself (inReceptacleObject)")
                if thing not in reached:
                    reached.add(thing)
                    edge.append(thing)
    return inside
