"""Thousands of mutated snapshots: each is refused without a trace, or is a state like any other."""

from __future__ import annotations

import json
import random
from typing import Any

import gymnasium
import pytest

from at2po_env.contract.testing import PigEnv
from benchmarks.campaign.snapshots import STACKS, Target, mutate


def attack(stack: str, *, tries: int, seed: int = 0) -> list[str]:
    """What goes wrong in so many tries."""
    target = Target(stack)
    found = [target.attempt(random.Random(f"{seed}/{number}"), number) for number in range(tries)]
    return [what for what in found if what]


@pytest.mark.parametrize("stack", STACKS)
def test_mutated_snapshots_do_no_harm(stack: str) -> None:
    assert attack(stack, tries=800, seed=1) == []


def test_mutations_are_seeded_and_reach_every_part() -> None:
    text = json.dumps({"version": 1, "state": {"seed": 3, "rng": [1, 2, 3]}, "wrappers": [{"class": "x"}]})
    texts = [mutate(text, random.Random(seed)) for seed in range(500)]
    assert texts == [mutate(text, random.Random(seed)) for seed in range(500)]
    for part in ('"version": 1', '"seed": 3', '"class": "x"', "[1, 2, 3]"):
        kept = sum(part in mutated for mutated in texts)
        assert 100 < kept < 490, part


class Trusting(PigEnv):
    """Believes whatever it is given."""

    def load_state(self, data: Any) -> Any:
        return super().load_state([0, 0, False])._replace(points=data[0], over=False)


class Leaky(PigEnv):
    """Keeps what it was given, even when it refuses it."""

    def load_state(self, data: Any) -> Any:
        self.last = data
        return super().load_state(data)


@pytest.mark.parametrize(
    ("env", "what"),
    [(Trusting, "TypeError: "), (Leaky, "gained or lost an attribute")],
    ids=["trusts", "leaks"],
)
def test_harm_is_noticed(
    monkeypatch: pytest.MonkeyPatch, env: type[gymnasium.Env[Any, Any]], what: str
) -> None:
    """The negative control: environments with planted faults fail."""
    monkeypatch.setitem(STACKS, "planted", env)  # type: ignore[arg-type]
    failures = attack("planted", tries=300)
    assert any(what in failure for failure in failures)
