import dataclasses

import numpy as np

from at2po_agent.evaluation.metrics import staleness_metrics
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
