"""The benchmark of forks and steps runs, and the ratios that do not depend on the machine hold."""

from __future__ import annotations

from helpers.benchmark import run_benchmark


def test_forks_cost_the_same_at_every_turn_and_far_less_than_deepcopy() -> None:
    result = run_benchmark("env", "--rounds", "3")
    assert {"fork_us_turn1", "fork_us_turn100", "deepcopy_us", "steps_per_second"} <= result.keys()
    for suffix in ("", "_wrapped"):
        assert result[f"fork_us_turn100{suffix}"] <= 1.5 * result[f"fork_us_turn1{suffix}"]
        assert result[f"deepcopy_us{suffix}"] >= 20 * result[f"fork_us_turn100{suffix}"]
        assert result[f"steps_per_second{suffix}"] > 10_000  # a tenth of what is measured on an idle machine
