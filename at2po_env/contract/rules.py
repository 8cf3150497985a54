"""Checks the fork contract: a fork is the same episode, and independent of the one it came from.

Each check plays the same actions twice from the same point (in parent and fork, before and after `restore`,
live and through JSON) and demands the same observations, rewards, ends and infos. A failed check raises
`ContractError` with the expected and the actual value and the likely cause.
"""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.wrappers import RecordEpisodeStatistics

from at2po_env.errors import At2poError, ContractError
from at2po_env.forking.base import ForkableEnv, fork, restore, snapshot
from at2po_env.forking.snapshots import Snapshot

Env = gymnasium.Env[Any, Any]
MAX_TURNS = 32
BAD_ACTIONS = ("", "\x00", "\ud800", "<", "<answer>", "}{", "\\boxed{", "🙂" * 50, "a" * 20_000)
_RNGS = (np.random.Generator, np.random.RandomState, random.Random, np.random.BitGenerator)
_PLAIN = (bool, int, float, str)


class StepResult(NamedTuple):
    """The five values that one call of `step` returned."""

    observation: Any
    reward: Any
    terminated: bool
    truncated: bool
    info: Mapping[str, Any]


class Play(NamedTuple):
    """A script for the checks: where an episode begins and which actions it takes.

    Attributes:
        actions: Played in order, and over again until the episode ends or after 32 turns.
        seed: Seed of every reset.
        options: Options of every reset.
        ignore_info: Keys of `info` that may differ between two runs, such as clocks.
    """

    actions: Sequence[Any]
    seed: int = 123
    options: dict[str, Any] | None = None
    ignore_info: Collection[str] = ()

    def begin(self, env: Env, turns: int) -> bool:
        """Reset and take some turns; False if the episode ended on the way."""
        env.reset(seed=self.seed, options=copy.deepcopy(self.options))
        return not any(step.terminated or step.truncated for step in self.run(env, 0, turns))

    def run(self, env: Env, start: int, count: int = MAX_TURNS) -> list[StepResult]:
        """Take turns until the episode ends, at most `count`; actions are chosen by turn number."""
        steps = []
        clocks, layer = set[str](), env
        while isinstance(layer, gymnasium.Wrapper):
            if isinstance(layer, RecordEpisodeStatistics):
                clocks.add(layer._stats_key)
            layer = layer.env
        for turn in range(start, start + count):
            observation, reward, terminated, truncated, info = env.step(
                self.actions[turn % len(self.actions)]
            )
            kept = {key: value for key, value in info.items() if key not in self.ignore_info}
            for clock in clocks & kept.keys():
                kept[clock] = {key: value for key, value in kept[clock].items() if key != "t"}
            steps.append(copy.deepcopy(StepResult(observation, reward, terminated, truncated, kept)))
            if terminated or truncated:
                break
        return steps


def plays_of(play: Play) -> list[Play]:
    """Return the play, and its first two actions each alone over and over, which exhausts budgets."""
    return [play, *[play._replace(actions=[action]) for action in play.actions[:2]]]


def points_of(env: Env, play: Play) -> Iterator[tuple[Play, int]]:
    """Bring the environment to every point at which the checks fork: before turn 1, 2 and 4 of each play."""
    for script in plays_of(play):
        for turns in (0, 1, 3):
            if script.begin(env, turns):
                yield script, turns


def check_deterministic(env: Env, play: Play) -> None:
    """The same seed, options and actions give the same episode.

    This holds for the environment under the wrappers; a wrapper may learn from one episode for the next.
    """
    base = env.unwrapped
    if not all(base.action_space.contains(action) for action in play.actions):
        return
    for script in plays_of(play):
        runs = []
        for _ in range(2):
            observation, info = base.reset(seed=script.seed, options=copy.deepcopy(script.options))
            kept = {key: value for key, value in info.items() if key not in script.ignore_info}
            first = copy.deepcopy(StepResult(observation, 0.0, terminated=False, truncated=False, info=kept))
            runs.append([first, *script.run(base, 0)])
        cause = "randomness that reset(seed=...) does not set, a clock, or something an earlier episode left"
        _expect_equal(runs[0], runs[1], -1, "the first time", "after another reset", base, base, cause)


def check_fork(env: Env, play: Play) -> None:
    """A fork has the state of its parent; the same actions give the same in both; forks can be forked."""
    for script, turn in points_of(env, play):
        child, grandchild = fork(env), fork(fork(env))
        if child is env or child.unwrapped is env.unwrapped:
            _fail("fork returns another environment", "two objects", "one", "a fork method that returns self")
        _expect_digest(snapshot(env), snapshot(child), "a fork's state is its parent's", _shared(env, child))
        expected = script.run(child, turn)
        _expect_equal(
            expected, script.run(grandchild, turn), turn, "the fork", "a fork of a fork", env, child
        )
        _expect_equal(expected, script.run(env, turn), turn, "the fork", "the parent", env, child)


