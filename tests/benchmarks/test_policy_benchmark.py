"""The benchmark's own numbers, on a load small enough for a test."""

from __future__ import annotations

import pytest

from benchmarks.policy import Workload, measure


def test_the_benchmark_reports_speeds_and_no_token_is_prefilled_twice() -> None:
    work = Workload(
        questions=2, chains=2, forks=2, turns=2, prompt=(10, 20), action=(2, 6), observation=(4, 8)
    )
    numbers = measure(work, repeats=1)
    assert numbers["prefill_over_unique"] == 1.0
    assert numbers["hf_policy_tokens_per_s"] > 0
    assert numbers["ratio"] == pytest.approx(
        numbers["hf_policy_tokens_per_s"] / numbers["generate_tokens_per_s"]
    )
