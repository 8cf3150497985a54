"""`at2po/Household-v0`: the contract, episodes, options, hostile commands, and a playthrough that is kept."""

from __future__ import annotations

import random
import time
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from at2po_envs.household.env import HouseholdEnv
from at2po_envs.household.pddl import FAMILIES

import at2po_env
from at2po_env.contract.testing import EnvContract
from at2po_env.errors import ConfigError, DataError, EnvError, SnapshotError

PLAYTHROUGH = Path(__file__).parent / "playthrough.txt"
TASK = "small/train/pick_clean_then_place_in_recep/3"


def make(**options: Any) -> gymnasium.Env[Any, Any]:
    return gymnasium.make("at2po/Household-v0", **options)


def base(env: gymnasium.Env[Any, Any]) -> HouseholdEnv:
    assert isinstance(env.unwrapped, HouseholdEnv)
    return env.unwrapped


class TestGeneratedHousehold(EnvContract):
    another_process = True

    def make_env(self) -> gymnasium.Env[Any, Any]:
        return make(size="small", render_mode="ansi")


class TestFullHousehold(EnvContract):
    another_process = True

    def make_env(self) -> gymnasium.Env[Any, Any]:
        return make(split="eval", wording="put", show_commands=False)


def play_expert(env: gymnasium.Env[Any, Any], **reset: Any) -> tuple[list[str], float, dict[str, Any]]:
    env.reset(**reset)
    shown: list[str] = []
    while True:
        commands = base(env).expert_commands()
        assert commands
        observation, reward, terminated, truncated, info = env.step(f"<action>{commands[0]}</action>")
        shown.append(observation)
        if terminated or truncated:
            return shown, float(reward), info


