"""Game files and generated games: what is read, what is refused by naming the file, and the expert."""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from at2po_envs.household.expert import plan
from at2po_envs.household.game import Game, names_of
from at2po_envs.household.games import (
    GameFiles,
    GeneratedGames,
    game_data,
    generated_game,
    read_game,
    write_game,
)
from at2po_envs.household.pddl import FAMILIES, Goal, Problem, read_problem, write_problem
from at2po_envs.household.published import Words
from at2po_envs.household.rooms import FITS, PROPERTIES
from at2po_envs.household.world import conceivable_commands, first_words, is_won, obey, possible_commands
from helpers.fake_hub import serving

from at2po_env.data import catalog
from at2po_env.data.download import get
from at2po_env.errors import DataError

CUP_TO_BOX = Goal("pick_and_place_simple", "cuptype", "boxtype")
OLD = Words(puts=True, arrives_at_place=True, helps=False)


def written(folder: Path, change: Callable[[dict[str, Any]], None] = lambda _: None) -> Path:
    """Write a generated game as a file, after `change`."""
    data = game_data(generated_game("small", "train", FAMILIES[3], 0, Words()))
    change(data)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "game.tw-pddl").write_text(json.dumps(data), "utf-8")
    return folder / "game.tw-pddl"


def replace(key: str, old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        assert old in data[key]
        data[key] = data[key].replace(old, new)

    return change


def tiny(goal: Goal | None = None, *facts: tuple[str, ...]) -> Problem:
    """A cup and a mug on a table, and a chest and a shelf at one place; see the facts."""
    types = {
        **{"agent1": "agent", "cup_bar_1": "object", "mug_bar_1": "object", "knife_bar_1": "object"},
        **{"table_bar_1": "receptacle", "chest_bar_1": "receptacle", "shelf_bar_1": "receptacle"},
        **{"loc_bar_0": "location", "loc_bar_1": "location", "loc_bar_2": "location"},
        **{
            "cuptype": "otype",
            "mugtype": "otype",
            "knifetype": "otype",
            "boxtype": "rtype",
            "tabletype": "rtype",
        },
    }
    known: list[tuple[str, ...]] = [
        ("atlocation", "agent1", "loc_bar_0"),
        ("receptacleatlocation", "table_bar_1", "loc_bar_1"),
        ("receptacleatlocation", "chest_bar_1", "loc_bar_2"),
        ("receptacleatlocation", "shelf_bar_1", "loc_bar_2"),
        ("receptacletype", "table_bar_1", "tabletype"),
        ("receptacletype", "chest_bar_1", "boxtype"),
        ("receptacletype", "shelf_bar_1", "boxtype"),
        ("openable", "chest_bar_1"),
        ("objecttype", "cup_bar_1", "cuptype"),
        ("objecttype", "mug_bar_1", "mugtype"),
        ("objecttype", "knife_bar_1", "knifetype"),
        ("cancontain", "boxtype", "cuptype"),
        ("cancontain", "tabletype", "cuptype"),
        ("cancontain", "boxtype", "mugtype"),
        ("pickupable", "cup_bar_1"),
        ("pickupable", "mug_bar_1"),
        ("pickupable", "knife_bar_1"),
        ("sliceable", "cup_bar_1"),
        ("inreceptacle", "cup_bar_1", "table_bar_1"),
        ("inreceptacle", "mug_bar_1", "chest_bar_1"),
        ("inreceptacle", "knife_bar_1", "table_bar_1"),
        ("objectatlocation", "cup_bar_1", "loc_bar_1"),
        ("objectatlocation", "mug_bar_1", "loc_bar_2"),
    ]
    return Problem(types, (*known, *facts), goal or CUP_TO_BOX)


def played(problem: Problem, *commands: str) -> list[str]:
    state = Game(problem, Words(), "a task", "tiny").start
    said = []
    for command in commands:
        state, answer, _ = obey(state, command)
        said.append(answer)
    return said


def test_a_game_goes_through_its_file(tmp_path: Path) -> None:
    for words in (Words(), OLD):
        game = generated_game("full", "train", FAMILIES[5], 7, words)
        write_game(game, tmp_path / "x/game.tw-pddl")
        read = read_game(tmp_path / "x/game.tw-pddl", game.name)
        read_game.cache_clear()
        assert read == game
        assert first_words(read.start) == first_words(game.start)
    data = json.loads((tmp_path / "x/game.tw-pddl").read_text())
    assert data["solvable"] is True
    state = game.start
    for command in data["walkthrough"]:
        assert not is_won(state)
        state = obey(state, command).state
    assert is_won(state)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_goal_is_read_as_it_is_written(family: str) -> None:
    problem = tiny(Goal(family, "cuptype", "boxtype"))
    assert read_problem(write_problem(problem), "x") == problem


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (replace("pddl_problem", "(:goal", ";"), "brackets|open brackets|no :goal"),
        (replace("pddl_problem", "(:init", "(:begin"), "no :init"),
        (
            replace("pddl_problem", "(atlocation agent1", "(teleported agent1"),
            "unknown predicate 'teleported'",
        ),
        (replace("pddl_problem", "(atlocation agent1", "(atlocation agent9"), "undeclared"),
        (replace("pddl_problem", "agent1 - agent", "agent1 - robot"), "type 'robot'"),
        (replace("pddl_problem", "(ishot ?o)", "(isclean ?o)"), "goal is of no family"),
        (replace("pddl_problem", "(exists", "(forall"), "goal is of no family"),
        (replace("pddl_problem", "(atlocation agent1 loc_bar_start)", ""), "agents are at 0 places"),
        (replace("pddl_problem", "microwavetype)", "fridgetype)"), "cannot be solved"),
        (replace("pddl_domain", "(not (holdsAny ?a))", "(holdsAny ?a)"), "differs from the published"),
        (replace("pddl_domain", ":action help", ":action dance"), "action 'dance'"),
        (
            replace("pddl_domain", "(:action CoolObject", ";(:action CoolObject\n(:x"),
            "'coolobject'.*is missing",
        ),
        (replace("grammar", "You pick up", "You grab"), "'PickupObject.feedback'.*You grab"),
        (replace("grammar", 'template :: "take', 'template :: "grab'), "command 'PickupObject'"),
        (replace("grammar", "Your task is to", "Do"), "names no task"),
        (replace("grammar", '"intro"', 'intro"'), "grammar cannot be read"),
        (lambda data: data.pop("grammar"), "has no grammar"),
        (lambda data: data.update(pddl_problem=[1]), "has no pddl_problem"),
        (lambda data: data.update(pddl_problem="(" * 100_000), "brackets"),
        (lambda data: data.update(pddl_problem=data["pddl_problem"][:-300]), "it is cut"),
    ],
)
def test_a_game_that_cannot_be_played_is_one_error_that_names_the_file(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], fault: str
) -> None:
    file = written(tmp_path / "bad", change)
    env = gymnasium.make("at2po/Household-v0", dataset=str(tmp_path))
    with pytest.raises(DataError, match=fault) as caught:
        env.reset(seed=0)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe", b'"text"', b"[" * 200_000])
def test_a_file_that_is_no_game_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "game.tw-pddl").write_bytes(content)
    with pytest.raises(DataError, match=r"game\.tw-pddl"):
        GameFiles(tmp_path)[0]


