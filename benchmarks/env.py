"""Measures a fork and a step of the search-QA environment with a retriever that answers at once.

    python -m benchmarks.env --json

Keys without a suffix are of the environment that `gymnasium.make` returns; `_wrapped` puts Gymnasium's
checker, OrderEnforcing and TimeLimit around it. `fork_us_turn1` and `fork_us_turn100` are one `fork` and one
`restore` together, `deepcopy_us` is `copy.deepcopy` of the same environment at turn 100, `steps_per_second`
counts the steps of whole episodes (six searches and the scored answer), resets included.

Everything runs in one thread and is timed by its CPU clock, which equals the wall clock on an idle machine
and leaves out the time that other processes take on a busy one.
"""

from __future__ import annotations

import copy
import functools
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit

import at2po_env
from at2po_env.retrieval.base import Passage, Retriever
from benchmarks._timing import Case, command_line, measure, repeat, report

SEARCH = "<think>The film's director should be in its article.</think>\n<search>director of the film</search>"
ANSWER = "<think>That is the one.</think>\n<answer>\\boxed{Ada Lovelace}</answer>"
EPISODE = (*[SEARCH] * 6, ANSWER)
EPISODES = 100
LONG = 120


class StubRetriever:
    """Answers every query with the same passages, without looking anything up."""

    digest = "stub"

    def __init__(self) -> None:
        texts = ["A film directed by nobody in particular. " * 2] * 3
        self._passages = [Passage(f"{i}", f"Title {i}", text, 1.0) for i, text in enumerate(texts)]

    def search(self, queries: Sequence[str], topk: int) -> list[list[Passage]]:
        """The same passages for every query."""
        return [self._passages[:topk] for _ in queries]


def make(**options: Any) -> gymnasium.Env[str, str]:
    """The HotpotQA environment over the shipped sample of questions."""
    retriever: Retriever = StubRetriever()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the sample is what is wanted here
        return gymnasium.make("at2po/HotpotQA-v0", retriever=retriever, **options)


def wrapped(**options: Any) -> gymnasium.Env[str, str]:
    """The same under the wrappers that Gymnasium adds by default, and a time limit."""
    return TimeLimit(OrderEnforcing(PassiveEnvChecker(make(**options))), 10_000)


def at_turn(turn: int, build: Callable[..., gymnasium.Env[str, str]]) -> gymnasium.Env[str, str]:
    """An environment after `turn` searches."""
    env = build(max_turns=LONG)
    env.reset(seed=0)
    for _ in range(turn):
        env.step(SEARCH)
    return env


MICROSECONDS = {
    "fork_turn1": "fork_us_turn1",
    "fork_turn100": "fork_us_turn100",
    "snapshot": "snapshot_us",
    "deepcopy": "deepcopy_us",
}
KINDS: Mapping[str, Callable[..., gymnasium.Env[str, str]]] = {"": make, "_wrapped": wrapped}


def fork_case(env: gymnasium.Env[str, str]) -> Case:
    """One fork and one restore of that fork."""
    snap = at2po_env.snapshot(env)
    fork, restore = at2po_env.fork, at2po_env.restore

    def once() -> None:
        restore(fork(env), snap)

    return repeat(once, 2_000)


def step_case(env: gymnasium.Env[str, str]) -> Case:
    """Whole episodes, one after the other."""

    def run() -> None:
        step, reset = env.step, env.reset
        for _ in range(EPISODES):
            reset()
            for action in EPISODE:
                step(action)

    env.reset(seed=0)
    return Case(run, EPISODES * len(EPISODE))


def main() -> None:
    """Measure and print."""
    options = command_line(__doc__, rounds=15).parse_args()
    cases: dict[str, Case] = {}
    for suffix, build in KINDS.items():
        young, old = at_turn(1, build), at_turn(100, build)
        cases |= {
            f"steps{suffix}": step_case(build()),
            f"fork_turn1{suffix}": fork_case(young),
            f"fork_turn100{suffix}": fork_case(old),
            f"snapshot{suffix}": repeat(functools.partial(at2po_env.snapshot, old), 2_000),
            f"deepcopy{suffix}": repeat(functools.partial(copy.deepcopy, old), 20),
        }
    timings = measure(cases, rounds=options.rounds, clock=time.thread_time)
    result: dict[str, Any] = {}
    for suffix in KINDS:
        median = {name: timings[name + suffix].median for name in (*MICROSECONDS, "steps")}
        result |= {key + suffix: median[name] * 1e6 for name, key in MICROSECONDS.items()}
        result[f"steps_per_second{suffix}"] = 1 / median["steps"]
        result[f"fork_ratio_100_to_1{suffix}"] = median["fork_turn100"] / median["fork_turn1"]
        result[f"deepcopy_to_fork{suffix}"] = median["deepcopy"] / median["fork_turn100"]
    result["spread"] = {name: round(timing.spread, 4) for name, timing in timings.items()}
    result["rounds"] = options.rounds
    report(result, options)


if __name__ == "__main__":
    main()
