"""Tests that foreign environments can be forked by repeating their actions, and differences are found."""

from __future__ import annotations

import json
import random
import sys
import time
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.toy_text import FrozenLakeEnv
from gymnasium.wrappers import TimeLimit

from at2po_env import check_env, fork, restore, snapshot
from at2po_env.contract import EnvContract
from at2po_env.errors import ContractError, EnvError, SnapshotError
from at2po_env.forking import Snapshot
from at2po_env.wrappers import Replay

for toy, name in {
    "Lake": "FrozenLake-v1",
    "Taxi": "Taxi-v4",
    "Cliff": "CliffWalking-v1",
    "Cards": "Blackjack-v1",
}.items():
    gymnasium.register(f"at2po-test/{toy}-v0", "at2po_env.wrappers:Replay", kwargs={"make": name})


class ReplayContract(EnvContract):
    """Every toy world passes the whole contract, in another process too."""

    another_process = None
    id: ClassVar[str]

    def make_env(self) -> gymnasium.Env[Any, Any]:
        return gymnasium.make(f"at2po-test/{self.id}-v0")


class TestFrozenLake(ReplayContract):
    id = "Lake"
    actions = (2, 2, 1, 1)
    another_process = True


class TestTaxi(ReplayContract):
    id = "Taxi"
    actions = (0, 1, 2, 3)


class TestCliffWalking(ReplayContract):
    id = "Cliff"
    actions = (0, 1, 1, 0)


class TestBlackjack(ReplayContract):
    id = "Cards"
    actions = (1, 1)


class Walk(gymnasium.Env[Any, int]):
    """Counts its steps in arrays; `noise` adds something that no seed sets from that step on."""

    built = 0

    def __init__(self, noise: int = 99, what: str = "observation") -> None:
        Walk.built += 1
        self.action_space = gymnasium.spaces.Discrete(3)
        self.observation_space = gymnasium.spaces.Dict(
            {"at": gymnasium.spaces.Box(-99, 99, (2,), np.float64)}
        )
        self.noise, self.what = noise, what

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        self.at = float(self.np_random.integers(9)) + (options or {}).get("start", 0)
        return {"at": np.array([self.at, 0.0])}, {}

    def step(self, action: int) -> Any:
        self.steps += 1
        self.at += int(action) - 1
        odd = time.perf_counter_ns() % 10**9 / 10**8 if self.steps >= self.noise else 0.0
        observed = {"at": np.array([self.at, odd if self.what == "observation" else 0.0])}
        return observed, odd if self.what == "reward" else 0.0, self.steps > 8, False, {"steps": self.steps}


def same(left: Any, right: Any) -> bool:
    return bool(np.array_equal(left[0]["at"], right[0]["at"])) and left[1:4] == right[1:4]


def test_a_fork_repeats_the_episode_in_an_instance_of_its_own() -> None:
    env = Replay(Walk)
    env.reset(seed=3, options={"start": 5})
    for action in (2, 2, 0):
        env.step(action)
    before = Walk.built
    child = fork(env)
    assert Walk.built == before  # not before it is needed
    assert same(child.step(np.int64(2)), env.step(2))
    assert Walk.built == before + 1
    there, here = child.step(0), env.step(2)
    assert there[0]["at"][0] == here[0]["at"][0] - 2


def test_a_snapshot_is_seed_options_and_actions() -> None:
    env = Replay(Walk)
    env.reset(seed=3, options={"start": 5})
    env.step(2)
    data = json.loads(snapshot(env).to_json())["state"]["episode"]
    assert (data["seed"], data["options"]) == (3, {"$dict": {"start": 5}})
    assert [turn[0] for turn in data["turns"]] == [2]
    other = Replay(Walk)
    restore(other, Snapshot.from_json(snapshot(env).to_json()))
    assert snapshot(other).digest == snapshot(env).digest
    assert same(other.step(1), env.step(1))


def test_going_back_repeats_all_and_going_on_only_the_rest() -> None:
    class Counted(Walk):
        taken = 0

        def step(self, action: int) -> Any:
            Counted.taken += 1
            return super().step(action)

    env = Replay(Counted)
    env.reset(seed=1)
    early = snapshot(env)
    for _ in range(4):
        env.step(2)
    late = snapshot(env)
    restore(env, early)
    env.step(2)
    assert Counted.taken == 5
    restore(env, late)
    env.step(2)
    assert Counted.taken == 5 + 3 + 1  # one of the four steps had been taken already
    restore(env, early)
    env.step(0)
    restore(env, late)
    env.step(2)
    assert Counted.taken == 9 + 1 + 4 + 1  # another beginning: everything is repeated


