"""A fork is the same episode, independent of its parent, through any stack of wrappers."""

from __future__ import annotations

import copy
import itertools
import pickle
import random
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.wrappers import (
    Autoreset,
    DelayObservation,
    NormalizeReward,
    OrderEnforcing,
    PassiveEnvChecker,
    RecordEpisodeStatistics,
    RenderCollection,
    RepeatAction,
    StickyAction,
    TimeAwareObservation,
    TimeLimit,
    TransformReward,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from at2po_env.contract.testing import PigEnv
from at2po_env.errors import EnvError, SnapshotError
from at2po_env.forking.base import ForkableEnv, fork, restore, snapshot

Env = gymnasium.Env[Any, Any]
gymnasium.register("at2po-test/Pig-v0", entry_point="at2po_env.contract.testing:PigEnv", max_episode_steps=12)


class Dice:
    """An object with slots, a generator and an alias, as wrappers hold them."""

    __slots__ = ("__private", "log", "rng")

    def __init__(self, log: list[Any]) -> None:
        self.rng = np.random.default_rng(5)
        self.log = log
        self.__private = {"drawn": 0}

    def draw(self) -> int:
        self.__private["drawn"] += 1
        self.log.append(int(self.rng.integers(1000)))
        return self.__private["drawn"] * 1000 + int(self.log[-1])


class Pair(NamedTuple):
    left: list[int]
    right: Any


class Hoarder(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Keeps state in every way that fork has to copy, and shows all of it in info."""

    def __init__(self, env: Env) -> None:
        super().__init__(env)
        self.log: list[Any] = []
        self.alias = self.log
        self.dice = Dice(self.log)
        self.array = np.zeros(3)
        self.objects = np.array([[], None], dtype=object)
        self.queue: deque[int] = deque(maxlen=2)
        self.counts: Counter[str] = Counter()
        self.ordered: OrderedDict[str, int] = OrderedDict()
        self.default: defaultdict[str, list[int]] = defaultdict(list)
        self.seen: set[str] = set()
        self.pair = Pair([0], (1, [2]))
        self.python_rng = random.Random(1)
        self.legacy_rng = np.random.RandomState(2)
        self.draw_bound = self.python_rng.random
        self.cycle: dict[str, Any] = {"log": self.log}
        self.cycle["self"] = self.cycle
        self.below = env
        self.base = env.unwrapped
        self.describe_bound = self.describe
        self.describe_closed = lambda: self.describe()
        self.noise = gymnasium.spaces.Discrete(1000, seed=3)
        self.bytes = bytearray(b"\x00")

    def describe(self) -> str:
        return f"{len(self.log)}/{self.array.sum()}/{self.base.render()}"

    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.log.append(action)
        self.array += 1
        self.objects[0].append(len(self.log))
        self.queue.append(len(self.log))
        self.counts[action] += 1
        self.ordered[action] = len(self.log)
        self.default[action].append(1)
        self.seen.add(action)
        self.pair.left[0] += 1
        self.pair.right[1].append(self.python_rng.random())
        self.bytes[0] = (self.bytes[0] + 1) % 256
        shown = {
            "dice": self.dice.draw(),
            "alias": list(self.alias) == self.log == self.cycle["self"]["log"],
            "array": self.array.tolist(),
            "objects": list(self.objects[0]),
            "queue": list(self.queue),
            "counts": dict(self.counts),
            "ordered": list(self.ordered),
            "default": dict(self.default),
            "seen": sorted(self.seen),
            "pair": (self.pair.left[0], list(self.pair.right[1])),
            "legacy": int(self.legacy_rng.randint(1000)),
            "bound": self.draw_bound(),
            "described": (self.describe_bound(), self.describe_closed()),
            "below": self.below is self.env and self.base is self.unwrapped,
            "noise": int(self.noise.sample()),
            "bytes": bytes(self.bytes),
        }
        return observation, reward, terminated, truncated, {**info, "shown": copy.deepcopy(shown)}


def limited(env: Env) -> Env:
    return TimeLimit(env, 9)


STACKS: dict[str, Callable[[], Env]] = {
    "bare": PigEnv,
    "made": lambda: gymnasium.make("at2po-test/Pig-v0", render_mode="ansi"),
    "limited": lambda: limited(PigEnv()),
    "checked": lambda: OrderEnforcing(PassiveEnvChecker(PigEnv(render_mode="ansi"))),
    "statistics": lambda: RecordEpisodeStatistics(limited(PigEnv())),
    "normalised": lambda: NormalizeReward(RecordEpisodeStatistics(limited(PigEnv()))),
    "transformed": lambda: TransformReward(limited(PigEnv()), lambda reward: float(reward) * 2),
    "sticky": lambda: StickyAction(limited(PigEnv()), 0.5, (1, 3)),
    "delayed": lambda: DelayObservation(limited(PigEnv()), 2),
    "repeated": lambda: RepeatAction(limited(PigEnv()), 2),
    "timed": lambda: TimeAwareObservation(limited(PigEnv()), flatten=False),
    "reset by itself": lambda: Autoreset(limited(PigEnv())),
    "rendered": lambda: RenderCollection(limited(PigEnv(render_mode="ansi"))),
    "hoarder": lambda: Hoarder(limited(PigEnv())),
    "nested": lambda: NormalizeReward(Hoarder(RecordEpisodeStatistics(Hoarder(limited(PigEnv()))))),
}
ACTIONS = ("roll", "what?", "roll", "roll", "roll", "roll", "roll", "roll", "hold")


def begin(stack: str, turns: int = 0, seed: int = 11) -> Env:
    env = STACKS[stack]()
    env.reset(seed=seed)
    play(env, turns)
    return env


def play(env: Env, turns: int = 99, start: int = 0) -> list[Any]:
    """Take turns until the end; wall-clock times are left out."""
    results = []
    for action in ACTIONS[start : start + turns]:
        result = copy.deepcopy(env.step(action))
        result[4].get("episode", {}).pop("t", None)
        results.append(result)
        if result[2] or result[3]:
            break
    return results


def standing(env: Env, stack: str, turns: int) -> Any:
    """The digest; of a stack that cannot be written, everything that a fork of it would show from here on."""
    if stack not in ("hoarder", "nested"):
        return snapshot(env).digest
    try:
        return play(fork(env), start=turns)
    except EnvError:
        return "the episode has ended"


@pytest.fixture(params=STACKS)
def stack(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("turns", [0, 1, 4])
def test_the_same_actions_give_the_same_episode(stack: str, turns: int) -> None:
    env = begin(stack, turns)
    child, grandchild = fork(env), fork(fork(env))
    here = standing(env, stack, turns)
    assert standing(child, stack, turns) == standing(grandchild, stack, turns) == here
    expected = play(env, start=turns)
    assert play(child, start=turns) == expected
    assert play(grandchild, start=turns) == expected
    assert expected == play(begin(stack), 99)[turns:]


@pytest.mark.parametrize("turns", [0, 1, 4])
def test_neither_side_can_change_the_other(stack: str, turns: int) -> None:
    env = begin(stack, turns)
    expected = play(fork(env), start=turns)
    before = standing(env, stack, turns)
    child = fork(env)
    play(child, start=turns)
    child.reset(seed=5)
    play(child, 2)
    child.close()
    assert standing(env, stack, turns) == before
    child = fork(env)
    play(env)
    env.reset()
    assert play(child, start=turns) == expected


def test_restore_rewinds_and_brings_a_younger_fork_forward(stack: str) -> None:
    env = begin(stack)
    young = fork(env)
    play(env, 3)
    snap, here = snapshot(env), standing(env, stack, 3)
    expected = play(env, start=3)
    for target in (env, young, begin(stack, 5, seed=99), STACKS[stack]()):
        restore(target, snap)
        assert standing(target, stack, 3) == here
        assert play(target, start=3) == expected
        assert standing(target, stack, 3) != here


def test_a_snapshot_can_be_restored_many_times(stack: str) -> None:
    env = begin(stack, 2)
    snap = snapshot(env)
    expected = play(fork(env), start=2)
    for _ in range(3):
        restore(env, snap)
        assert play(env, start=2) == expected


@settings(max_examples=40, deadline=None)
@given(
    actions=st.lists(st.sampled_from(["roll", "hold", "", "\ud800", "x"]), max_size=12),
    split=st.integers(0, 12),
    seed=st.integers(0, 2**64),
)
def test_fork_equals_replay(actions: list[str], split: int, seed: int) -> None:
    """Forking anywhere equals playing everything from the start, whatever the actions."""
    whole, part = STACKS["nested"](), STACKS["nested"]()
    whole.reset(seed=seed)
    part.reset(seed=seed)
    for number, action in enumerate(actions):
        if number == split:
            parent, part = part, fork(part)
            parent.reset(seed=1)
        left, right = whole.step(action), part.step(action)
        for result in (left, right):
            result[4].get("episode", {}).pop("t", None)
        assert left == right
        if left[2] or left[3]:
            break
    assert standing(whole, "nested", 0) == standing(part, "nested", 0)


def test_generators_continue_alike_and_apart() -> None:
    env = begin("made", 2)
    child = fork(env)
    assert child.unwrapped.np_random is not env.unwrapped.np_random
    ours = env.unwrapped.np_random.random(3).tolist()
    assert child.unwrapped.np_random.random(3).tolist() == ours
    seeds = [generator.integers(2**32) for generator in env.unwrapped.np_random.spawn(2)]
    assert [generator.integers(2**32) for generator in child.unwrapped.np_random.spawn(2)] == seeds
    assert fork(env).unwrapped.np_random.spawn(1)[0].random() == env.unwrapped.np_random.spawn(1)[0].random()
    assert child.unwrapped.np_random_seed == env.unwrapped.np_random_seed == 11


def test_an_environment_that_was_never_seeded_forks_alike_too() -> None:
    env = PigEnv()
    env.reset()
    child = fork(env)
    assert play(child) == play(env)
    assert PigEnv().np_random_seed != PigEnv().np_random_seed
    fresh = PigEnv()
    assert fork(fresh).np_random.random() == fresh.np_random.random()


@pytest.mark.parametrize("kind", [np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64])
def test_other_bit_generators_fork_and_survive_json(kind: Any) -> None:
    env = PigEnv()
    env.reset(seed=0)
    env.np_random = np.random.Generator(kind(7))
    env.np_random.integers(10, dtype=np.uint32)
    text = snapshot(env).to_json()
    child = fork(env)
    other = PigEnv()
    restore(other, type(snapshot(env)).from_json(text))
    drawn = env.np_random.integers(2**31, size=700, dtype=np.uint32).tolist()
    assert child.np_random.integers(2**31, size=700, dtype=np.uint32).tolist() == drawn
    assert other.np_random.integers(2**31, size=700, dtype=np.uint32).tolist() == drawn
    assert other.np_random_seed == -1


def test_space_samplers_continue_alike_and_apart() -> None:
    env = Hoarder(PigEnv())
    env.action_space = gymnasium.spaces.Dict({"a": gymnasium.spaces.Discrete(1000)}, seed=4)
    env.reset(seed=0)
    child = fork(env)
    ours = [env.action_space.sample()["a"] for _ in range(4)]
    assert [child.action_space.sample()["a"] for _ in range(4)] == ours
    assert child.unwrapped.action_space is not env.unwrapped.action_space
    child.unwrapped.action_space.seed(1)
    assert env.unwrapped.action_space._np_random is None


def test_a_snapshot_leaves_the_agents_samplers_alone() -> None:
    env = begin("made")
    env.action_space.seed(1)
    snap = snapshot(env)
    first = env.action_space.sample()
    restore(env, snap)
    assert env.action_space.sample() != first


def test_gymnasiums_seeding_rules_hold() -> None:
    env = PigEnv()
    env.reset(seed=42)
    assert env.np_random.random() == np.random.Generator(np.random.PCG64(np.random.SeedSequence(42))).random()
    before = env.np_random
    env.reset()
    assert env.np_random is before
    for bad in (-1, 1.5, "x"):
        with pytest.raises(gymnasium.error.Error):
            env.reset(seed=bad)  # type: ignore[arg-type]


def test_deepcopy_and_pickle_keep_the_episode(stack: str) -> None:
    env = begin(stack, 3)
    expected = play(fork(env), start=3)
    if stack not in ("hoarder", "nested", "transformed", "timed"):  # these hold lambdas
        assert play(pickle.loads(pickle.dumps(env)), start=3) == expected
    if stack not in ("hoarder", "nested"):  # deepcopy shares a closure over self: fork does not
        assert play(copy.deepcopy(env), start=3) == expected


class Holder(gymnasium.Wrapper[Any, Any, Any, Any]):
    def __init__(self, env: Env, thing: Any) -> None:
        super().__init__(env)
        self.thing = thing


@pytest.mark.parametrize(
    "thing",
    [threading.Lock(), (item for item in "ab"), {"deep": [threading.Event()]}, CartPoleEnv(), PigEnv()],
    ids=["lock", "generator", "nested-lock", "env", "forkable-env"],
)
def test_what_cannot_be_copied_is_named(thing: Any) -> None:
    env = Holder(PigEnv(), thing)
    env.reset(seed=0)
    for operation in (fork, snapshot):
        with pytest.raises(SnapshotError, match=r"Holder\.thing holds a .* cannot be copied .*Fix"):
            operation(env)


def test_a_wrapper_may_declare_configuration() -> None:
    class Sharing(Holder):
        fork_config = ("thing",)

    lock = threading.Lock()
    env = Sharing(PigEnv(), lock)
    env.reset(seed=0)
    child = fork(env)
    restore(child, snapshot(env))
    assert child.thing is lock
    assert "thing" not in snapshot(env).to_json()


def test_callables_and_classes_are_configuration() -> None:
    for thing in (len, PigEnv, print, pytest.approx(1).__class__, itertools.chain.from_iterable):
        env = Holder(PigEnv(), thing)
        env.reset(seed=0)
        assert fork(env).thing == thing


def test_attributes_gained_since_a_snapshot_are_dropped() -> None:
    env = Holder(PigEnv(), 1)
    env.reset(seed=0)
    snap = snapshot(env)
    env.late = [1]
    del env.thing
    restore(env, snap)
    assert not hasattr(env, "late")
    assert env.thing == 1


def test_what_does_not_fit_is_refused_before_anything_changes() -> None:
    env = begin("made", 2)
    before = snapshot(env).digest
    for other in (begin("limited"), begin("checked"), TimeLimit(begin("made"), 3)):
        with pytest.raises(SnapshotError, match=r"wrappers|snapshot is of"):
            restore(env, snapshot(other))
    with pytest.raises(SnapshotError, match=r"got str\. Fix: Snapshot\.from_json"):
        restore(env, snapshot(env).to_json())  # type: ignore[arg-type]
    assert snapshot(env).digest == before


@pytest.mark.parametrize("kind", [deque, dict])
def test_a_parent_that_another_thread_changes_is_refused(kind: Any) -> None:
    """What a thread does in the middle of a copy, done here by the copy of an element."""

    class Meddler:
        def __deepcopy__(self, memo: Any) -> Any:
            things.update({len(things): 0}) if kind is dict else things.append(0)
            return self

    things: Any = {0: Meddler(), 1: Meddler()} if kind is dict else kind([Meddler(), Meddler()])
    env = Holder(PigEnv(), things)
    env.reset(seed=0)
    for operation in (fork, snapshot):
        with pytest.raises(SnapshotError, match=r"during iteration\): another thread steps it\. Fix"):
            operation(env)


def test_other_errors_of_a_copy_are_not_hidden() -> None:
    class Odd(gymnasium.Wrapper[Any, Any, Any, Any]):
        def __getattribute__(self, name: str) -> Any:
            if name == "__dict__":
                raise RuntimeError("odd")
            return super().__getattribute__(name)

    with pytest.raises(RuntimeError, match="odd"):
        fork(Odd(PigEnv()))


def test_only_forkable_environments_fork() -> None:
    with pytest.raises(SnapshotError, match=r"CartPoleEnv cannot be forked\. Expected a subclass"):
        fork(TimeLimit(CartPoleEnv(), 5))


def test_forks_of_a_subclass_with_its_own_attributes_share_configuration() -> None:
    class Custom(PigEnv):
        def __init__(self) -> None:
            super().__init__()
            self.index = {"large": list(range(1000))}

    env = Custom()
    env.reset(seed=0)
    assert fork(env).index is env.index
    assert type(fork(env)) is Custom


def test_an_ended_episode_stays_ended_in_a_fork() -> None:
    env = begin("bare")
    env.step("hold")
    with pytest.raises(EnvError, match="game is over"):
        fork(env).step("roll")


def test_forkable_env_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        ForkableEnv()  # type: ignore[abstract]
