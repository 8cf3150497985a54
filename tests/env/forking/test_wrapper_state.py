"""Known wrappers go through JSON with their state, and take nothing but values that fit it."""

from __future__ import annotations

import json
import math
import operator
import random
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import wrappers as gym
from gymnasium.spaces import Box

from at2po_env.contract.testing import PigEnv
from at2po_env.errors import SnapshotError
from at2po_env.forking.base import fork, restore, snapshot
from at2po_env.forking.snapshots import Snapshot
from at2po_env.forking.wrapper_state import read_data, write_data
from at2po_env.wrappers import FullTranscript, NumericView

Env = gymnasium.Env[Any, Any]


class HalfReward(gymnasium.RewardWrapper[Any, Any]):
    """Rewards of another type than Python's: sums of them round as float32."""

    def reward(self, reward: Any) -> Any:
        return np.float32(reward) * np.float32(0.3)


class ShortLimit(gym.TimeLimit):
    """A subclass of a known wrapper without state of its own."""


def base() -> Env:
    return gym.TimeLimit(PigEnv(max_turns=7, render_mode="ansi"), 9)


def numbers(**options: Any) -> Env:
    return NumericView(base(), length=6, choices=["roll", "hold", "?"], **options)


STACKS: dict[str, Callable[[], Env]] = {
    "order": lambda: gym.OrderEnforcing(gym.PassiveEnvChecker(base())),
    "statistics": lambda: gym.RecordEpisodeStatistics(HalfReward(base()), buffer_length=2),
    "autoreset": lambda: gym.Autoreset(gym.RecordEpisodeStatistics(base())),
    "rendered": lambda: gym.RenderCollection(base()),
    "sticky": lambda: gym.StickyAction(base(), 0.5, (1, 3)),
    "repeat": lambda: gym.RepeatAction(base(), 2),
    "delayed": lambda: gym.DelayObservation(base(), 2),
    "delayed numbers": lambda: gym.DelayObservation(numbers(), 2),
    "timed": lambda: gym.TimeAwareObservation(base(), flatten=False),
    "stacked": lambda: gym.FrameStackObservation(numbers(), 3),
    "skipping": lambda: gym.MaxAndSkipObservation(numbers(), 2),
    "normalised": lambda: gym.NormalizeObservation(gym.NormalizeReward(numbers(scaled=True))),
    "transformed": lambda: gym.ClipReward(
        gym.TransformReward(base(), lambda reward: float(reward) * 2), 0, 1
    ),
    "converted": lambda: gym.DtypeObservation(gym.ReshapeObservation(numbers(), (2, 3)), np.int64),
    "transcript": lambda: FullTranscript(base()),
    "subclass": lambda: ShortLimit(PigEnv(), 3),
}


def begin(stack: str, turns: int) -> Env:
    env = STACKS[stack]()
    env.reset(seed=3)
    play(env, turns)
    return env


def play(env: Env, turns: int) -> list[Any]:
    """What a few turns give; arrays as lists, and without times."""
    results = []
    words = not isinstance(env.action_space, gymnasium.spaces.Discrete)
    for number in range(turns):
        observation, reward, terminated, truncated, info = env.step("roll" if words else number % 3 // 2 * 2)
        info.get("episode", {}).pop("t", None)
        shown = json.dumps(
            [observation, reward, terminated, truncated, info], default=lambda item: item.tolist()
        )
        results.append((shown, getattr(observation, "dtype", None), type(reward)))
        if terminated or truncated:
            break
    return results


@pytest.mark.parametrize("turns", [0, 1, 3])
@pytest.mark.parametrize("stack", STACKS)
def test_json_brings_the_state_of_known_wrappers_back(stack: str, turns: int) -> None:
    env = begin(stack, turns)
    snap = snapshot(env)
    read = Snapshot.from_json(snap.to_json())
    assert read.digest == snap.digest
    expected = play(env, 4)
    for target in (env, begin(stack, 2), STACKS[stack]()):
        restore(target, read)
        assert snapshot(target).digest == snap.digest
        assert play(target, 4) == expected
        restore(target, read)  # what is played on does not change what was read
        assert snapshot(target).digest == snap.digest


def test_every_turn_changes_the_digest_of_what_counts_turns() -> None:
    for stack in ("statistics", "sticky", "delayed numbers", "timed", "stacked", "normalised", "rendered"):
        digests = {snapshot(begin(stack, turns)).to_json() for turns in range(4)}
        assert len(digests) == 4, stack


def test_clocks_are_kept_but_do_not_count() -> None:
    one, two = begin("statistics", 2), begin("statistics", 2)
    assert snapshot(one).digest == snapshot(two).digest
    assert snapshot(one).to_json() != snapshot(two).to_json()
    restore(two, Snapshot.from_json(snapshot(one).to_json()))
    assert two.episode_start_time == one.episode_start_time


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 3, 2**70, -1.5, "\ud800 käse", float("inf"), float("-inf"), [1, [2]], (1, (2,), [])),
        *({"$float": "not a tag"}, {"a": {}}, np.float32(0.1), np.int8(-3), np.bool_(True)),
        *(
            np.arange(6, dtype=np.int16).reshape(2, 3)[:, ::2],
            np.array(3.0),
            np.zeros((0, 2)),
            1j * np.ones(2),
        ),
    ],
)
def test_data_comes_back_with_its_type(value: Any) -> None:
    again = read_data(json.loads(json.dumps(write_data(value))))
    assert type(again) is type(value)
    if isinstance(value, np.ndarray | np.generic):
        assert (again.dtype, again.shape) == (value.dtype, value.shape)
        again, value = again.tolist(), value.tolist()
    assert again == value


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, b"x", {1: 2}, np.array([None]), np.array(["a"]), 1j, len]
)
def test_what_is_not_data_is_not_written(value: Any) -> None:
    with pytest.raises(TypeError, match="has no JSON form"):
        write_data([value])


