"""Finds the fork points of the trees that runs have kept, and compares what came of them; draws nothing."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from at2po_agent.report.plot_data import Group, mean_interval
from at2po_agent.report.run_folder import NothingYetError, read_trees, tree_files
from at2po_agent.tree import ROOT, Tree
from at2po_agent.types import FloatArray, IntArray

MOST_BINS, POINTS_PER_BIN = 8, 6


class ForkPoint(NamedTuple):
    """A place where a kept tree goes on in several ways: turns that are siblings.

    Attributes:
        run: Folder of the run.
        step: Training step, None where the file does not say.
        question: Its id.
        depth: Number of the siblings' turn; the chains begin with turn 1.
        entropy: Entropy of the sibling that was sampled first, nats.
        siblings: How many there are.
        leaves: How many leaves are below them.
        variance: Population variance of these leaves' rewards.
    """

    run: str
    step: int | None
    question: str
    depth: int
    entropy: float
    siblings: int
    leaves: int
    variance: float


class Binned(NamedTuple):
    """Mean outcome variance of fork points that are alike, float[n] each.

    Attributes:
        x: Depth, or mean entropy.
        mean: Mean over the runs of a group.
        low: Lower end of its 95% interval; nan for fewer than two runs.
        high: Upper end.
        runs: int[n], how many runs have such fork points.
        points: int[n], how many fork points there are.
    """

    x: FloatArray
    mean: FloatArray
    low: FloatArray
    high: FloatArray
    runs: IntArray
    points: IntArray


class Forks(NamedTuple):
    """The fork points of a group's kept trees.

    Attributes:
        label: The group.
        points: All of them.
        by_depth: At each depth.
        by_entropy: In bins of equally many fork points.
        rank_correlation: Spearman's, of entropy and variance; nan where one of them does not vary.
    """

    label: str
    points: tuple[ForkPoint, ...]
    by_depth: Binned
    by_entropy: Binned
    rank_correlation: float


def fork_points(tree: Tree, *, run: str = "", step: int | None = None) -> list[ForkPoint]:
    """Find the places where a tree goes on in several ways, with what came of each."""
    below: list[list[float]] = [[] for _ in range(len(tree))]
    children: list[list[int]] = [[] for _ in range(len(tree))]
    depth = [0] * len(tree)
    for node, parent in enumerate(tree.parent.tolist()):
        if node != ROOT:
            children[parent].append(node)
            depth[node] = depth[parent] + 1
    for leaf in tree.leaves():
        for node in tree.path(leaf):
            below[node].append(float(tree.leaf_reward[leaf]))
    return [
        ForkPoint(
            run,
            step,
            tree.task_id,
            depth[siblings[0]],
            float(tree.entropy[siblings[0]]),
            len(siblings),
            len(below[node]),
            float(np.var(below[node])),
        )
        for node, siblings in enumerate(children)
        if len(siblings) > 1 and len(below[node]) > 1
    ]


def forks(group: Group) -> Forks:
    """Compare the outcomes below the fork points of all trees that a group's runs have kept.

    Raises:
        NothingYetError: A run has kept no trees, or no tree has a fork point.
        DataError: A damaged file.
    """
    points: list[ForkPoint] = []
    for run in group.runs:
        for file in tree_files(run.path):
            for record in read_trees(file):
                points += fork_points(record.tree, run=str(run.path), step=record.step)
    if not points:
        raise NothingYetError(f"{group.runs[0].path}: no kept tree goes on in several ways.")
    entropy = np.array([point.entropy for point in points])
    variance = np.array([point.variance for point in points])
    depth = np.array([point.depth for point in points], dtype=np.float64)
    bins = min(MOST_BINS, max(1, len(points) // POINTS_PER_BIN))
    edges = np.quantile(entropy, np.linspace(0, 1, bins + 1)[1:-1])
    runs = np.unique([point.run for point in points], return_inverse=True)[1]
    return Forks(
        group.label,
        tuple(points),
        _binned(depth, depth, variance, runs),
        _binned(np.searchsorted(edges, entropy), entropy, variance, runs),
        rank_correlation(entropy, variance),
    )


def rank_correlation(x: FloatArray, y: FloatArray) -> float:
    """Spearman's correlation: Pearson's of the ranks, where equal values share their mean rank.

    Returns:
        A number in [-1, 1]; nan where one of them does not vary.
    """
    ranks = []
    for values in (x, y):
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        rank = (np.cumsum(counts) - (counts - 1) / 2)[place]
        ranks.append(rank - rank.mean())
    size = math.prod(float(rank @ rank) for rank in ranks) ** 0.5
    return float(ranks[0] @ ranks[1]) / size if size else math.nan


def _binned(bins: FloatArray | IntArray, x: FloatArray, variance: FloatArray, runs: IntArray) -> Binned:
    """Average variances by bin: within each run first, then over the runs."""
    values, place = np.unique(bins, return_inverse=True)
    table = np.full((int(runs.max()) + 1, len(values)), np.nan)
    for run, column in set(zip(runs.tolist(), place.tolist(), strict=True)):
        table[run, column] = variance[(runs == run) & (place == column)].mean()
    points = np.bincount(place)
    return Binned(np.bincount(place, weights=x) / points, *mean_interval(table), points)