def test_an_object_within_itself_is_refused() -> None:
    inner = ("inreceptacleobject", "cup_bar_1", "mug_bar_1")
    Game(tiny(None, inner), Words(), "t", "x")
    cyclic = tiny(None, inner, ("inreceptacleobject", "mug_bar_1", "cup_bar_1"))
    with pytest.raises(DataError, match="within itself"):
        Game(cyclic, Words(), "t", "x")


def test_a_receptacle_at_two_places_is_refused() -> None:
    twice = tiny(None, ("receptacleatlocation", "chest_bar_1", "loc_bar_1"))
    with pytest.raises(DataError, match="at two places"):
        Game(twice, Words(), "t", "x")


def test_names_count_downwards_in_the_order_of_ids() -> None:
    ids = ["apple_bar_1", "apple_bar_2", "cd_bar_9", "knifetype", "sink_bar_1_bar_sinkbasin"]
    assert names_of(ids) == {
        "apple_bar_1": "apple 2",
        "apple_bar_2": "apple 1",
        "cd_bar_9": "cd 1",
        "knifetype": "knifetype ",
        "sink_bar_1_bar_sinkbasin": "sinkbasin 1",
    }


def test_peculiarities_of_the_original() -> None:
    # The command `look` sees nothing from the first spot; a second receptacle at the place cannot be gone to.
    assert played(tiny(), "look", "go to chest 1", "go to shelf 1", "look") == [
        "You are in the middle of a room. Looking quickly around you, you see nothing.",
        "You arrive at chest 1. The chest 1 is closed.",
        "Nothing happens.",
        "You are facing the chest 1, and shelf 1. Next to it, you see nothing.",
    ]
    # What was moved between two receptacles of a place lies next to them; back where it was, it does not.
    moved = ("go to chest 1", "open chest 1", "take mug 1 from chest 1", "move mug 1 to shelf 1", "look")
    assert played(tiny(), *moved)[-1].endswith("Next to it, you see a mug 1.")
    back = (*moved[:-1], "take mug 1 from shelf 1", "move mug 1 to chest 1", "look")
    assert played(tiny(), *back)[-1].endswith("Next to it, you see a mug 1.")  # taken from the shelf, too
    assert played(tiny(), *moved[:3], "move mug 1 to chest 1", "look")[-1].endswith("you see nothing.")
    # Only what is held can be examined; a table that takes no mug refuses it; a knife slices what lies here.
    assert played(tiny(), "go to table 1", "examine cup 1", "take cup 1 from table 1", "examine cup 1") == [
        "You arrive at table 1. On the table 1, you see a cup 1, and a knife 1.",
        "Nothing happens.",
        "You pick up the cup 1 from the table 1.",
        "There's nothing special about cup 1.",
    ]
    assert played(tiny(), *moved[:3], "go to table 1", "move mug 1 to table 1")[-1] == "Nothing happens."
    assert played(tiny(), "go to table 1", "take knife 1 from table 1", "slice cup 1 with knife 1")[-1] == (
        "You sliced the cup 1 with the knife 1."
    )


