"""The benchmark of WebShop runs, and holds what does not depend on the machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.webshop_original import next_command

ROOT = Path(__file__).parents[2]


def test_steps_and_forks_are_measured() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.webshop", "--json", "--rounds", "2", "--episodes", "5"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
    )
    result = json.loads(done.stdout)
    assert (result["products"], result["goals"], result["search"]) == (18, 25, "bm25")
    assert result["steps_per_second"] > 500  # a tenth of what is measured on an idle machine
    assert result["fork_us"] < 50
    assert result["memory_mib"] < 200


@pytest.mark.parametrize(
    ("turn", "names", "command"),
    [
        (0, ["search"], "search[a red lamp]"),
        (1, ["back to search", "next >", "b01"], "click[b01]"),
        (1, ["back to search", "next >"], "click[features]"),
        (2, [], "click[description]"),
        (3, [], "click[< prev]"),
        (4, ["< prev", "red", "blue"], "click[red]"),
        (5, [], "click[buy now]"),
    ],
)
def test_both_walk_alike(turn: int, names: list[str], command: str) -> None:
    assert next_command(turn, "a red [lamp], and price lower than 10.00 dollars", names) == command