@pytest.mark.parametrize("what", ["observation", "reward"])
def test_a_difference_names_the_step(what: str) -> None:
    env = Replay(lambda: Walk(noise=3, what=what))
    env.reset(seed=1)
    for _ in range(4):
        env.step(1)
    child = fork(env)
    with pytest.raises(SnapshotError, match=f"step 3 gave another {what}"):
        child.step(1)
    env.step(1)  # the parent plays on


def test_another_reset_and_another_end_are_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    env = Replay(Walk)
    env.reset(seed=1)
    env.step(1)
    child, twin = fork(env), fork(env)
    whole = Walk.step
    monkeypatch.setattr(Walk, "step", lambda *taken: (*whole(*taken)[:2], True, False, {}))
    with pytest.raises(SnapshotError, match=r"step 1 gave another terminated \(True instead of False\)"):
        child.replay()
    monkeypatch.setattr(Walk, "reset", lambda _, **__: ({"at": np.array([0.5, 0.5])}, {}))
    with pytest.raises(SnapshotError, match="the reset gave another observation"):
        twin.replay()


def test_check_env_says_when_an_environment_is_not_deterministic() -> None:
    check_env(Replay(Walk), actions=[1, 2])
    with pytest.raises(
        ContractError, match=r"observation.at at turn 3(?s:.*)reset\(seed=\.\.\.\) does not set"
    ):
        check_env(Replay(lambda: Walk(noise=3)), actions=[1, 2])


def test_chosen_infos_are_compared() -> None:
    class Odd(Walk):
        def step(self, action: int) -> Any:
            *answer, _ = super().step(action)
            return (*answer, {"board": [time.perf_counter_ns()], "clock": time.perf_counter_ns()})

    for keys, differs in (((), False), (("missing",), False), (("board",), True)):
        env = Replay(Odd, info_keys=keys)
        env.reset(seed=1)
        env.step(1)
        child = fork(env)
        if differs:
            with pytest.raises(SnapshotError, match="step 1 gave another observation"):
                child.replay()
        else:
            child.replay()


def test_an_episode_without_a_seed_can_be_repeated() -> None:
    env = Replay(Walk)
    starts = {env.reset()[0]["at"][0] for _ in range(40)}
    assert len(starts) > 3
    env.step(2)
    child = fork(env)
    assert same(child.step(1), env.step(1))


def test_a_step_that_raises_leaves_the_episode_as_it_was() -> None:
    class Refuses(Walk):
        def step(self, action: int) -> Any:
            answer = super().step(action)  # it moves first, and then raises
            if action == 0:
                raise ValueError("not that way")
            return answer

    env = Replay(Refuses)
    env.reset(seed=1)
    env.step(2)
    expected = fork(env).step(2)
    with pytest.raises(ValueError, match="not that way"):
        env.step(0)
    assert same(env.step(2), expected)


def test_an_ended_episode_is_not_stepped() -> None:
    env = Replay(lambda: TimeLimit(FrozenLakeEnv(), 1))
    with pytest.raises(EnvError, match="call reset first"):
        env.step(0)
    env.reset(seed=1)
    assert env.step(0)[3]
    with pytest.raises(EnvError, match="call reset first"):
        fork(env).step(0)


def test_render_shows_the_present_state() -> None:
    env = Replay("FrozenLake-v1", render_mode="ansi", is_slippery=False)
    env.reset(seed=1)
    env.step(2)
    assert fork(env).render() == env.render()
    assert env.render_mode == "ansi"
    env.close()