HUGE = {"$array": "AAAA", "dtype": "<f8", "shape": [10**10]}
DAMAGE = [
    ("statistics", {"class": "subprocess:Popen"}, "taken through the wrappers"),
    ("statistics", {"state": {"step": 1}}, "Expected .*'episode_count'"),
    ("statistics", {"state": [1]}, "Expected .*'episode_count'"),
    ("statistics", {"clocks": {}}, "given the clocks {}. Expected .*time_queue"),
    ("statistics", {"episode_count": -1}, "episode_count cannot be read: expected a count"),
    ("statistics", {"episode_count": True}, "expected a count"),
    ("statistics", {"episode_count": 2**31}, "expected a count"),
    ("statistics", {"episode_returns": "1"}, "expected a number"),
    ("statistics", {"episode_returns": 10**400}, "expected a number"),
    ("statistics", {"episode_returns": {"$float": "1e5"}}, "form is unknown"),
    ("statistics", {"return_queue": [0.0] * 3}, "at most 2 entries"),
    ("statistics", {"length_queue": {"$ref": 1}}, "at most 2 entries"),
    ("statistics", {"length_queue": [None]}, "expected a count"),
    ("delayed", {"observation_queue": ["a"] * 3}, "at most 2 entries"),
    ("delayed", {"observation_queue": [3]}, "expected an observation, got 3"),
    ("delayed numbers", {"observation_queue": [HUGE]}, "cannot reshape|buffer size"),
    ("delayed numbers", {"observation_queue": [{**HUGE, "dtype": "O"}]}, "array of O"),
    ("delayed numbers", {"observation_queue": [{**HUGE, "dtype": "V9999999999"}]}, "array of V"),
    ("delayed numbers", {"observation_queue": [{**HUGE, "shape": [-1]}]}, r"shape \[-1\] is unknown"),
    ("delayed numbers", {"observation_queue": [{**HUGE, "surprise": 1}]}, "form is unknown"),
    ("delayed numbers", {"observation_queue": [[1, 2, 3, 4, 5, 6]]}, "expected an observation"),
    ("stacked", {"obs_queue": []}, "expected a list of 3 entries"),
    ("stacked", {"padding_value": "x"}, "expected an observation"),
    ("skipping", {"_obs_buffer": [0]}, "an array of the same shape"),
    ("skipping", {"_obs_buffer": {"$array": "AAAAAAAAAAA=", "dtype": "<f8", "shape": [1]}}, "same shape"),
    ("normalised", {"obs_rms": {"mean": 0.0}}, "expected mean, var and count"),
    ("normalised", {"obs_rms": {"mean": 0.0, "var": 1.0, "count": 1.0}}, "an array of the same shape"),
    ("rendered", {"frame_list": {"$object": "os:system"}}, r"form is unknown: \['\$object'\]"),
    ("rendered", {"frame_list": "x"}, "expected a list"),
    ("sticky", {"last_action": 5}, "expected an action"),
    ("sticky", {"is_sticky_actions": 1}, "expected true or false"),
    ("sticky", {"is_sticky_actions": True}, "no action to repeat"),
    ("transcript", {"state": 5}, "continues from a text"),
]


@pytest.mark.parametrize(("stack", "change", "message"), DAMAGE, ids=[str(case[1])[:50] for case in DAMAGE])
def test_state_that_does_not_fit_changes_nothing(stack: str, change: Any, message: str) -> None:
    env = begin(stack, 0)
    data = json.loads(snapshot(env).to_json())
    layer = data["wrappers"][0]
    for name, value in change.items():
        part = layer if name in layer else layer["state"] if name in layer["state"] else layer["clocks"]
        part[name] = value
    play(env, 1)
    before = snapshot(env).to_json()
    with pytest.raises(SnapshotError, match=message):
        restore(env, Snapshot.from_json(json.dumps(data)))
    assert snapshot(env).to_json() == before


