"""Carry the rewards of a tree's leaves back to every turn: node values and advantages, as pure functions.

An advantage belongs to a node (float[N]), to a branch (float[L], one per leaf in the tree's order), or to a
node within one branch (float[L, N]); packing takes all three. N nodes; `parent[0] == -1`; parents precede
their children; rewards of inner nodes are nan; entropies in nats. Rules over groups of branches, which know
no tree, are in `groups`.

At the edges: rewards that are all equal are normalised to 0, and so is a tree's only leaf. A reward that is
not finite and a tree without leaves are errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import ArrayLike

from at2po_agent.tree import check_parent
from at2po_agent.types import BoolArray, FloatArray, IntArray

ValueMode: TypeAlias = Literal["child_mean", "child_softmax", "child_linear", "leaf_mean"]
AdvantageMode: TypeAlias = Literal["node_value", "diff_parent", "diff_global", "diff_localglobal", "group"]

EPSILON = 1e-6


def normalize_leaf_rewards(leaf_reward: ArrayLike) -> FloatArray:
    """Standardise the rewards of one question's leaves, `(r - mean) / (std + 1e-6)`, population std.

    Args:
        leaf_reward: float[N], nan on inner nodes.

    Returns:
        float64[N], nan on inner nodes; all 0 when the rewards are equal or there is one leaf.

    Raises:
        ValueError: No leaf, or an infinite reward.
    """
    rewards = np.asarray(leaf_reward, dtype=np.float64)
    leaf = _leaf_mask(rewards)
    values = np.full(rewards.shape, np.nan)
    values[leaf] = standardize(rewards[leaf], ddof=0)
    return values


def node_values(
    parent: ArrayLike, entropy: ArrayLike, leaf_value: ArrayLike, *, mode: ValueMode = "child_softmax"
) -> FloatArray:
    """Value of every node, bottom-up: `V(n) = sum_c w_c V(c)` over its children.

    `child_mean`: equal weights; `child_softmax`: `softmax(H(c))`; `child_linear`: `H(c) / sum H`, equal
    weights when all children have entropy 0; `leaf_mean`: mean over the descendant leaves.

    Args:
        parent: int[N], -1 for the root.
        entropy: float[N], nats.
        leaf_value: float[N], nan on inner nodes.
        mode: One of the four.

    Returns:
        float64[N].

    Raises:
        ValueError: No leaf, a childless node without value, an inner node with one, or an unknown mode.

    References:
        AT2PO, https://arxiv.org/abs/2601.04767, eq. 3 (`child_linear`); the released code is `child_softmax`.
    """
    parents = check_parent(parent)
    values = _check_leaf_values(parents, leaf_value)
    levels = list(_levels_bottom_up(parents))
    weights = _child_weights(parents, entropy, values, levels, mode)
    # Inner nodes start at 0 and are complete once the level below has been added: the deepest level first.
    np.nan_to_num(values, copy=False)
    for nodes in levels:
        np.add.at(values, parents[nodes], weights[nodes] * values[nodes])
    return values


def node_advantages(
    parent: ArrayLike, values: ArrayLike, *, mode: AdvantageMode = "node_value"
) -> FloatArray:
    """Advantage of every turn from the node values; the root's own is its value under every mode.

    `node_value`: V(n); `diff_parent`: V(n) - V(parent); `diff_global`: V(n) - V(root); `diff_localglobal`:
    their sum; `group`: the leaf's value. Under `group` a turn has another advantage in each branch through
    it; this function gives their mean, and `branch_advantages` gives each.

    Args:
        parent: int[N], -1 for the root.
        values: float[N], of `node_values`.
        mode: One of the five.

    Returns:
        float64[N].

    Raises:
        ValueError: A value that is not finite, or an unknown mode.
    """
    parents = check_parent(parent)
    node_value = np.asarray(values, dtype=np.float64)
    check_finite(node_value, parents.shape, "values")
    if mode == "node_value":
        return np.array(node_value)
    if mode == "group":
        return shared_mean_advantages(parents, np.where(_childless(parents), node_value, np.nan))
    local = node_value - node_value[np.maximum(parents, 0)]
    overall = node_value - node_value[0]
    choices = {"diff_parent": local, "diff_global": overall, "diff_localglobal": local + overall}
    if mode not in choices:
        raise ValueError(f"mode must be one of {get_args(AdvantageMode)}, got {mode!r}")
    advantages: FloatArray = choices[mode]
    advantages[0] = node_value[0]
    return advantages


def branch_advantages(leaf_value: ArrayLike) -> FloatArray:
    """`group` credit: each leaf's own value for every turn of its branch (plain GRPO on a tree).

    Args:
        leaf_value: float[N], nan on inner nodes.

    Returns:
        float64[L], one per leaf in order of creation.
    """
    values = np.asarray(leaf_value, dtype=np.float64)
    return values[_leaf_mask(values)]


def shared_mean_advantages(parent: ArrayLike, leaf_value: ArrayLike) -> FloatArray:
    """ARPO's hard advantage: a shared turn takes the mean over the branches that share it.

    Args:
        parent: int[N], -1 for the root.
        leaf_value: float[N], each branch's group advantage at its leaf, nan on inner nodes.

    Returns:
        float64[N]. (The soft form is `branch_advantages`: every branch keeps its own.)

    References:
        ARPO, https://arxiv.org/abs/2507.19849.
    """
    parents = check_parent(parent)
    return node_values(parents, np.zeros(len(parents)), leaf_value, mode="leaf_mean")


def _child_weights(
    parents: IntArray, entropy: ArrayLike, leaf_value: FloatArray, levels: list[IntArray], mode: ValueMode
) -> FloatArray:
    """Weigh each node among its siblings; weights sum to 1 per parent. The root's is unused.

    Every node gets a mass, and its weight is its share of the mass of all children of its parent.
    """
    entropies = np.asarray(entropy, dtype=np.float64)
    check_finite(entropies, parents.shape, "entropy")
    mass = np.ones(len(parents))
    if mode == "child_softmax":  # exp(H), after subtracting the largest H among the siblings
        top = np.full(len(parents), -np.inf)
        np.maximum.at(top, parents[1:], entropies[1:])
        mass[1:] = np.exp(entropies[1:] - top[parents[1:]])
    elif mode == "child_linear":
        mass = np.maximum(entropies, 0.0)
        flat = _per_parent(parents, mass) <= 0.0
        mass[1:] = np.where(flat[parents[1:]], 1.0, mass[1:])
    elif mode == "leaf_mean":
        mass = np.isfinite(leaf_value).astype(np.float64)
        for nodes in levels:
            np.add.at(mass, parents[nodes], mass[nodes])
    elif mode != "child_mean":
        raise ValueError(f"mode must be one of {get_args(ValueMode)}, got {mode!r}")
    weights = np.ones(len(parents))
    weights[1:] = mass[1:] / _per_parent(parents, mass)[parents[1:]]
    return weights


def _per_parent(parents: IntArray, mass: FloatArray) -> FloatArray:
    return np.bincount(parents[1:], weights=mass[1:], minlength=len(parents)).astype(np.float64)


def _levels_bottom_up(parents: IntArray) -> Iterator[IntArray]:
    """Yield the nodes of each depth, the deepest first and the root left out.

    Depths come from pointer doubling: `ancestor` is each node's ancestor 1, 2, 4, ... steps up, and a node's
    depth grows by that ancestor's, so a chain of any length takes a logarithmic number of array operations.
    """
    depth = np.where(parents >= 0, 1, 0)
    ancestor = parents.copy()
    while (ancestor >= 0).any():
        depth += np.where(ancestor >= 0, depth[ancestor], 0)
        ancestor = np.where(ancestor >= 0, ancestor[ancestor], -1)
    order = np.argsort(depth, kind="stable")
    starts = np.searchsorted(depth[order], np.arange(1, int(depth.max()) + 1))
    yield from reversed(np.split(order, starts)[1:])


def _childless(parents: IntArray) -> BoolArray:
    children = np.bincount(parents[1:], minlength=len(parents))
    return np.asarray(children == 0)


def _check_leaf_values(parents: IntArray, leaf_value: ArrayLike) -> FloatArray:
    values = np.array(leaf_value, dtype=np.float64)
    if values.shape != parents.shape:
        raise ValueError(f"leaf_value must have shape {parents.shape}, got {values.shape}")
    leaf = _leaf_mask(values)
    wrong = np.flatnonzero(leaf != _childless(parents))
    if wrong.size:
        node = int(wrong[0])
        problem = (
            "has a value and children" if leaf[node] else "has neither a value nor children (nan reward?)"
        )
        raise ValueError(
            f"leaf_value must be a number exactly where a node has no children: node {node} {problem}"
        )
    return values


def _leaf_mask(values: FloatArray) -> BoolArray:
    if values.ndim != 1:
        raise ValueError(f"leaf rewards must be float[N], got shape {values.shape}")
    if np.isinf(values).any():
        raise ValueError(
            f"leaf rewards must be finite: node {int(np.flatnonzero(np.isinf(values))[0])} is not"
        )
    leaf: BoolArray = ~np.isnan(values)
    if not leaf.any():
        raise ValueError("a tree without leaves has no credit to give: all leaf rewards are nan")
    return leaf


def standardize(values: FloatArray, *, ddof: int) -> FloatArray:
    """`(x - mean) / (std + 1e-6)`; exactly 0 when all are equal."""
    centered = center(values)
    if not centered.any():
        return centered
    return centered / (float(np.std(values, ddof=ddof)) + EPSILON)


def center(values: FloatArray) -> FloatArray:
    """Subtract the mean; exactly 0 when all are equal, whatever the mean's rounding."""
    if values.min() == values.max():
        return np.zeros(values.shape)
    return np.asarray(values - values.mean(), dtype=np.float64)


def check_finite(values: FloatArray, shape: tuple[int, ...], name: str) -> None:
    """Raise a `ValueError` that names the array unless it has the shape and only finite numbers."""
    if values.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {values.shape}")
    if not np.isfinite(values).all():
        index = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(f"{name} must be finite: entry {index} is {values.flat[index]}")