def test_every_possible_command_is_possible_and_no_other_is() -> None:
    rng = random.Random(4)
    for number in range(6):
        state = generated_game("full", "train", FAMILIES[number], 50 + number, Words()).start
        seen = set(possible_commands(state))
        for _ in range(60):
            possible = possible_commands(state)
            assert list(possible) == sorted(set(possible))
            assert {command for command in seen | set(possible) if obey(state, command).possible} == set(
                possible
            )
            seen |= set(possible)
            assert set(possible) <= set(conceivable_commands(state.game))
            quiet = [command for command in possible if not command.startswith("go")]
            state = obey(state, rng.choice(quiet if rng.random() < 0.6 else possible)).state


def test_the_expert_solves_every_family_from_anywhere() -> None:
    rng = random.Random(1)
    for family in FAMILIES:
        for number in range(8):
            state = generated_game("full", "train", family, number, Words()).start
            for _ in range(30):  # a detour that may pick up the wrong thing, open, heat, cool
                state = obey(state, rng.choice(possible_commands(state))).state
            commands = plan(state)
            assert commands is not None
            for command in commands:
                assert not is_won(state)
                step = obey(state, command)
                assert step.possible
                state = step.state
            assert is_won(state)


def test_the_expert_finds_the_shortest_plan_of_a_small_game() -> None:
    game = Game(tiny(), Words(), "t", "x")
    # The shelf stands open; the chest would have to be opened first.
    assert plan(game.start) == [
        "go to table 1",
        "take cup 1 from table 1",
        "go to shelf 1",
        "move cup 1 to shelf 1",
    ]
    assert plan(Game(tiny(CUP_TO_BOX._replace(target_type="sofatype")), Words(), "t", "x").start) is None


