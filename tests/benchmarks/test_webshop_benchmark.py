"""The benchmark of WebShop runs, and holds what does not depend on the machine."""

from __future__ import annotations

import pytest
from helpers.benchmark import run_benchmark

from benchmarks.webshop_original import next_command


def test_steps_and_forks_are_measured() -> None:
    result = run_benchmark("webshop", "--rounds", "2", "--episodes", "5")
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