def test_what_cannot_be_built_or_kept_says_why() -> None:
    wrong: Any
    for wrong in (FrozenLakeEnv(), 7, lambda: 7):
        with pytest.raises(EnvError, match=r"Fix: pass a function|Expected an id|Expected an object"):
            Replay(wrong)
    env = Replay(gymnasium.make("FrozenLake-v1"))
    env.reset(seed=1)
    with pytest.raises(EnvError, match="cannot keep the action"):
        env.step(object())
    with pytest.raises(SnapshotError, match="this is a Replay of"):
        restore(Replay("Taxi-v4"), Snapshot.from_json(snapshot(env).to_json()))
    with pytest.raises(SnapshotError, match="this is a Replay of"):
        restore(Replay("Taxi-v4"), snapshot(env))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("seed",), -1),
        (("seed",), "1"),
        (("first",), 1),
        (("options",), [1]),
        (("turns", 0, 0), 9),
        (("turns", 0, 0), {"$object": "os:system"}),
        (("turns", 0, 2), "1"),
        (("turns", 0, 3), 1),
        (("turns", 0), []),
        (("turns",), None),
    ],
)
def test_hostile_states_are_refused(path: tuple[Any, ...], value: Any) -> None:
    env = Replay(Walk)
    env.reset(seed=1)
    env.step(1)
    data = json.loads(snapshot(env).to_json())
    place = data["state"]["episode"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    before = snapshot(env).digest
    with pytest.raises(SnapshotError):
        restore(env, Snapshot.from_json(json.dumps(data)))
    assert snapshot(env).digest == before


class Dice:
    """Draws from the global generators in every step, and has neither spaces nor options, as GEM's games."""

    def reset(self, seed: int | None = None) -> tuple[str, dict[str, Any]]:
        if seed is not None:
            random.seed(seed)
        return "roll", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return f"{action} {random.random()} {np.random.random()}", 0.0, False, False, {}  # noqa: NPY002


def test_global_generators_can_be_kept_apart() -> None:
    env = Replay(Dice, own_random=True)
    assert env.reset(seed=1)[0] == "roll"
    env.step("a")
    random.seed(5)
    expected = random.random()
    child = fork(env)
    random.seed(5)
    rolls = [child.step("b")[0], env.step("b")[0], child.step("c")[0], env.step("c")[0]]
    assert random.random() == expected  # the program's own generator is where it was
    assert rolls[0] == rolls[1]
    assert rolls[2] == rolls[3]
    mixed = Replay(Dice)
    mixed.reset(seed=1)
    mixed.step("a")
    with pytest.raises(SnapshotError, match="own_random=True"):
        fork(mixed).step("b")


def test_a_game_of_gem_can_be_forked() -> None:
    pytest.importorskip("gem", reason="GEM is not installed (pip install gem-llm)")
    import gem

    env = Replay(lambda: gem.make("game:Game2048-v0-hard"), own_random=True, info_keys=("suffix",))
    first, _ = env.reset(seed=4)
    assert "2048" in first
    for move in ("left", "up", "left"):
        env.step(f"\\boxed{{{move}}}")
    child = fork(env)
    text = snapshot(env).to_json()
    for move in ("right", "down", "up", "left"):  # a tile is drawn in every step
        assert env.step(f"\\boxed{{{move}}}") == child.step(f"\\boxed{{{move}}}")
    restore(env, Snapshot.from_json(text))
    assert snapshot(env).to_json() == text
    assert env.step("\\boxed{up}")[4] != {}
    mixed = Replay(lambda: gem.make("game:Game2048-v0-hard"), info_keys=("suffix",))
    mixed.reset(seed=4)
    one, other = fork(mixed), fork(mixed)
    for move in ("left", "up", "right", "down"):
        one.step(f"\\boxed{{{move}}}")
        other.step(f"\\boxed{{{move}}}")
    with pytest.raises(SnapshotError, match="another observation"):
        fork(other).replay()


@pytest.mark.filterwarnings("ignore")  # of the engine and what it imports
def test_a_game_of_textworld_can_be_forked() -> None:
    for module in ("fast_downward", "textworld", "alfworld", "at2po_envs"):
        pytest.importorskip(module, reason=f"{module} is not installed; make test-worlds installs it")
    from at2po_envs.household.games import game_data, generated_game
    from at2po_envs.household.pddl import FAMILIES
    from at2po_envs.household.published import Words

    arguments = sys.argv
    from helpers.textworld_household import Reference

    data = game_data(generated_game("small", "train", FAMILIES[0], 0, Words()))

    class Game:
        """TextWorld's engine with Gymnasium's interface."""

        def __init__(self) -> None:
            self.engine = Reference(data)
            sys.argv = arguments  # the planner's translation replaces them

        def reset(self) -> Any:
            return self.engine.reset().said, {}

        def step(self, command: str) -> Any:
            moment = self.engine.step(command)
            return moment.said, float(moment.reward), moment.done, False, {"commands": moment.commands}

    env = Replay(Game)
    env.reset(seed=0)
    _, _, _, _, info = env.step("look")
    going = [command for command in info["commands"] if command.startswith("go to ")]
    env.step(going[0])
    child = fork(env)
    assert child.step(going[1]) == env.step(going[1])
    assert child.step("look") == env.step("look")
    assert child.step(going[0])[0] != env.step("inventory")[0]