def check_spaces(env: Env, play: Play) -> None:
    """Every observation lies in the observation space, through all wrappers and in every turn."""
    for script in plays_of(play):
        first, _ = env.reset(seed=script.seed, options=copy.deepcopy(script.options))
        steps = script.run(env, 0)
        for turn, observation in enumerate([first, *[step.observation for step in steps]]):
            if not env.observation_space.contains(observation):
                _fail(
                    f"the observation after turn {turn} lies in the observation space",
                    env.observation_space,
                    _short(observation),
                    "a space that is too small, or an observation of another type",
                )


def check_independence(env: Env, play: Play) -> None:
    """Neither side of a fork can change the other, whichever moves first; nor can closing one."""
    for script, turn in points_of(env, play):
        first, second = fork(env), fork(env)
        before = snapshot(env)
        expected = script.run(first, turn)
        first.close()
        _expect_digest(before, snapshot(env), "playing a fork leaves its parent alone", _shared(env, first))
        script._replace(actions=list(reversed(script.actions))).run(env, turn)
        env.reset(seed=play.seed + 1, options=copy.deepcopy(play.options))
        actual = script.run(second, turn)
        _expect_equal(expected, actual, turn, "a fork", "a fork whose parent has moved on", env, second)


def check_restore(env: Env, play: Play) -> None:
    """Restoring rewinds an environment, and brings a younger or ended one to the same point."""
    for script, turn in points_of(env, play):
        snap, plain = snapshot(env), _scalars(env)
        child = fork(env)
        expected = script.run(env, turn)
        restore(env, snap)
        _expect_digest(snap, snapshot(env), "restore brings the captured state back", "")
        after = _scalars(env)
        for name, value in plain.items():
            if name in after and type(after[name]) is type(value) and after[name] != value:
                _fail(
                    "restore rewinds everything that changes during an episode",
                    f"attribute {name} = {value!r}",
                    f"{name} = {after[name]!r}",
                    f"{name} is not part of get_state/set_state",
                )
        _expect_equal(expected, script.run(env, turn), turn, "the first time", "after restore", env, env)
        script.run(child, turn, 1)
        restore(child, snap)
        actual = script.run(child, turn)
        _expect_equal(expected, actual, turn, "the first time", "restored into a fork", env, child)


def check_json(env: Env, play: Play) -> None:
    """A snapshot survives JSON, and fits an environment built afresh that was never reset."""
    for script, turn in points_of(env, play):
        snap = snapshot(env)
        read = Snapshot.from_json(snap.to_json())
        _expect_digest(snap, read, "a snapshot survives JSON", "load_state or dump_state loses something")
        expected = script.run(fork(env), turn)
        for place, target in (("the same environment", env), ("a fresh environment", build(env.spec))):
            if target is None:
                continue
            restore(target, read)
            cause = "load_state does not give back what dump_state was given"
            _expect_digest(snap, snapshot(target), f"a snapshot read into {place} is the same state", cause)
            actual = script.run(target, turn)
            _expect_equal(expected, actual, turn, "live", f"through JSON in {place}", env, target)


def check_copies(env: Env, play: Play) -> None:
    """`copy.deepcopy` and `pickle` either refuse or keep the episode; losing it silently is an error."""
    for script, turn in points_of(env, play):
        expected = script.run(fork(env), turn)
        for name in ("deepcopy", "pickle"):
            try:
                twin: Env = copy.deepcopy(env) if name == "deepcopy" else pickle.loads(pickle.dumps(env))
            except Exception:  # noqa: BLE001  # a loud refusal is allowed, whatever its type
                continue
            cause = "gymnasium.utils.EzPickle rebuilds the environment without its episode: do not inherit it"
            _expect_digest(snapshot(env), snapshot(twin), f"{name} keeps the episode", cause)
            _expect_equal(expected, script.run(twin, turn), turn, "a fork", f"a {name}", env, twin)


def check_generators(env: Env, play: Play) -> None:
    """Random streams continue alike on both sides of a fork, and are never shared."""
    play.begin(env, 0)
    env.unwrapped.np_random.random()
    child = fork(env)
    for name, value in vars(env.unwrapped).items():
        if isinstance(value, _RNGS) and vars(child.unwrapped).get(name) is value:
            _fail(
                "fork gives the child its own random generator",
                "two generators",
                f"{type(env.unwrapped).__name__}.{name} is one {type(value).__name__} on both sides",
                "a generator kept in an attribute: draw from self.np_random, which is forked and restored",
            )
    ours, theirs = env.unwrapped.np_random.random(4).tolist(), child.unwrapped.np_random.random(4).tolist()
    if ours != theirs:
        _fail("np_random continues alike after a fork", ours, theirs, "fork or set_state seeds it anew")
    for name in ("action_space", "observation_space"):
        mine, own = getattr(env, name), getattr(child, name)
        if mine != own:
            _fail(f"fork keeps the {name}", mine, own, "a space that depends on state outside get_state")
        if mine is own:
            _fail(f"fork gives the child its own {name}", "two spaces", "one", "a property that returns one")