def test_the_expert_leaves_alone_what_stands_nowhere() -> None:
    two = CUP_TO_BOX._replace(family="pick_two_obj_and_place")
    cups = [
        *[(fact, "cup_bar_2", *more) for fact, *more in [("objecttype", "cuptype"), ("pickupable",)]],
        *[("inreceptacle", cup, "attic_bar_1") for cup in ("cup_bar_1", "cup_bar_2")],
    ]
    problem = tiny(two, *cups, ("inreceptacle", "cup_bar_2", "table_bar_1"))
    problem = problem._replace(types={**problem.types, "cup_bar_2": "object", "attic_bar_1": "receptacle"})
    commands = plan(Game(problem, Words(), "t", "x").start)
    assert commands is not None
    assert not [command for command in commands if "attic" in command]


def test_generated_rooms_obey_the_lists() -> None:
    games = GeneratedGames()
    for index in range(120):
        game = games.game(games[index].id)
        start = game.start
        kinds = {name.lower(): name for name in set(FITS).union(*FITS.values(), *PROPERTIES.values())}
        for receptacle, inside in enumerate(start.contents):
            kind = kinds[game.receptacle_names[receptacle].split()[0]]
            for thing in inside:
                name = game.object_names[thing].split()[0]
                assert kinds.get(name, name) in FITS[kind] or not game.pickupable >> thing & 1
        assert not is_won(start)
        assert sum(map(len, start.contents)) == len(game.objects)


def test_a_folder_of_published_games(tmp_path: Path) -> None:
    root = tmp_path / "json_2.1.1"
    written(root / "train/pick_heat_then_place_in_recep-Egg-None-Fridge-1/trial_1")
    written(root / "train/pick_heat_then_place_in_recep-Egg-None-Fridge-1/trial_2")
    written(root / "valid_seen/pick_heat-x/trial_3")
    written(root / "train/pick_and_place_with_movable_recep-x/trial_4")
    written(root / "train/pick_heat-AppleSliced-x/trial_5")
    written(root / "train/unsolvable/trial_6", lambda data: data.update(solvable=False))
    train, seen = GameFiles(tmp_path), GameFiles(tmp_path, "valid_seen")
    assert [task_id.split("/")[-1] for task_id in train.files] == ["trial_1", "trial_2"]
    assert list(seen.files) == ["json_2.1.1/valid_seen/pick_heat-x/trial_3"]
    assert list(GameFiles(root / "valid_seen", "valid_seen").files) == ["pick_heat-x/trial_3"]
    with pytest.raises(DataError, match="no game of the split 'valid_unseen'"):
        GameFiles(tmp_path, "valid_unseen")
    with pytest.raises(DataError, match="no game 'nowhere'"):
        train.by_id("nowhere")
    env = gymnasium.make("at2po/Household-v0", dataset=str(tmp_path), split="valid_seen")
    _, info = env.reset(seed=0)
    assert info["task_id"] == "json_2.1.1/valid_seen/pick_heat-x/trial_3"
    single = GameFiles(root / "valid_seen/pick_heat-x/trial_3/game.tw-pddl")
    assert (len(single), single[0].id) == (1, "game")


def test_data_get_fills_the_cache_that_published_games_are_played_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AT2PO_CACHE", str(tmp_path / "cache"))
    content = written(tmp_path / "game").read_bytes()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as out:
        out.writestr("json_2.1.1/train/a/trial_1/game.tw-pddl", content)
        out.writestr("json_2.1.1/valid_unseen/b/trial_2/game.tw-pddl", content)
    (wanted,) = catalog.WORLDS["alfworld"]
    with serving(monkeypatch) as hub:
        address = wanted._replace(url=f"{hub.url}/games.zip")
        monkeypatch.setattr(catalog, "WORLDS", {"alfworld": (address,)})
        hub.files = {"/games.zip": packed.getvalue()}
        assert get("alfworld") == [tmp_path / "cache/datasets/alfworld"]
    env = gymnasium.make("at2po/Household-v0", games="published", split="valid_unseen")
    assert env.reset(seed=0)[1]["task_id"] == "json_2.1.1/valid_unseen/b/trial_2"
