"""Credit in plain Python, one node at a time, and a tree of the published shape."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def values_reference(
    parent: Sequence[int], entropy: Sequence[float], leaf_value: Sequence[float], mode: str
) -> list[float]:
    """Node values by recursion over children, as algorithms.md states them."""
    children: list[list[int]] = [[] for _ in parent]
    for node, above in enumerate(parent):
        if above >= 0:
            children[above].append(node)

    def leaves(node: int) -> list[float]:
        if not children[node]:
            return [leaf_value[node]]
        return [value for child in children[node] for value in leaves(child)]

    def value(node: int) -> float:
        below = children[node]
        if not below:
            return leaf_value[node]
        if mode == "leaf_mean":
            return math.fsum(leaves(node)) / len(leaves(node))
        if mode == "child_mean":
            weights = [1.0] * len(below)
        elif mode == "child_softmax":
            weights = [math.exp(entropy[child]) for child in below]
        else:
            weights = [entropy[child] for child in below]
            weights = weights if sum(weights) > 0 else [1.0] * len(below)
        return math.fsum(w * value(c) for w, c in zip(weights, below, strict=True)) / math.fsum(weights)

    return [value(node) for node in range(len(parent))]


def advantages_reference(parent: Sequence[int], values: Sequence[float], mode: str) -> list[float]:
    """Turn advantages from node values."""
    result = [values[0]]
    for node in range(1, len(parent)):
        local, overall = values[node] - values[parent[node]], values[node] - values[0]
        choices = {
            "node_value": values[node],
            "diff_parent": local,
            "diff_global": overall,
            "diff_localglobal": local + overall,
        }
        result.append(choices[mode])
    return result


def published_tree(seed: int) -> tuple[list[int], list[float], list[float]]:
    """Parent, entropy and leaf reward (nan inside) of a tree with M 10, K 6, L 2: 22 leaves."""
    rng = np.random.default_rng(seed)
    parent, entropy, reward = [-1], [0.0], [math.nan]

    def chain(start: int, depth: int) -> None:
        node = start
        for turn in range(depth):
            parent.append(node)
            entropy.append(round(float(rng.gamma(2.0, 0.2)), 4))
            reward.append(math.nan if turn < depth - 1 else float(rng.random() < 0.4))
            node = len(parent) - 1

    for _ in range(10):
        chain(0, int(rng.integers(1, 6)))
    for _ in range(12):
        inner = [node for node in range(len(parent)) if math.isnan(reward[node])]
        forked = int(rng.choice(inner))
        chain(max(parent[forked], 0), int(rng.integers(1, 4)))
    return parent, entropy, reward
