"""Attacks snapshots: seeded mutations of valid ones are read, restored and played on.

A mutated snapshot is either refused with one of at2po's errors, and then nothing has changed, or it gives
other values to the declared state, and then the episode goes on. Anything else is a failure: another
exception, an attribute gained or lost, a changed wrapper, an imported module, or a try of more than a second.
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gymnasium
from gymnasium import wrappers as gym

from at2po_env import Snapshot, ToolEnv, restore, snapshot
from at2po_env.contract.testing import PigEnv
from at2po_env.errors import At2poError
from at2po_env.wrappers import FullTranscript, NumericView
from benchmarks.campaign.runner import Try

Env = gymnasium.Env[Any, Any]
LIMIT_S = 1.0
NAMES = (
    *("step", "env", "__class__", "_max_episode_steps", "class", "state", ""),
    *("$ref", "$id", "$object", "$array"),
)
JUNK = json.loads("""[
  null, true, false, 0, -1, 3, 2147483648, 10000000000, 18446744073709551616,
  -10000000000000000000000000000000000000000, 0.5, -1e308, "", "x", "\\ud800", [], {},
  [null], [[]], {"a": 1}, "PCG64", "MT19937", "os:system", {"$ref": 0}, {"$id": 0, "$value": [{"$ref": 0}]},
  {"$float": "nan"}, {"$tuple": [1, "x"]}, {"$dict": {"a": []}}, {"$object": "subprocess:Popen"},
  {"$array": "AAAAAAAAAAA=", "dtype": "<f8", "shape": [1]},
  {"$array": "AAAA", "dtype": "O", "shape": [10000000000]},
  {"$array": "AAAA", "dtype": "<f8", "shape": [10000000000]},
  {"$array": "AAAA", "dtype": "V9999999999", "shape": [10000000000]},
  {"$array": "AAAAAAAA8D8=", "dtype": "<f8", "shape": null}
]""")


def _numbers() -> Env:
    return NumericView(gym.TimeLimit(PigEnv(max_turns=6), 9), length=6, choices=["roll", "?"], scaled=True)


def _tools() -> Env:
    def add(a: float, b: float) -> float:
        """Add two numbers."""
        return a + b

    tasks: Any = [{"question": "What is 2 + 2?", "golden_answers": ["4"]}]
    return ToolEnv(tools=[add], tasks=tasks, reward="tag", protocol="hermes", max_turns=5)


STACKS: Mapping[str, Callable[[], Env]] = {
    "bare": PigEnv,
    "tools": lambda: gym.RecordEpisodeStatistics(gym.TimeLimit(_tools(), 9)),
    "text": lambda: gym.DelayObservation(
        gym.StickyAction(
            gym.OrderEnforcing(
                gym.PassiveEnvChecker(gym.RecordEpisodeStatistics(gym.TimeLimit(PigEnv(), 9)))
            ),
            0.5,
        ),
        2,
    ),
    "views": lambda: gym.RenderCollection(gym.Autoreset(FullTranscript(PigEnv(render_mode="ansi")))),
    "numbers": lambda: gym.NormalizeReward(
        gym.NormalizeObservation(gym.FrameStackObservation(gym.MaxAndSkipObservation(_numbers(), 2), 3))
    ),
}


def mutate(text: str, rng: random.Random) -> str:
    """Return a snapshot's text with one to three changes, of its values or of the text itself."""
    if rng.random() < 0.1:
        at, junk = (
            rng.randrange(len(text)),
            rng.choice(("", "NaN", "1e999", "[" * 100_000, '"', "\x00", "{}")),
        )
        return text[:at] + junk + text[at + rng.randrange(1, 9) :]
    data = json.loads(text)
    for _ in range(rng.randint(1, 3)):
        places: list[tuple[Any, Any]] = []
        queue = [data]
        for value in queue:
            keys = list(value) if isinstance(value, dict) else range(min(len(value), 20))
            places.extend((value, key) for key in keys)
            queue.extend(value[key] for key in keys if isinstance(value[key], dict | list))
        holder, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind == 0:
            holder[key] = copy.deepcopy(rng.choice(JUNK))
        elif kind == 1:
            other, there = rng.choice(places)
            holder[key] = copy.deepcopy(other[there])
        elif kind == 2:
            del holder[key]
        elif kind == 3 and isinstance(holder, dict):
            holder[rng.choice(NAMES)] = holder.pop(key)
        elif kind == 4 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            change = rng.choice((1, -1, 2**31, 2**64, 10**10, -(10**30)))
            holder[key] = rng.choice((holder[key] + change, -holder[key], float(change), bool(change)))
        elif isinstance(holder[key], list):
            holder[key] = holder[key] * rng.choice((0, 2, 50)) + [copy.deepcopy(rng.choice(JUNK))]
        elif isinstance(holder[key], dict):
            holder[key][rng.choice(NAMES)] = copy.deepcopy(rng.choice(JUNK))
        else:
            holder[key] = [holder[key]]
        if not isinstance(data, dict) or not data:
            break
    return json.dumps(data)


