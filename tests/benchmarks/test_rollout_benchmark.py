"""The rollout benchmark's own numbers, on loads small enough for a test."""

from __future__ import annotations

import pytest

from benchmarks import rollout as benchmark
from benchmarks.slow_world import MEDIAN_S, TAIL_S, TAIL_SHARE, latency

KEYS = {
    "scheduler_tokens_per_s",
    "lockstep_tokens_per_s",
    "prefill_over_unique",
    "hf_policy_tokens_per_s",
    "generate_tokens_per_s",
    "vllm_tokens_per_s",
    "overhead_us_per_turn",
}


def test_every_key_is_there_and_both_ways_sample_the_same_trees() -> None:
    numbers = benchmark.scheduling(rounds=1, questions=2, scale=0.01)
    assert numbers["prefill_over_unique"] == {"hf": 1.0}
    assert numbers["scheduler_over_lockstep"] == pytest.approx(
        numbers["scheduler_tokens_per_s"] / numbers["lockstep_tokens_per_s"]
    )
    numbers |= benchmark.overhead(rounds=1, questions=1)
    numbers |= benchmark.samplers(rounds=1, questions=1)
    assert numbers.keys() >= KEYS
    assert all(numbers[key] > 0 for key in KEYS - {"prefill_over_unique", "vllm_tokens_per_s"})
    assert numbers["vllm_tokens_per_s"] is not None or numbers["vllm_reason"]


def test_the_latency_has_the_tail_it_says() -> None:
    seconds = sorted(latency(number) for number in range(20_000))
    # the median of the whole is the 51st percentile of the body: 50 ms * exp(0.3 * 0.026)
    assert seconds[10_000] == pytest.approx(MEDIAN_S, rel=0.03)
    assert sum(value == TAIL_S for value in seconds) / 20_000 == pytest.approx(TAIL_SHARE, abs=0.004)
