"""The benchmark of forks and steps runs, and the ratios that do not depend on the machine hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_forks_cost_the_same_at_every_turn_and_far_less_than_deepcopy() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.env", "--json", "--rounds", "3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
    )
    result = json.loads(done.stdout)
    assert {"fork_us_turn1", "fork_us_turn100", "deepcopy_us", "steps_per_second"} <= result.keys()
    for suffix in ("", "_wrapped"):
        assert result[f"fork_us_turn100{suffix}"] <= 1.5 * result[f"fork_us_turn1{suffix}"]
        assert result[f"deepcopy_us{suffix}"] >= 20 * result[f"fork_us_turn100{suffix}"]
        assert result[f"steps_per_second{suffix}"] > 10_000  # a tenth of what is measured on an idle machine
