"""Engines in processes of their own: slow to start, so that tests share them. The last test kills one."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.vllm_rules import Hurry
from helpers.vllm_tiny_engine import SMALL, drain, ids, running, tiny_model, tiny_tokenizer, worst_error

from at2po_agent.policies.base import Request
from at2po_agent.policies.hf.policy import HFPolicy
from at2po_env.errors import PolicyError

TOLERANCE = 1e-4


def children() -> set[int]:
    """Process ids of all children, zombies included."""
    own = Path("/proc/self/task").glob("*/children")
    return {int(child) for thread in own for child in thread.read_text().split()}


@pytest.fixture(scope="module")
def learner() -> Any:
    return tiny_model(seed=3)


@pytest.fixture(scope="module")
def engines(learner: Any) -> Iterator[Any]:
    """Two engines."""
    with running(learner, engines=2) as policy:
        yield policy
    assert not policy._engines[0].process.is_alive()


def test_two_engines_sample_what_the_transformers_policy_does(engines, learner):
    rng = random.Random(0)
    requests = [Request(ids(rng, rng.randrange(1, 90)), 12, seed=seed) for seed in range(20)]
    generations = engines.generate(requests)
    assert worst_error(learner, requests, generations) < TOLERANCE
    theirs = HFPolicy(learner, tiny_tokenizer()).generate(requests)
    assert [one.ids for one in generations] == [one.ids for one in theirs]
    assert all(engine.begin("counted") is None and engine.end().steps for engine in engines._engines)


def test_branches_of_a_question_share_an_engine(engines):
    rng, block = random.Random(1), engines.limits.block_size
    questions = [ids(rng, 4 * block) for _ in range(4)]
    before = engines.stats.prefill_tokens
    first = engines.generate([Request(q, 6, seed=seed) for q in questions for seed in range(3)])
    assert engines.stats.prefill_tokens - before <= 4 * (4 * block) + 8 * block
    again = engines.stats.prefill_tokens
    engines.generate([Request(questions[n // 3] + one.ids, 4) for n, one in enumerate(first)])
    assert engines.stats.prefill_tokens - again <= 12 * block


def test_polling_does_not_wait_for_a_long_request(engines):
    ticket = engines.submit(Request((1, 2, 3), 600, seed=1))
    started = time.monotonic()
    engines.poll()
    assert time.monotonic() - started < 0.5
    part = engines.abort(ticket)
    assert part.stop_reason == "abort"
    assert len(part.ids) < 600
    assert engines.idle


def test_new_weights_reach_every_engine(engines, learner):
    requests = [Request((n + 1, 5, 6, 7), 12, seed=n) for n in range(8)]
    old = engines.generate(requests)
    version = engines.version
    with torch.no_grad():
        for parameter, other in zip(learner.parameters(), tiny_model(seed=8).parameters(), strict=True):
            parameter.copy_(other)
    engines.weights_changed()
    new = engines.generate(requests)
    assert worst_error(learner, requests, new) < TOLERANCE
    assert worst_error(learner, requests, old) > 100 * TOLERANCE
    assert {one.version for one in old} == {version}
    assert {one.version for one in new} == {version + 1}


def test_an_interventions_state_comes_back(engines, learner):
    rules, twins = ([Hurry(limit, [7, 8]) for limit in (2, 5)] for _ in range(2))

    def asked(rules: list[Hurry]) -> list[Request]:
        return [Request((4, 5, n + 1), 10, seed=n, intervention=rule) for n, rule in enumerate(rules)]

    ours = engines.generate(asked(rules))
    theirs = HFPolicy(learner, tiny_tokenizer()).generate(asked(twins))
    for one, other, mine, twin in zip(ours, theirs, rules, twins, strict=True):
        assert one.ids == other.ids
        np.testing.assert_array_equal(one.sampled, other.sampled)
        np.testing.assert_allclose(mine.seen, twin.seen, atol=1e-3)


def test_an_intervention_that_cannot_travel_is_refused(engines):
    rule = Hurry(2, [7])
    rule.hook = lambda: None  # type: ignore[attr-defined]
    with pytest.raises(PolicyError, match="cannot travel"):
        engines.submit(Request((1, 2), 4, intervention=rule))
    assert engines.idle


def test_an_engine_that_had_nothing_to_do_has_not_hung(engines):
    for engine in engines._engines:
        engine._heard -= 3600.0
    assert len(engines.generate([Request((n + 1, 5), 3, seed=n) for n in range(4)])) == 4


def test_requests_that_cannot_be_served_leave_the_engines_alone(engines):
    with pytest.raises(PolicyError, match="positions"):
        engines.submit(Request((1,), 5000))
    assert len(engines.generate([Request((1,), 4, seed=1)])[0].ids) <= 4


def test_an_engine_that_cannot_start_says_so_and_leaves_no_process(tmp_path):
    from at2po_agent.policies.vllm import VLLMPolicy

    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    before = children()
    with pytest.raises(PolicyError, match=r"vLLM engine 0 .* failed"):
        VLLMPolicy(tmp_path, tiny_tokenizer(), config=SMALL)
    assert children() <= before


def test_a_killed_engine_is_an_error_at_once_and_leaves_no_process(engines):
    tickets = {engines.submit(Request((n + 1, 2, 3), 900, seed=n)) for n in range(6)}
    engines.poll()
    victim, other = engines._engines
    os.kill(victim.process.pid, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(PolicyError, match=r"engine 0 .* was killed by SIGKILL with \d+ requests open"):
        drain(engines, tickets)
    assert time.monotonic() - started < 20
    assert victim.process.pid not in children()  # reaped: a zombie would still be there
    with pytest.raises(PolicyError, match="engine 0"):
        engines.weights_changed()
    # The other one hangs.
    rest = {ticket for ticket in tickets if engines._where.get(ticket) == 1}
    assert rest
    other._config = SMALL.model_copy(update={"stall_timeout_s": 1.0})
    os.kill(other.process.pid, signal.SIGSTOP)
    with pytest.raises(PolicyError, match=r"engine 1 .* made no step for 1 s"):
        drain(engines, rest)
    engines.close()
    assert other.process.pid not in children()