@contextlib.contextmanager
def mutated_snapshots(folder: Path) -> Iterator[Try]:
    """The stacks of wrappers take turns."""
    del folder
    targets = [Target(stack) for stack in STACKS]
    yield lambda rng, number: targets[number % len(targets)].attempt(rng, number // len(targets))


class Target:
    """A stack of wrappers with valid snapshots of it.

    Args:
        stack: Its name.
    """

    def __init__(self, stack: str) -> None:
        self._stack, self._env = stack, STACKS[stack]()
        self._play = [*self._env.unwrapped.example_actions(), ""]  # type: ignore[attr-defined]
        self._valid = []
        for turns in (0, 1, 3):
            self._env.reset(seed=turns)
            for turn in range(turns):
                _, _, terminated, truncated, _ = self._env.step(_action(self._env, self._play, turn))
                if terminated or truncated:
                    break
            self._valid.append(snapshot(self._env))
        self._texts = [snap.to_json() for snap in self._valid]

    def attempt(self, rng: random.Random, number: int) -> str:
        """Try a mutated snapshot; returns what went wrong."""
        text = mutate(self._texts[number % len(self._texts)], rng)
        restore(self._env, self._valid[0])
        what = _try(self._env, text, self._texts[0], self._play)
        return f"{self._stack}: {what}: {text[:1_000]}" if what else ""


def _action(env: Env, play: list[str], turn: int) -> Any:
    return play[turn % len(play)] if env.action_space.contains(play[0]) else turn % 2


def _try(env: Env, text: str, before: str, play: list[str]) -> str:
    """Read, restore and play one text; return what went wrong, or ""."""
    layers = [env]
    while isinstance(layers[-1], gymnasium.Wrapper):
        layers.append(layers[-1].env)
    config = [(type(layer), sorted(vars(layer)), vars(layer).get("env")) for layer in layers]
    modules, started = len(sys.modules), time.thread_time()
    try:
        try:
            snap = Snapshot.from_json(text)
            _ = snap.digest
            restore(env, snap)
        except At2poError:
            if snapshot(env).to_json() != before:
                return "it was refused and has changed the environment"
        else:
            _play(env, layers, play)
    except Exception as error:  # noqa: BLE001  (this is what is looked for)
        return f"{type(error).__name__}: {error}"
    if time.thread_time() - started > LIMIT_S:
        return f"it took {time.thread_time() - started:.1f} s"
    if config != [(type(layer), sorted(vars(layer)), vars(layer).get("env")) for layer in layers]:
        return "a wrapper has gained or lost an attribute"
    return "" if len(sys.modules) == modules else "a module was imported"


def _play(env: Env, layers: list[Env], play: list[str]) -> None:
    if any(isinstance(layer, gym.TimeLimit) and layer._elapsed_steps is None for layer in layers):
        return  # Gymnasium's own limit was never reset and says so with a TypeError
    try:
        for turn in range(3):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # sums of huge numbers overflow
                env.step(_action(env, play, turn))
            snapshot(env)
    except (At2poError, gymnasium.error.Error):
        pass  # the episode has ended, or was never begun
    restore(env, snapshot(env))
