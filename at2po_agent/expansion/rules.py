"""Choose the nodes of a tree to fork, by pure functions over the tree's arrays.

Everything here is a number or an index; how a fork is carried out (re-sampling the turn as a sibling, as
AT2PO does, or going on below it, as Tree-GRPO does) belongs to the rollout. N nodes; `parent[0] == -1`;
parents precede their children; entropies in nats.

Where paper and released code of AT2PO differ, the code is the default and the paper an option: the penalty of
the code leaves out the node's first child (`max(0, children - 1)`), the paper's counts it.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from at2po_agent.tree import check_parent
from at2po_agent.types import BoolArray, FloatArray, IntArray

Penalty: TypeAlias = Literal["released", "paper"]


def expansion_scores(
    parent: ArrayLike, entropy: ArrayLike, *, alpha: float = 0.05, penalty: Penalty = "released"
) -> FloatArray:
    """Score every node for expansion.

    `s(n) = H(n) - alpha * max(0, |children(parent(n))| - 1)`, the paper without `max` and `- 1`; the root,
    which has no parent, is penalised by its own children.

    Args:
        parent: int[N], -1 for the root.
        entropy: float[N], mean surprisal of each turn in nats, 0 for the root.
        alpha: Price of one sibling in nats (it stands in the released code only).
        penalty: `released` or `paper`.

    Returns:
        float64[N].

    Raises:
        ValueError: Not a tree in creation order, an entropy that is not finite, or an unknown penalty.

    References:
        AT2PO, https://arxiv.org/abs/2601.04767, section on entropy-guided tree expansion.
    """
    parents = check_parent(parent)
    entropies = np.asarray(entropy, dtype=np.float64)
    if entropies.shape != parents.shape:
        raise ValueError(f"entropy must have shape {parents.shape}, got {entropies.shape}")
    if not np.isfinite(entropies).all():
        node = int(np.flatnonzero(~np.isfinite(entropies))[0])
        raise ValueError(f"entropy must be finite: node {node} has {entropies[node]}")
    if penalty not in ("released", "paper"):
        raise ValueError(f"penalty must be 'released' or 'paper', got {penalty!r}")
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"alpha must be a finite number of at least 0, got {alpha}")
    children = np.bincount(parents[1:], minlength=len(parents))
    siblings = children[np.maximum(parents, 0)]
    if penalty == "released":
        siblings = np.maximum(siblings - 1, 0)
    return entropies - alpha * siblings


def select_nodes(
    parent: ArrayLike,
    entropy: ArrayLike,
    is_leaf: ArrayLike,
    *,
    k: int,
    alpha: float = 0.05,
    penalty: Penalty = "released",
) -> list[int]:
    """Choose the K nodes to fork: the highest scores among the non-leaves, the root included.

    Ties keep the order of creation. With fewer than K candidates the sorted list is cycled through.

    Args:
        parent: int[N], -1 for the root.
        entropy: float[N], nats.
        is_leaf: bool[N], True where the turn ended its episode: such turns are never re-sampled.
        k: How many forks.
        alpha: Price of one sibling in nats.
        penalty: `released` or `paper`.

    Returns:
        K node indices, the best first.

    Raises:
        ValueError: See `expansion_scores`; also a root marked as leaf or a negative k.
    """
    candidates = _candidates(parent, is_leaf, k)
    # A stable sort keeps the order of creation among equal scores; `resize` cycles through too short a list.
    scores = expansion_scores(parent, entropy, alpha=alpha, penalty=penalty)[candidates]
    ranked = candidates[np.argsort(-scores, kind="stable")]
    return [int(node) for node in np.resize(ranked, k)]


def random_nodes(parent: ArrayLike, is_leaf: ArrayLike, *, k: int, rng: np.random.Generator) -> list[int]:
    """Choose K candidates at random: the ablation without entropy.

    Without replacement; with fewer than K candidates their random order is cycled through. (The released code
    draws with replacement in that case.)

    Args:
        parent: int[N], -1 for the root.
        is_leaf: bool[N], never chosen where True.
        k: How many forks.
        rng: Source of randomness.

    Returns:
        K node indices.
    """
    candidates = _candidates(parent, is_leaf, k)
    return [int(node) for node in np.resize(rng.permutation(candidates), k)]


def tree_grpo_nodes(parent: ArrayLike, is_leaf: ArrayLike, *, n: int, rng: np.random.Generator) -> list[int]:
    """Draw N nodes uniformly with replacement from the root and the non-leaves of one tree.

    Args:
        parent: int[N], -1 for the root.
        is_leaf: bool[N], never chosen where True.
        n: How many nodes; each is continued from its state (a child, not a sibling).
        rng: Source of randomness.

    Returns:
        n node indices.

    References:
        Tree-GRPO, https://arxiv.org/abs/2509.21240.
    """
    candidates = _candidates(parent, is_leaf, n)
    return [int(node) for node in rng.choice(candidates, size=n, replace=True)]


def _candidates(parent: ArrayLike, is_leaf: ArrayLike, count: int) -> IntArray:
    parents = check_parent(parent)
    leaf: BoolArray = np.asarray(is_leaf, dtype=np.bool_)
    if leaf.shape != parents.shape:
        raise ValueError(f"is_leaf must have shape {parents.shape}, got {leaf.shape}")
    if leaf[0]:
        raise ValueError("the root (node 0) cannot be a leaf")
    if count < 0:
        raise ValueError(f"the number of nodes to choose must be at least 0, got {count}")
    return np.flatnonzero(~leaf).astype(np.int64)
