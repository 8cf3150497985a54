"""Real transcripts of the original, replayed against a game rebuilt from what each of them shows.

The transcripts (prompts of ReAct, MIT licence) leave "You arrive at loc N." out and were edited by hand in a
few places, which are listed here.
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple

import pytest
from at2po_envs.household.game import Game
from at2po_envs.household.pddl import Fact, Goal, Problem
from at2po_envs.household.published import Words
from at2po_envs.household.rooms import FITS, PROPERTIES
from at2po_envs.household.world import first_words, is_won, obey
from helpers.paths import REAL_DATA

FILE = REAL_DATA / "alfworld/react_transcripts.json"
pytestmark = pytest.mark.skipif(not FILE.is_file(), reason=f"{FILE} is not there")
WORDS = Words(puts=True, arrives_at_place=True, helps=False)
GOALS = [
    (r"put two (\w+) in (\w+)|find two (\w+) and put them in (\w+)", "pick_two_obj_and_place"),
    (r"put a clean (\w+) in (\w+)|clean some (\w+) and put it in (\w+)", "pick_clean_then_place_in_recep"),
    (r"put a hot (\w+) in (\w+)|heat some (\w+) and put it in (\w+)", "pick_heat_then_place_in_recep"),
    (r"put a cool (\w+) in (\w+)|cool some (\w+) and put it in (\w+)", "pick_cool_then_place_in_recep"),
    (r"look at (\w+) under the (\w+)|examine the (\w+) with the (\w+)", "look_at_obj_in_light"),
    (r"put (?:a|some) (\w+) (?:in|on) (\w+)|find some (\w+) and put it in (\w+)", "pick_and_place_simple"),
]
_NO_AND = ("go to cabinet 1", "On the cabinet 1, you see a cloth 1, a soapbar 1, and a soapbottle 1.")
_NOT_THERE = ("open fridge 1", "Nothing happens.")
EDITED = {
    "react_put_0": [_NO_AND],  # its "and" is missing
    "act_put_0": [_NO_AND],
    "react_heat_0": [_NOT_THERE],  # its "go to fridge 1" is missing
    "act_heat_0": [_NOT_THERE],
    # A thought stands between command and observation.
    "react_cool_0": [("take pan 1 from stoveburner 3", "You pick up the pan 1 from the stoveburner 3.")],
}
"""Command and original answer of each turn that reads otherwise in a transcript."""
ITEM = re.compile(r"(?:and )?a (\w+ \d+)")


class Transcript(NamedTuple):
    room: str
    task: str
    turns: list[tuple[str, str]]


def read(text: str) -> Transcript:
    """Read the room, the task, and pairs of command and observation; thoughts are no commands."""
    lines = [line.strip() for line in text.strip().split("\n")]
    turns = []
    for line, answer in zip(lines[2:], [*lines[3:], ""], strict=True):
        if line.startswith(">") and not line.startswith("> think"):
            turns.append((line[1:].strip(), answer))
    return Transcript(lines[0], lines[1].removeprefix("Your task is to: ").removesuffix("."), turns)


def rebuild(transcript: Transcript, name: str) -> Game:
    """Build the game that a transcript shows: what is first seen in a receptacle was there."""
    contents: dict[str, list[str]] = {}
    closable: set[str] = set()
    together: list[list[str]] = []
    carried: set[str] = set()
    for command, seen in transcript.turns:
        found = re.search(r"(?:On|The) (?:the )?(\w+ \d+)(?:,| is (?:closed|open))", seen)
        if taken := re.fullmatch(r"take (\w+ \d+) from .*", command):
            carried.add(taken[1])
        if faced := re.match(r"You are facing the (.*)\. Next", seen):
            together.append(re.findall(r"\w+ \d+", faced[1]))
        if found is None:
            continue
        if f"The {found[1]} is" in seen:
            closable.add(found[1])
        if "you see" in seen and found[1] not in contents:
            contents[found[1]] = [
                item for item in ITEM.findall(seen.split("you see")[1]) if item not in carried
            ]
    described = Description()
    for number, shown in enumerate(ITEM.findall(transcript.room)):
        with_others = [f"loc_bar_of_{min(group).replace(' ', '_')}" for group in together if shown in group]
        described.place(shown, [*with_others, f"loc_bar_{number}"][0], closable=shown in closable)
    for home, things in contents.items():
        for shown in things:
            described.lay(shown, home)
    facts = tuple(dict.fromkeys(described.facts))
    return Game(Problem(described.types, facts, goal_of(transcript.task)), WORDS, transcript.task, name)


SPELLED = {kind.lower(): kind for kind in set(FITS).union(*FITS.values(), *PROPERTIES.values())}


class Description:
    """The facts of a game, collected from the names that are shown."""

    def __init__(self) -> None:
        self.types: dict[str, str] = {"agent1": "agent", "loc_bar_start": "location"}
        self.facts: list[Fact] = [("atlocation", "agent1", "loc_bar_start")]
        self.ids: dict[str, str] = {}

    def enter(self, shown: str, kind: str) -> str:
        """Enter "apple 2": ids count downwards, as names do; lower numbers stand for what is not seen."""
        plain, number = shown.split()
        typed = f"{plain}type"
        self.types[typed] = "rtype" if kind == "receptacle" else "otype"
        for other in range(1, int(number) + 1):
            basin = "_basin" if plain.endswith("basin") else ""
            entity = f"{plain.removesuffix('basin')}_bar_{99 - other}{basin}"
            if entity not in self.types:
                self.types[entity] = kind
                self.facts.append((f"{kind}type", entity, typed))
        self.ids[shown] = entity
        return entity

    def place(self, receptacle: str, place: str, *, closable: bool) -> None:
        entity = self.enter(receptacle, "receptacle")
        self.types[place] = "location"
        self.facts.append(("receptacleatlocation", entity, place))
        if closable:
            self.facts.append(("openable", entity))
        kind = receptacle.split()[0]
        for fits in sorted(FITS.get(SPELLED.get(kind, ""), ())):
            self.types.setdefault(f"{fits.lower()}type", "otype")
            self.facts.append(("cancontain", f"{kind}type", f"{fits.lower()}type"))

    def lay(self, thing: str, receptacle: str) -> None:
        entity = self.enter(thing, "object")
        self.facts += [("inreceptacle", entity, self.ids[receptacle]), ("pickupable", entity)]
        kind = SPELLED.get(thing.split()[0], "")
        self.facts += [(prop, entity) for prop, having in PROPERTIES.items() if kind in having]


def goal_of(task: str) -> Goal:
    for pattern, family in GOALS:
        if asked := re.fullmatch(pattern, task):
            thing, target = [word for word in asked.groups() if word]
            return Goal(family, f"{thing}type", f"{target}type")
    raise AssertionError(f"{task!r} is of no family")


def transcripts() -> dict[str, str]:
    found: dict[str, str] = json.loads(FILE.read_text("utf-8")) if FILE.is_file() else {}
    return found


@pytest.mark.parametrize("name", transcripts())
def test_a_transcript_is_replayed_word_for_word(name: str) -> None:
    transcript = read(transcripts()[name])
    game = rebuild(transcript, name)
    state = game.start
    assert first_words(state) == (
        f"-= Welcome to TextWorld, ALFRED! =-\n\n{transcript.room}\n\nYour task is to: {transcript.task}."
    )
    differences = []
    for command, shown in transcript.turns:
        step = obey(state, command)
        said = re.sub(r"^You arrive at loc \d+\. ", "", step.said)
        if said != shown:
            differences.append((command, said))
        state = step.state
    assert differences == EDITED.get(name, [])
    assert is_won(state)


def test_there_are_36_transcripts_of_all_families() -> None:
    tasks = {name: read(text).task for name, text in transcripts().items()}
    assert len(tasks) == 36
    families = {family for task in tasks.values() for pattern, family in GOALS if re.fullmatch(pattern, task)}
    assert len(families) == 6


def test_a_wrong_word_would_be_noticed() -> None:
    transcript = read(transcripts()["react_put_1"])
    state = rebuild(transcript, "x").start
    for command, shown in transcript.turns:
        state, said, _ = obey(state, command)
        assert said.endswith(shown)
        assert not said.endswith(shown.replace("1", "7"))
