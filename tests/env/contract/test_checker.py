"""check_env accepts sound environments and names every planted fault."""

from __future__ import annotations

import copy
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.utils import EzPickle
from gymnasium.wrappers import NormalizeReward, RecordEpisodeStatistics, TimeLimit

from at2po_env.contract.checker import check_env, check_process, play_for
from at2po_env.contract.rules import CHECKS
from at2po_env.contract.testing import EnvContract, PigEnv, PigState
from at2po_env.errors import ContractError, EnvError
from at2po_env.forking.base import ForkableEnv

gymnasium.register(
    "at2po-test/CheckedPig-v0", entry_point="at2po_env.contract.testing:PigEnv", max_episode_steps=15
)


class TestPig(EnvContract):
    """The kit applied to the reference environment, by its own path."""

    another_process = True

    def make_env(self) -> gymnasium.Env[Any, Any]:
        return gymnasium.make("at2po-test/CheckedPig-v0", render_mode="ansi")


class TestPigUnderWrappers(EnvContract):
    def make_env(self) -> gymnasium.Env[Any, Any]:
        return NormalizeReward(RecordEpisodeStatistics(TimeLimit(PigEnv(), 6)))


def test_the_kit_says_what_is_missing() -> None:
    with pytest.raises(NotImplementedError, match="make_env"):
        EnvContract().make_env()


class SharesTool(PigEnv):
    """A tool with a memory of its own, which forks share."""

    def __init__(self) -> None:
        super().__init__()
        self.tool: list[str] = []

    def reset(self, **kwargs: Any) -> Any:
        self.tool.clear()
        return super().reset(**kwargs)

    def step(self, action: str) -> Any:
        self.tool.append(action)
        observation, *rest = super().step(action)
        return (f"{observation} ({len(self.tool)} calls)", *rest)


class SharesGenerator(PigEnv):
    """Its own generator beside np_random."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        result = super().reset(seed=seed, options=options)
        self.dice = np.random.default_rng(self.np_random_seed)
        return result

    def step(self, action: str) -> Any:
        observation, *rest = super().step(action)
        return (f"{observation} {self.dice.integers(10**9)}", *rest)


class SharesGeneratorQuietly(PigEnv):
    """A generator that forks share, although no observation shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.dice = np.random.default_rng(0)


class ForgetsBudget(PigEnv):
    """A budget that is no part of the state."""

    def reset(self, **kwargs: Any) -> Any:
        self.left = 6
        return super().reset(**kwargs)

    def step(self, action: str) -> Any:
        self.left -= 1
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated, truncated or (self.left <= 0 and not terminated), info


class ForgetsBudgetQuietly(ForgetsBudget):
    """The same, too large to run out within a check."""

    def reset(self, **kwargs: Any) -> Any:
        result = super().reset(**kwargs)
        self.left = 1000
        return result


class LosesBudgetInFork(PigEnv):
    """set_state starts the turns anew."""

    def set_state(self, state: PigState) -> None:
        super().set_state(state._replace(turn=0))


class LosesPointsInJson(PigEnv):
    """load_state forgets the points."""

    def load_state(self, data: Any) -> PigState:
        return super().load_state(data)._replace(points=0)


class WritesNothing(PigEnv):
    """dump_state loses the points, so the digest cannot tell."""

    def dump_state(self, state: PigState) -> list[Any]:
        return super().dump_state(state._replace(points=0))


class NotJson(PigEnv):
    def dump_state(self, state: PigState) -> Any:
        return {"points": {state.points}}


class Unseeded(PigEnv):
    """Reseeds its generator in a fork."""

    def set_state(self, state: PigState) -> None:
        super().set_state(state)
        self._seed(1)


class ClosesTheShared(PigEnv):
    """Closing one fork closes what all share."""

    def __init__(self) -> None:
        super().__init__()
        self.connection = {"open": True}

    def close(self) -> None:
        self.connection["open"] = False

    def step(self, action: str) -> Any:
        observation, *rest = super().step(action)
        return (observation if self.connection["open"] else "connection closed", *rest)


class LosesEpisodeInCopies(PigEnv, EzPickle):
    def __init__(self) -> None:
        EzPickle.__init__(self)
        super().__init__()


class RaisesOnBadText(PigEnv):
    def step(self, action: str) -> Any:
        action.encode("utf-8")
        return super().step(action)


class ReusesInfo(PigEnv):
    info: Any = {}  # noqa: RUF012

    def step(self, action: str) -> Any:
        *rest, info = super().step(action)
        self.info.update(info)
        return (*rest, self.info)


class NotInSpace(PigEnv):
    def step(self, action: str) -> Any:
        _, *rest = super().step(action)
        return (3, *rest)


class CountsOnTheClass(gymnasium.Wrapper[Any, Any, Any, Any]):
    """A wrapper whose counter lives on the class, where all forks see it."""

    count = 0

    def reset(self, **kwargs: Any) -> Any:
        type(self).count = 0
        return self.env.reset(**kwargs)

    def step(self, action: Any) -> Any:
        type(self).count += 1
        *rest, info = self.env.step(action)
        return (*rest, {**info, "count": self.count})