@pytest.mark.parametrize("turns", [0, 10**10, "1", None, 1.5])
def test_attributes_that_are_no_state_cannot_be_given(turns: Any) -> None:
    env = begin("subclass", 1)
    data = json.loads(snapshot(env).to_json())
    for name in ("_max_episode_steps", "step", "env", "__class__"):
        data["wrappers"][0]["state"] = {"_elapsed_steps": 1, name: turns}
        with pytest.raises(SnapshotError, match="Expected"):
            restore(env, Snapshot.from_json(json.dumps(data)))
    assert vars(env)["_max_episode_steps"] == 3
    assert isinstance(env.env.observation_space, type(PigEnv().observation_space))


def with_generator(kind: Any, **changes: Any) -> tuple[Env, Any]:
    env = PigEnv()
    env.reset(seed=0)
    env.np_random = np.random.Generator(kind(7))
    data = json.loads(snapshot(env).to_json())
    state = data["state"]["rng"]["state"]
    for name, value in changes.items():
        (state if name in state else state["state"])[name] = value
    return env, data


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (np.random.PCG64, {"bit_generator": "Evil"}, "expected a bit generator"),
        (np.random.PCG64, {"bit_generator": ["PCG64"]}, "TypeError"),
        (np.random.PCG64, {"inc": 0, "state": {"state": 0, "inc": 0}}, "one number for ever"),
        (np.random.PCG64, {"uinteger": 2**32}, "uinteger is no whole number"),
        (np.random.PCG64, {"has_uint32": True}, "has_uint32 is no whole number"),
        (np.random.PCG64, {"state": {"state": -1, "inc": 1}}, "state is no whole number"),
        (np.random.MT19937, {"pos": 625}, "pos is no whole number from 0 to 624"),
        (np.random.MT19937, {"pos": -1}, "pos is no whole number"),
        (np.random.MT19937, {"key": [0] * 624}, "one number for ever"),
        (np.random.MT19937, {"key": [1] * 623}, "key needs a list of 624 numbers"),
        (np.random.Philox, {"buffer_pos": 5}, "buffer_pos is no whole number from 0 to 4"),
        (np.random.Philox, {"buffer_pos": -(10**6)}, "buffer_pos is no whole number"),
        (np.random.SFC64, {"state": {"state": [2**64] * 4}}, "state is no whole number"),
    ],
)
def test_generators_that_numpy_would_not_survive_are_refused(kind: Any, changes: Any, message: str) -> None:
    env, data = with_generator(kind, **changes)
    with pytest.raises(SnapshotError, match=message):
        restore(env, Snapshot.from_json(json.dumps(data)))


@pytest.mark.parametrize(
    "seeds",
    [
        [7, [], 10**10, 0],
        [7, [], 3, 0],
        [7, [], 4, 2**32],
        [7, [], 4, -1],
        [-7, [], 4, 0],
        [1 << 1025, [], 4, 0],
        [[1] * 2000, [], 4, 0],
        [7, ["a"], 4, 0],
        [7, None, 4, 0],
        [7, [], 4],
        7,
    ],
)
def test_seeds_without_bounds_are_refused(seeds: Any) -> None:
    env, data = with_generator(np.random.PCG64)
    data["state"]["rng"]["seeds"] = seeds
    with pytest.raises(SnapshotError, match="not a random generator"):
        restore(env, Snapshot.from_json(json.dumps(data)))


def test_a_missing_or_huge_seed_is_refused() -> None:
    env, data = with_generator(np.random.PCG64)
    for seed in (1 << 1024, -2, 1.0, "1", True):
        data["state"]["seed"] = seed
        with pytest.raises(SnapshotError, match="Expected a whole number from -1"):
            restore(env, Snapshot.from_json(json.dumps(data)))


def test_an_observation_space_that_raises_refuses() -> None:
    env = begin("delayed numbers", 1)
    data = json.loads(snapshot(env).to_json())
    env.env.observation_space = type("Odd", (Box,), {"contains": lambda *_: 1 / 0})(0, 256, (6,), np.int32)
    with pytest.raises(SnapshotError, match="observation_queue cannot be read: division"):
        restore(env, Snapshot.from_json(json.dumps(data)))


def test_methods_of_c_code_that_carry_state_are_copied_by_forks_and_not_lost_by_json() -> None:
    class Holding(gymnasium.Wrapper[Any, Any, Any, Any]):
        def __init__(self, env: Any, call: Any) -> None:
            super().__init__(env)
            self.call = call

    for call in (random.Random(0).random, [3, 2, 1].pop, {}.get):
        env = Holding(PigEnv(), call)
        env.reset(seed=0)
        assert fork(env).call.__self__ is not call.__self__
        with pytest.raises(SnapshotError, match=r"Holding\.call holds a .*fork_config"):
            snapshot(env).to_json()
    for call in (math.sqrt, len, str.upper, "abc".upper, operator.itemgetter(1)):
        env = Holding(PigEnv(), call)
        env.reset(seed=0)
        snapshot(env).to_json()
