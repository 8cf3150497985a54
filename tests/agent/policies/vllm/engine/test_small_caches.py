"""Engines that hold less than what was sampled: blocks are given away while forks still look for them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.vllm_tiny_engine import ids, running, tiny_model, worst_error

from at2po_agent.policies.base import Request

TOLERANCE = 1e-4


def semaphores() -> set[str]:
    """Those of multiprocessing that exist."""
    return {path.name for path in Path("/dev/shm").glob("sem.mp-*")}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(seed=4)


@pytest.fixture(scope="module", params=["auto", False], ids=["exact", "blocks"])
def engine(model: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Some 75 blocks of 32 tokens."""
    before = semaphores()
    with running(model, exact_prefixes=request.param, kv_cache_gb=0.00115) as policy:
        yield policy
    assert semaphores() <= before  # or the end of the program would warn of them


def test_prefixes_are_shared_to_the_token_or_to_the_block(engine: Any) -> None:
    prompt = ids(random.Random(0), 60)
    engine.weights_changed()
    engine.generate([Request(prompt, 3)])
    before = engine.stats.prefill_tokens
    engine.generate([Request((*prompt, 9), 3)])
    exact = engine.config.exact_prefixes == "auto"
    assert engine.stats.prefill_tokens - before == (1 if exact else 61 - 32)


def test_forks_of_what_was_given_away_meanwhile_sample_what_the_model_says(engine: Any, model: Any) -> None:
    rng, known = random.Random(1), [ids(random.Random(2), 100)]
    steps = engine.stats
    for number in range(12):
        requests = []
        for _ in range(20):  # more than there is room for: some wait, some are preempted
            origin = rng.choice(known[-60:])
            prefix = origin[: rng.randrange(1, min(len(origin), 150) + 1)] + ids(rng, rng.randrange(1, 30))
            requests.append(Request(prefix, 40, seed=number))
        generations = engine.generate(requests)
        assert worst_error(model, requests, generations) < TOLERANCE
        known += [one.prefix_ids + other.ids for one, other in zip(requests, generations, strict=True)]
    assert engine.stats.cached_tokens > steps.cached_tokens
