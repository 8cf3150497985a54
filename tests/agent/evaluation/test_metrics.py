import dataclasses

import numpy as np
import pytest

from at2po_agent.evaluation.metrics import retrieval_metrics, staleness_metrics
from at2po_agent.tree import Tree
from at2po_agent.types import Turn


def tree_of_versions(*versions: int) -> Tree:
    tree, node = Tree([1]), 0
    for version in versions:
        turn = Turn((), (2,), np.array([-1.0]), None, "", "", 1.0, "stop")
        node = tree.add(node, dataclasses.replace(turn, version=version))
    tree.close(node, 1.0)
    return tree


def test_staleness_is_how_many_versions_old_the_turns_are():
    # ages under version 5: 0, 0 and 0, 2, 3: two stale turns of five, (2 + 3) / 5 in the mean
    trees = [tree_of_versions(5, 5), tree_of_versions(5, 3, 2)]
    assert staleness_metrics(trees, 5) == {"stale_turns": 2, "staleness": 1.0}
    assert staleness_metrics(trees[:1], 5) == {"stale_turns": 0, "staleness": 0.0}
    assert staleness_metrics([], 5) == {"stale_turns": 0, "staleness": 0.0}


def test_retrieval_is_what_rose_between_two_counts():
    before = {"requests": 10, "queries": 12, "retries": 1}
    after = {"requests": 14, "queries": 20, "retries": 1, "failures": 2, "circuit_open": 1}
    assert retrieval_metrics(before, after) == {
        "retrieval/requests": 4,
        "retrieval/queries": 8,
        "retrieval/failures": 2,
        "retrieval/circuit_open": 1,
    }
    assert retrieval_metrics({}, before)["retrieval/failures"] == 0
    assert retrieval_metrics(after, after) == {}


def test_the_hit_rate_is_that_of_the_step_alone():
    before, after = {"cache_hits": 100, "cache_misses": 0}, {"cache_hits": 103, "cache_misses": 1}
    figures = retrieval_metrics(before, after)
    assert figures["retrieval/cache_hit_rate"] == pytest.approx(0.75)
    assert retrieval_metrics({}, {"cache_misses": 2})["retrieval/cache_hit_rate"] == 0.0
    assert "retrieval/cache_hit_rate" not in retrieval_metrics({}, {"requests": 1})
