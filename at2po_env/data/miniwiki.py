"""MiniWiki: procedural worlds of people, films, companies, cities and countries, with questions about them.

A world is a pure function of ``(seed, split)``. It holds one short passage per entity and answers unlimited
1- to 6-hop bridge questions and year comparisons. Names are two words of a shared inventory, and a
pair of words belongs either to training worlds or to test worlds, never to both: a policy that answers in a
test world has learnt to search, not the facts. With `namesakes`, a share of the entities bears the two words
of an entity of another kind in the other order: a search finds both pages, and only reading tells them apart.

This module knows nothing of environments, tools or retrieval indexes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np

from at2po_env.data.corpus import Passage
from at2po_env.data.tasks import Task
from at2po_env.errors import DataError

Split = Literal["train", "test"]

COUNTS = MappingProxyType({"person": 200, "film": 200, "company": 100, "city": 66, "country": 20})
"""Entities of each kind in one world (586 passages)."""

NUMBER_OF_TASKS = 1_000_000
"""Questions a task source exposes; they are computed when asked for, so the number costs nothing."""


class Relation(NamedTuple):
    """A fact that one passage states about its subject, and the two ways a question asks for it.

    Attributes:
        target: kind of the entity that the relation leads to.
        noun: phrase for the inside of a question, ``"the director of {x}"``.
        question: phrase for its outermost hop, ``"Who directed {x}?"``.
    """

    target: str
    noun: str
    question: str


RELATIONS: Mapping[str, Mapping[str, Relation]] = MappingProxyType(
    {
        "film": {
            "director": Relation("person", "the director of {x}", "Who directed {x}?"),
            "maker": Relation("company", "the maker of {x}", "Which company made {x}?"),
        },
        "person": {
            "birthplace": Relation("city", "the birthplace of {x}", "Where was {x} born?"),
            "employer": Relation("company", "the employer of {x}", "Which company employed {x}?"),
        },
        "company": {
            "founder": Relation("person", "the founder of {x}", "Who founded {x}?"),
            "seat": Relation("city", "the seat of {x}", "In which city is {x} based?"),
        },
        "city": {"country": Relation("country", "the country of {x}", "In which country is {x}?")},
        "country": {"capital": Relation("city", "the capital of {x}", "What is the capital of {x}?")},
    }
)

_PASSAGES = MappingProxyType(
    {
        "film": "The film {name} was directed by {director} and made by {maker} in {year}.",
        "person": "The person {name} was born in {birthplace} in {year} and employed by {employer}.",
        "company": "The company {name} was founded by {founder} in {year} and is based in {seat}.",
        "city": "The city {name} is in {country} and was founded in {year}.",
        "country": "The country {name} was founded in {year} and its capital is {capital}.",
    }
)
_COMPARISONS = MappingProxyType({"film": "Which film was made first", "person": "Who was born first"})


class Entity(NamedTuple):
    """One entity: its kind, name, founding / birth / release year, and relation -> name of another entity."""

    kind: str
    name: str
    year: int
    facts: Mapping[str, str]


@dataclass(frozen=True)
class World:
    """One procedural world: entities by name, in passage order, and the names of each kind."""

    seed: int
    split: Split
    entities: Mapping[str, Entity]
    members: Mapping[str, tuple[str, ...]]

    @property
    def passages(self) -> tuple[Passage, ...]:
        """One passage per entity; its title is the entity's name."""
        return tuple(
            Passage(str(row), entity.name, describe(entity))
            for row, entity in enumerate(self.entities.values())
        )

    def follow(self, name: str, chain: Sequence[str]) -> list[str]:
        """Names met on the way when ``chain`` of relations is followed from ``name``, both ends included."""
        names = [name]
        for relation in chain:
            names.append(self.entities[names[-1]].facts[relation])
        return names


def describe(entity: Entity) -> str:
    """Text of an entity's passage (a name never opens it, so that a tokenizer sees names in one form)."""
    return _PASSAGES[entity.kind].format(name=entity.name, year=entity.year, **entity.facts)