def check_bad_actions(env: Env, play: Play) -> None:
    """Text of any kind is an action: a recorded outcome, never an exception."""
    for action in BAD_ACTIONS:
        if not play.begin(env, 0) or not env.action_space.contains(action):
            continue
        try:
            result: Any = env.step(action)
        except Exception as error:  # the check is that nothing is raised, whatever its type
            raise ContractError(
                f"step({action[:20]!r}) raised {type(error).__name__}: {error}\n  expected: a recorded "
                "outcome\n  likely cause: parsing that raises; what a policy writes is data, not an error"
            ) from error
        if not isinstance(result, tuple) or len(result) != 5:
            _fail(f"step({action[:20]!r}) returns five values", 5, result, "a missing return")


CHECKS: Mapping[str, Callable[[Env, Play], None]] = {
    "deterministic": check_deterministic,
    "spaces": check_spaces,
    "fork": check_fork,
    "independence": check_independence,
    "restore": check_restore,
    "json": check_json,
    "copies": check_copies,
    "generators": check_generators,
    "bad_actions": check_bad_actions,
}


def build(spec: EnvSpec | None) -> Env | None:
    """Build an environment from a spec, or return `None` where that is not possible."""
    try:
        return None if spec is None else gymnasium.make(spec)
    except (gymnasium.error.Error, At2poError, TypeError, ValueError, ImportError, AttributeError):
        return None  # a wrapper that does not record its arguments, an object among the kwargs


def _scalars(env: Env) -> dict[str, Any]:
    """Return the plain attributes of the environment under the wrappers, but those of `ForkableEnv`."""
    own = vars(ForkableEnv)
    held = vars(env.unwrapped).items()
    return {name: value for name, value in held if type(value) in _PLAIN and name not in own}


def _shared(env: Env, child: Env) -> str:
    """Name the mutable objects that both sides hold: the usual way in which a fork leaks."""
    base = env.unwrapped
    held = vars(child.unwrapped)
    names = []
    for name, value in vars(base).items():
        function = isinstance(value, type) or (type(value).__module__ == "builtins" and callable(value))
        mutable = isinstance(value, (list, dict, set, np.ndarray, bytearray, *_RNGS))
        if held.get(name) is value and not function and (mutable or hasattr(value, "__dict__")):
            names.append(f"{type(base).__name__}.{name} ({type(value).__name__})")
    shared = (
        ", ".join(names) or "none among the environment's attributes: look for globals and class attributes"
    )
    return f"mutable state outside get_state(). Objects that fork shares: {shared}"


def _expect_digest(expected: Snapshot, actual: Snapshot, rule: str, cause: str) -> None:
    if expected.digest == actual.digest:
        return
    path, left, right = first_difference(
        {"state": expected.state.json, "wrappers": expected.wrappers.json},
        {"state": actual.state.json, "wrappers": actual.wrappers.json},
        "snapshot",
    )
    _fail(rule, f"{path} = {left}", f"{path} = {right}", cause or "set_state does not set it")


def first_difference(left: Any, right: Any, path: str) -> tuple[str, str, str]:
    """Return the path at which two JSON values first differ, and both values, shortened."""
    if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
        pairs = [(f"{path}.{key}", left[key], right[key]) for key in left]
    elif isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        pairs = [(f"{path}[{i}]", *pair) for i, pair in enumerate(zip(left, right, strict=True))]
    else:
        return path, _short(left), _short(right)
    for place, one, other in pairs:
        if not data_equivalence(one, other, exact=True):  # values may hold arrays
            return first_difference(one, other, place)
    return path, _short(left), _short(right)


def _expect_equal(
    expected: Sequence[StepResult],
    actual: Sequence[StepResult],
    turn: int,
    one: str,
    other: str,
    env: Env,
    child: Env,
    cause: str = "",
) -> None:
    """Raise at the first turn where two runs of the same actions differ; turn 0 is the reset."""
    for number, (left, right) in enumerate(zip(expected, actual, strict=False), turn + 1):
        for field, mine, theirs in zip(StepResult._fields, left, right, strict=True):
            if not data_equivalence(mine, theirs, exact=True):
                if isinstance(mine, dict) and isinstance(theirs, dict):
                    field, mine, theirs = first_difference(mine, theirs, field)
                _fail(
                    f"the same actions give the same {field} at turn {number}",
                    f"{_short(mine)} ({one})",
                    f"{_short(theirs)} ({other})",
                    cause or _shared(env, child),
                )
    if len(expected) != len(actual):
        _fail(
            "the same actions end the episode at the same turn",
            f"{turn + len(expected)} ({one})",
            f"{turn + len(actual)} ({other})",
            cause or "a budget or counter outside get_state()",
        )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"


def _fail(rule: str, expected: Any, actual: Any, cause: str) -> NoReturn:
    raise ContractError(
        f"Broken: {rule}\n  expected: {expected}\n  actual: {actual}\n  likely cause: {cause}"
    )
