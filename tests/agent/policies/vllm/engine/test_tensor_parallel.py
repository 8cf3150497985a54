"""One engine whose model is split over two workers: on CPUs here, on GPUs where it matters."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers.vllm_rules import Hurry
from helpers.vllm_tiny_engine import ids, running, tiny_model, tiny_tokenizer, worst_error

from at2po_agent.policies.base import Request
from at2po_agent.policies.hf.policy import HFPolicy

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def learner() -> Any:
    return tiny_model(seed=5)


@pytest.fixture(scope="module")
def engine(learner: Any) -> Iterator[Any]:
    with running(learner, tensor_parallel=2) as policy:
        yield policy


def test_half_a_model_each_samples_what_the_whole_one_does(engine, learner):
    rng = random.Random(0)
    requests = [Request(ids(rng, rng.randrange(1, 90)), 20, seed=seed) for seed in range(8)]
    generations = engine.generate(requests)
    assert worst_error(learner, requests, generations) < TOLERANCE
    theirs = HFPolicy(learner, tiny_tokenizer()).generate(requests)
    assert [one.ids for one in generations] == [one.ids for one in theirs]


def test_every_worker_copies_the_block_that_a_fork_shares_in_part(engine, learner):
    rng = random.Random(1)
    requests = [Request(ids(rng, 50), 20, seed=seed) for seed in range(4)]
    generations = engine.generate(requests)
    forks = [
        Request((*request.prefix_ids, *one.ids[:7], 3, 4), 9, seed=9)
        for request, one in zip(requests, generations, strict=True)
    ]
    before = engine.stats.prefill_tokens
    assert worst_error(learner, forks, engine.generate(forks)) < TOLERANCE
    assert engine.stats.prefill_tokens - before == 2 * len(forks)


def test_interventions_agree_over_the_workers(engine, learner):
    rules, twins = Hurry(2, [7, 8]), Hurry(2, [7, 8])
    (ours,) = engine.generate([Request((4, 5, 6), 10, seed=3, intervention=rules)])
    (theirs,) = HFPolicy(learner, tiny_tokenizer()).generate(
        [Request((4, 5, 6), 10, seed=3, intervention=twins)]
    )
    assert ours.ids == theirs.ids
    np.testing.assert_array_equal(ours.sampled, theirs.sampled)


def test_new_weights_reach_every_worker(engine, learner):
    requests = [Request((n + 1, 5, 6, 7), 12, seed=n) for n in range(4)]
    with torch.no_grad():
        for parameter, other in zip(learner.parameters(), tiny_model(seed=8).parameters(), strict=True):
            parameter.copy_(other)
    engine.weights_changed()
    generations = engine.generate(requests)
    assert worst_error(learner, requests, generations) < TOLERANCE
    assert {one.version for one in generations} == {engine.version} == {1}
