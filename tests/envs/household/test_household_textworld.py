"""The household step by step beside TextWorld's PDDL engine: `make test-worlds` installs it and runs this.

Every walk plays one game in both, with the published domain and grammar of the distribution `alfworld` or
with those that the generator writes, and compares what is said, the possible commands, reward and end.
"""

from __future__ import annotations

import importlib.resources
import json
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from at2po_envs.household.expert import plan
from at2po_envs.household.game import Game, Household
from at2po_envs.household.games import game_data, generated_game, read_game, write_game
from at2po_envs.household.pddl import FAMILIES
from at2po_envs.household.published import Words
from at2po_envs.household.world import first_words, is_won, obey, possible_commands

for module in ("fast_downward", "textworld", "alfworld"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(module, reason=f"{module} is not installed; make test-worlds installs it")

pytestmark = pytest.mark.filterwarnings("ignore")  # of the engine and what it imports
WALKS, STEPS = 17, 15
OLD = Words(puts=True, arrives_at_place=True, helps=False)
HOSTILE = (
    "",
    "go to",
    "take",
    "dance",
    "go to sofa 99",
    "take  from ",
    "look around",
    "MOVE a TO b",
    "help me",
    "🙂",
)


def reference(data: dict[str, Any]) -> Any:
    arguments = sys.argv
    from helpers.textworld_household import Reference  # it imports the engine

    try:
        return Reference(data)
    finally:
        sys.argv = arguments  # the planner's translation replaces them


def compare(moment: Any, said: str, state: Household, command: str) -> None:
    assert moment.said == said, command
    assert moment.commands == possible_commands(state), command
    assert moment.done == is_won(state), command
    assert moment.reward == float(is_won(state)), command


def walk(engine: Any, game: Game, rng: random.Random, verbs: set[str]) -> int:
    """Play a walk in both, and return whether it reached the goal."""
    state, moment = game.start, engine.reset()
    compare(moment, first_words(state), state, "(reset)")
    # Every third walk follows the expert most of the way, so that goals are reached and left.
    faithful = 0.8 if rng.random() < 0.34 else 0.0
    for _ in range(STEPS):
        possible = moment.commands
        if rng.random() < 0.65:  # most commands are ways to go; the others are more telling
            possible = [command for command in possible if not command.startswith("go to ")]
        command = rng.choice(possible)
        if rng.random() < faithful:
            command = (plan(state) or [command])[0]
        elif rng.random() < 0.03:
            command = rng.choice(HOSTILE)
        step, moment = obey(state, command), engine.step(command)
        state = step.state
        compare(moment, step.said, state, command)
        if step.possible:
            verbs.add(command.split()[0])
        if moment.done:
            return 1
    return 0


def test_204_random_walks_are_the_same_in_both(tmp_path: Path) -> None:
    package = importlib.resources.files("alfworld") / "data"
    domain, grammar = (
        (package / "alfred.pddl").read_text("utf-8"),
        (package / "alfred.twl2").read_text("utf-8"),
    )
    verbs: set[str] = set()
    walks = won = 0
    for number, family in enumerate(FAMILIES * 2):
        words = OLD if number in (3, 8) else Words()
        size = "full" if number % 2 else "small"
        game = generated_game(size, "train", family, 1000 + number, words)
        data = game_data(game)
        if words != OLD and number < 6:  # the published texts, word for word
            data |= {"pddl_domain": domain, "grammar": grammar.replace("UNKNOWN GOAL", game.task)}
        file = tmp_path / str(number) / "game.tw-pddl"
        file.parent.mkdir()
        file.write_text(json.dumps(data), "utf-8")
        game = read_game(file)
        engine = reference(json.loads(file.read_text("utf-8")))
        rng = random.Random(number)
        for _ in range(WALKS):
            won += walk(engine, game, rng, verbs)
            walks += 1
    assert walks == 204
    assert won >= 10
    assert verbs >= {
        *("go", "take", "move", "put", "open", "close", "clean", "heat", "cool"),
        *("use", "slice", "examine", "look", "inventory", "help"),
    }


def test_the_comparison_notices_a_wrong_word_and_a_missing_command() -> None:
    game = generated_game("small", "train", FAMILIES[0], 0, Words())
    moment = reference(game_data(game)).reset()
    compare(moment, first_words(game.start), game.start, "")
    with pytest.raises(AssertionError):
        compare(moment, first_words(game.start) + " ", game.start, "")
    with pytest.raises(AssertionError):
        compare(moment._replace(commands=moment.commands[1:]), first_words(game.start), game.start, "")


def test_walkthroughs_that_the_generator_writes_win_in_the_engine(tmp_path: Path) -> None:
    for family in FAMILIES:
        write_game(generated_game("small", "eval", family, 5, Words()), tmp_path / f"{family}.tw-pddl")
        data = json.loads((tmp_path / f"{family}.tw-pddl").read_text("utf-8"))
        engine = reference(data)
        engine.reset()
        ends = [engine.step(command).done for command in data["walkthrough"]]
        assert ends == [False] * (len(ends) - 1) + [True]