@lru_cache(maxsize=1)
def name_words() -> tuple[str, ...]:
    """The shared inventory: 200 capitalised, pronounceable two-syllable words, always the same."""
    rng = np.random.default_rng(20260104)
    words: dict[str, None] = {}
    while len(words) < 200:
        onsets, vowels = rng.choice(list("bdfgklmnprstvz"), 2), rng.choice(list("aeiou"), 2)
        coda = rng.choice(["", "l", "m", "n", "r", "s"])
        words[f"{onsets[0]}{vowels[0]}{onsets[1]}{vowels[1]}{coda}".capitalize()] = None
    return tuple(words)


def in_test_split(first: int, second: int) -> bool:
    """Whether the name made of inventory words ``first`` and ``second`` is a test name (one in five)."""
    return (first + 3 * second) % 5 == 0


def _draw_names(rng: np.random.Generator, split: Split, count: int) -> list[str]:
    words = name_words()
    names: dict[str, None] = {}
    while len(names) < count:
        first, second = (int(i) for i in rng.integers(len(words), size=2))
        if first != second and in_test_split(first, second) == (split == "test"):
            names[f"{words[first]} {words[second]}"] = None
    return list(names)


def _name_alike(rng: np.random.Generator, split: Split, names: list[str], count: int) -> list[str]:
    """Rename `count` entities in pairs of two kinds: the same two words, in either order."""
    if not count:  # and draw nothing: the world without namesakes stays what it was
        return names
    kinds = [kind for kind, members in COUNTS.items() for _ in range(members)]
    order = rng.permutation(len(names)).tolist()
    for _ in range(count // 2):
        entity = order.pop()
        other = next(number for number in reversed(order) if kinds[number] != kinds[entity])
        order.remove(other)
        while True:
            (name,) = _draw_names(rng, split, 1)
            first, second = name.split()
            exchanged = f"{second} {first}"
            in_test = in_test_split(name_words().index(second), name_words().index(first))
            if name not in names and exchanged not in names and in_test == (split == "test"):
                break
        names[entity], names[other] = name, exchanged
    return names


def make_world(seed: int, split: Split, *, namesakes: float = 0.0) -> World:
    """Draw a world: names, years and every relation, uniformly.

    Args:
        seed: world number, at least 0.
        split: which half of the names it uses.
        namesakes: share of the entities, at most a half, that share their two words with one of another kind.

    Raises:
        DataError: for a negative seed, an unknown split or a share that cannot be.
    """
    if not 0 <= namesakes <= 0.5:
        raise DataError(f"MiniWiki: namesakes={namesakes!r}, need a share of the entities in [0, 0.5]")
    if split not in ("train", "test") or seed < 0:
        raise DataError(
            f"MiniWiki world (seed={seed}, split={split!r}): need seed >= 0 and split 'train' or 'test'"
        )
    rng = np.random.default_rng([seed, 0 if split == "train" else 1])
    total = sum(COUNTS.values())
    names = iter(_name_alike(rng, split, _draw_names(rng, split, total), round(namesakes * total)))
    members = {kind: [next(names) for _ in range(count)] for kind, count in COUNTS.items()}

    def draw(kind: str) -> str:
        return members[kind][int(rng.integers(len(members[kind])))]

    entities = {
        name: Entity(
            kind,
            name,
            int(rng.integers(1900, 2000)),
            {key: draw(relation.target) for key, relation in RELATIONS[kind].items()},
        )
        for kind in COUNTS
        for name in members[kind]
    }
    members_by_kind = MappingProxyType({kind: tuple(names) for kind, names in members.items()})
    return World(seed, split, MappingProxyType(entities), members_by_kind)


def chains(hops: int) -> list[tuple[str, ...]]:
    """Every well-typed chain ``(kind, relation, ...)`` of ``hops`` relations, in a fixed order."""

    def extend(kind: str, left: int) -> Iterator[tuple[str, ...]]:
        if left == 0:
            yield ()
            return
        for key, relation in RELATIONS[kind].items():
            for rest in extend(relation.target, left - 1):
                yield (key, *rest)

    return [(kind, *chain) for kind in RELATIONS for chain in extend(kind, hops)]


def phrase(kind: str, chain: Sequence[str], name: str) -> str:
    """The question that asks where ``chain`` leads from ``name``."""
    text = name
    for position, key in enumerate(chain):
        relation = RELATIONS[kind][key]
        template = relation.question if position == len(chain) - 1 else relation.noun
        text, kind = template.format(x=text), relation.target
    return text


class MiniWikiTasks:
    """Questions over a set of worlds; question ``i`` is a pure function of the arguments and ``i``.

    Args:
        split: ``"train"`` or ``"test"``; the two share no name.
        worlds: number of worlds the questions are spread over.
        first_world: seed of the first; worlds are numbered from there.
        hops: which question types, in rotation: 1 to 6 hops, or ``"comparison"``.
        seed: draws the questions.
        namesakes: share of the entities that share their two words with one of another kind.

    Raises:
        DataError: for an empty or unknown ``hops`` or no world.
    """

    def __init__(
        self,
        split: Split = "train",
        *,
        worlds: int = 20,
        first_world: int = 0,
        hops: Sequence[int | str] = (1, 2),
        seed: int = 0,
        namesakes: float = 0.0,
    ) -> None:
        if worlds < 1:
            raise DataError(f"MiniWiki: worlds={worlds}, need at least 1")
        known = (1, 2, 3, 4, 5, 6, "comparison")
        if not hops or any(kind not in known for kind in hops):
            raise DataError(f"MiniWiki: hops={list(hops)!r}, need a non-empty choice of {list(known)}")
        self.split: Split = split
        self.hops = tuple(hops)
        self.seed = seed
        self.namesakes = namesakes
        self._worlds = tuple(make_world(first_world + i, split, namesakes=namesakes) for i in range(worlds))
        self._chains = {kind: chains(kind) for kind in self.hops if isinstance(kind, int)}

    def __len__(self) -> int:
        return NUMBER_OF_TASKS

    def __getitem__(self, index: int) -> Task:
        if not 0 <= index < len(self):
            raise IndexError(f"MiniWiki question {index}: need 0 <= index < {len(self)}")
        rng = np.random.default_rng([self.seed, index, self._worlds[0].seed, self.split == "test"])
        world = self._worlds[index % len(self._worlds)]
        hops = self.hops[index // len(self._worlds) % len(self.hops)]
        chain: list[str] = []
        if isinstance(hops, str):  # a comparison
            kind = ("film", "person")[int(rng.integers(2))]
            names = world.members[kind]
            while True:
                first, second = (world.entities[names[int(i)]] for i in rng.integers(len(names), size=2))
                if first.year != second.year:
                    break
            path = [first.name, second.name]
            question = f"{_COMPARISONS[kind]}, {first.name} or {second.name}?"
            answer = min(first, second, key=lambda entity: entity.year).name
        else:
            options = self._chains[hops]
            while True:
                kind, *chain = options[int(rng.integers(len(options)))]
                start = world.members[kind][int(rng.integers(len(world.members[kind])))]
                path = world.follow(start, chain)
                if len(set(path)) == len(path):  # else it returns to itself and asks for what it has told
                    break
            question, answer = phrase(kind, chain, start), path[-1]
        metadata = {"world": world.seed, "hops": hops, "chain": chain, "path": path}
        return Task(f"miniwiki-{self.split}-{self.seed}-{index}", question, (answer,), metadata)

    def by_id(self, task_id: str) -> Task:
        """The question with this id; ``KeyError`` for an id that this source did not make."""
        index = task_id.rpartition("-")[2]
        if index.isascii() and index.isdigit() and int(index) < len(self):
            task = self[int(index)]
            if task.id == task_id:
                return task
        raise KeyError(f"no MiniWiki question {task_id!r}; ids look like {self[0].id!r}")

    def world(self, task: Task) -> World:
        """The world that a question is about."""
        return self._worlds[int(task.metadata["world"]) - self._worlds[0].seed]