def test_the_check_passes_as_a_user_calls_it() -> None:
    at2po_env.check_env(make(render_mode="ansi"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", ["small", "full"])
def test_the_expert_ends_every_family_with_reward_1(family: str, size: str) -> None:
    env = make(families=[family], size=size)
    for seed in range(5):
        shown, reward, info = play_expert(env, seed=seed)
        assert reward == 1.0
        assert info["outcome"] == "success"
        assert info["metrics"] == {"success": 1.0}
        assert len(shown) <= 20
        assert "Nothing happens." not in "".join(shown)


def test_the_first_observation_has_the_words_of_the_original() -> None:
    env = make()
    prompt, info = env.reset(seed=0)
    assert "-= Welcome to TextWorld, ALFRED! =-\n\nYou are in the middle of a room. Looking quickly" in prompt
    assert f"\n\nYour task is to: {info['question']}." in prompt
    assert f"Admissible commands: {' | '.join(info['admissible_commands'])}" in prompt
    hidden, same = make(show_commands=False).reset(seed=0)
    assert "Admissible commands" not in hidden
    assert same["admissible_commands"] == info["admissible_commands"]


def test_an_episode_is_truncated_after_50_turns() -> None:
    env = make(size="small")
    env.reset(seed=0)
    for _ in range(49):
        assert env.step("look")[2:4] == (False, False)
    _, reward, terminated, truncated, info = env.step("look")
    assert (reward, terminated, truncated, info["outcome"]) == (0.0, False, True, "limit")
    assert info["metrics"] == {"success": 0.0}


def test_an_impossible_command_is_an_outcome() -> None:
    env = make(size="small")
    env.reset(seed=0)
    observation, reward, terminated, truncated, info = env.step("<action>fly to the moon</action>")
    assert (reward, terminated, truncated, info["outcome"]) == (0.0, False, False, "invalid")
    assert "\nNothing happens.\n" in observation


def test_ten_thousand_malformed_commands_are_recorded_outcomes() -> None:
    env = make(size="small", max_turns=20_000, show_commands=False)
    _, info = env.reset(seed=3)
    rng = random.Random(0)
    pieces = [
        *info["admissible_commands"],
        *" /\n\x00<>|{}\ud800é🙂",
        "<action>",
        "</action>",
        "take",
        "from",
        "to",
    ]
    pieces += ["in/on", "with", "9" * 30, "go to ", "examine ", "-1", "%s", "\\"]
    seen = set()
    begun = time.perf_counter()
    for _ in range(10_000):
        written = "".join(rng.choice(pieces) for _ in range(rng.randrange(6)))
        *_, info = env.step(written)
        seen.add(info["outcome"])
    assert seen == {"malformed", "invalid", "command"}
    assert time.perf_counter() - begun < 60


def test_the_same_seed_gives_the_same_episode_and_splits_share_no_game() -> None:
    one, two = make(), make()
    assert one.reset(seed=11) == two.reset(seed=11)
    train = {str(base(make()).games.game(base(make()).tasks[i].id).problem) for i in range(30)}
    held_out = make(split="eval")
    evaluated = {str(base(held_out).games.game(base(held_out).tasks[i].id).problem) for i in range(30)}
    assert len(train) == len(evaluated) == 30
    assert not train & evaluated


def test_a_task_is_found_by_id_and_families_take_turns() -> None:
    env = make(size="small")
    _, info = env.reset(options={"task_id": TASK})
    assert info["task_id"] == TASK
    assert [base(env).tasks[i].metadata["family"] for i in range(6)] == list(FAMILIES)
    assert len(base(env).tasks) == 600_000
    assert len(base(make(split="eval")).tasks) == 600
    for wrong in (
        TASK.replace("3", "03"),
        TASK.replace("small", "full"),
        TASK + "/",
        "x",
        TASK.replace("3", "-1"),
    ):
        with pytest.raises(EnvError, match="no task"):
            env.reset(options={"task_id": wrong})


@pytest.mark.parametrize(
    "options",
    [
        {"split": "valid_seen"},
        {"games": "real"},
        {"size": "huge"},
        {"families": ["dance"]},
        {"families": []},
        {"wording": "shove"},
        {"games": "published", "size": "small"},
        {"games": "published", "split": "eval"},
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"expected|games"):
        make(**options)


def test_published_games_that_are_not_there_name_the_command_that_gets_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AT2PO_CACHE", str(tmp_path))
    with pytest.raises(DataError, match="at2po data get alfworld"):
        make(games="published")


def test_instructions_can_be_ones_own() -> None:
    env = make(size="small", instructions="Do this: {question}\n", show_commands=False)
    prompt, info = env.reset(options={"task_id": TASK})
    assert prompt.startswith(f"Do this: {info['question']}\n\n<observation>\n-= Welcome")


def test_wording_changes_command_and_sentence() -> None:
    for wording, command, said in (("move", "move", "You move the "), ("put", "put", "You put the ")):
        shown, *_ = play_expert(make(size="small", wording=wording), options={"task_id": TASK})
        assert said in shown[-1]
        env = make(size="small", wording=wording)
        env.reset(options={"task_id": TASK})
        commands = base(env).expert_commands()
        assert commands is not None
        assert commands[-1].startswith(command)
        assert ("in/on" in commands[-1]) == (wording == "put")


def test_a_state_that_does_not_fit_its_game_is_refused() -> None:
    env = make(size="small")
    env.reset(options={"task_id": TASK})
    env.step("look")
    world = base(env).dump_state(base(env).get_state())["world"]
    loaded = base(env).load_world(world)
    assert base(env).dump_world(loaded) == world
    hostile: list[dict[str, Any]] = [
        {"at": 99},
        {"at": True},
        {"holding": -2},
        {"contents": []},
        {"contents": [[99]] * len(world["contents"])},
        {"contents": [[1, 0], *world["contents"][1:]]},
        {"lying": [[0, 99]]},
        {"taken": [[0]]},
        {"opened": "0xffffffffff"},
        {"clean": "-1"},
        {"hot": 5},
    ]
    data = base(env).dump_state(base(env).get_state())
    for change in hostile:
        with pytest.raises(SnapshotError):
            base(env).load_state({**data, "world": {**world, **change}})


def test_many_at_once() -> None:
    envs = gymnasium.make_vec("at2po/Household-v0", num_envs=3, size="small")
    observations, infos = envs.reset(seed=[1, 2, 3])
    assert len(set(observations)) == 3
    assert infos["turn"].tolist() == [0, 0, 0]
    _, rewards, *_ = envs.step(["look", "inventory", "help"])
    assert rewards.tolist() == [0.0, 0.0, 0.0]
    envs.close()


def test_nothing_of_numpys_global_generator_is_used() -> None:
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    make(size="small").reset(seed=5)
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index]  # noqa: NPY002


def playthrough() -> str:
    """Play one game of each family by its expert, with detours, and return what is shown."""
    parts = []
    for family in FAMILIES:
        env = make(size="small", render_mode="ansi", show_commands=False)
        env.reset(options={"task_id": f"small/train/{family}/0"})
        for detour in ("inventory", "help" if family == FAMILIES[0] else "look", "dance"):
            env.step(detour)
        commands = base(env).expert_commands()
        assert commands is not None
        for command in commands:
            env.step(f"<action>{command}</action>")
        parts.append(str(env.render()))
    return "\n".join(parts) + "\n"


def test_the_playthrough_is_the_one_that_is_kept() -> None:
    assert playthrough() == PLAYTHROUGH.read_text("utf-8")


if __name__ == "__main__":
    with warnings.catch_warnings():
        PLAYTHROUGH.write_text(playthrough(), "utf-8")