class CountsInAClosure(gymnasium.Wrapper[Any, Any, Any, Any]):
    """A wrapper whose counter hides in a callable, which counts as configuration."""

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        counts = [0]

        def tick() -> int:
            counts[0] += 1
            return counts[0]

        self.tick = tick

    def step(self, action: Any) -> Any:
        *rest, info = self.env.step(action)
        return (*rest, {**info, "tick": self.tick()})


FAULTS = [
    (SharesTool, r"same observation at turn 1.*\(1 calls\).*\(6 calls\).*SharesTool\.tool \(list\)"),
    (SharesGenerator, r"same observation at turn .*SharesGenerator\.dice \(Generator\)"),
    (SharesGeneratorQuietly, r"own random generator.*SharesGeneratorQuietly\.dice is one Generator"),
    (ForgetsBudget, r"restore rewinds everything.*attribute left = 6.*left is not part of get_state"),
    (ForgetsBudgetQuietly, r"restore rewinds everything.*attribute left = 1000"),
    (LosesBudgetInFork, r"a fork's state is its parent's.*snapshot\.state\.episode\[1\] = 1"),
    (LosesPointsInJson, r"read into the same environment is the same state.*episode\[0\].*load_state"),
    (WritesNothing, r"same observation at turn .*through JSON"),
    (NotJson, r"episode\.points is a builtins:set, which is not JSON"),
    (Unseeded, r"a fork's state is its parent's.*rng"),
    (ClosesTheShared, r"connection closed.*ClosesTheShared\.connection \(dict\)"),
    (LosesEpisodeInCopies, r"deepcopy keeps the episode.*EzPickle"),
    (RaisesOnBadText, r"raised UnicodeEncodeError.*expected: a recorded outcome"),
    (ReusesInfo, r"Gymnasium's checker refuses ReusesInfo.*share an object"),
    (NotInSpace, r"Gymnasium's checker refuses NotInSpace.*obs"),
    (lambda: CountsOnTheClass(PigEnv()), r"same info.*count at turn"),
    (lambda: CountsInAClosure(PigEnv()), r"same info.*tick at turn"),
]


@pytest.mark.parametrize(("make", "message"), FAULTS, ids=[getattr(f, "__name__", m[:20]) for f, m in FAULTS])
def test_a_planted_fault_is_found_and_explained(make: Any, message: str) -> None:
    with pytest.raises(EnvError, match=f"(?s){message}"):
        check_env(make(), process=False)


def test_sound_environments_pass_with_all_their_wrappers() -> None:
    check_env(PigEnv())
    check_env(
        NormalizeReward(RecordEpisodeStatistics(gymnasium.make("at2po-test/CheckedPig-v0"))), process=True
    )


def test_actions_options_and_clocks_can_be_given() -> None:
    class Timed(PigEnv):
        def step(self, action: str) -> Any:
            *rest, info = super().step(action)
            return (*rest, {**info, "seconds": np.random.default_rng().random()})

    play = play_for(Timed(), actions=["roll"], options={"x": 1}, ignore_info=["seconds"])
    assert (play.actions, play.options) == (("roll",), {"x": 1})
    CHECKS["fork"](Timed(), play)
    with pytest.raises(ContractError, match=r"same info\.seconds at turn 1"):
        CHECKS["fork"](Timed(), play._replace(ignore_info=()))


def test_wrappers_that_change_the_actions_are_checked_with_samples() -> None:
    class Choice(gymnasium.ActionWrapper[Any, Any, Any]):
        def __init__(self, env: Any) -> None:
            super().__init__(env)
            self.action_space = gymnasium.spaces.Discrete(2)

        def action(self, action: int) -> str:
            return ("roll", "hold")[action]

    check_env(Choice(PigEnv()))


@pytest.mark.parametrize(
    "thing", [CartPoleEnv(), "env", TimeLimit(CartPoleEnv(), 3)], ids=["env", "str", "wrapped"]
)
def test_only_forkable_environments_can_be_checked(thing: Any) -> None:
    with pytest.raises(ContractError, match="Expected a ForkableEnv"):
        check_env(thing)


def test_a_required_process_needs_a_spec() -> None:
    env = PigEnv()
    with pytest.raises(ContractError, match="cannot be rebuilt in another process"):
        check_env(env, process=True)


def test_a_failure_in_the_other_process_is_shown() -> None:
    env = gymnasium.make("at2po-test/CheckedPig-v0")
    env.unwrapped.spec = copy.deepcopy(env.unwrapped.spec)
    env.unwrapped.load_state = None  # here nothing is read back
    env.unwrapped.dump_state = lambda _: {"not": "a game"}
    with pytest.raises(ContractError, match=r"(?s)another process.*the process failed"):
        check_process(env, play_for(env))


def test_no_actions_is_an_error() -> None:
    with pytest.raises(ContractError, match="at least one action"):
        check_env(PigEnv(), actions=[])


def test_the_default_examples_are_samples() -> None:
    class Plain(PigEnv):
        example_actions = ForkableEnv.example_actions

    assert len(play_for(Plain()).actions) == 4
