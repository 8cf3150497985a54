"""The credit of our own method: each turn against the others, weighted by their surprisal.

A policy-gradient estimate `sum_i (r_i - b_i) grad log pi(y_i)` is unbiased for every baseline b_i that does
not depend on y_i. Its variance is least where b is the mean of the other rewards weighted by
`|grad log pi(y_j)|^2`. That norm is not known before the backward pass, but it grows steeply with the
surprisal `-log pi(y_j)`, which sampling has measured anyway. So the weights are surprisals, and the baseline
costs nothing.

Why it matters: the noise of a sparse reward sits in rare, surprising turns, most of them in failed branches.
The weighted baseline lies close to the rewards of just these branches, so that their advantages are small.

References:
    The baseline of least variance: Greensmith, Bartlett and Baxter, "Variance reduction techniques for
    gradient estimates in reinforcement learning", JMLR 5, 2004. OPO, https://arxiv.org/abs/2505.23585, weighs
    by lengths.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from at2po_agent.credit.values import check_finite
from at2po_agent.tree import check_parent
from at2po_agent.types import FloatArray


def weighted_baseline_advantages(rewards: ArrayLike, weights: ArrayLike) -> FloatArray:
    """Reward minus the weighted mean of the others: `A_i = r_i - sum_{j != i} w_j r_j / sum_{j != i} w_j`.

    Args:
        rewards: float[G], of one group.
        weights: float[G], at least 0, such as the surprisal of each branch in nats. Where all others weigh 0,
            their plain mean is taken.

    Returns:
        float64[G]; exactly 0 where all rewards are equal. A group of one keeps its reward.

    Raises:
        ValueError: Shapes that differ, no member, a number that is not finite, or a negative weight.
    """
    group = np.asarray(rewards, dtype=np.float64)
    mass = np.asarray(weights, dtype=np.float64)
    if group.ndim != 1 or group.size == 0:
        raise ValueError(f"rewards must be float[G] with G >= 1, got shape {group.shape}")
    check_finite(group, group.shape, "rewards")
    check_finite(mass, group.shape, "weights")
    if mass.min() < 0:
        raise ValueError(f"weights must be at least 0, got {mass.min()}")
    if len(group) > 1 and group.min() == group.max():
        return np.zeros(len(group))
    others = 1.0 - np.eye(len(group))
    return group - _baselines(others * mass, others, group)


def surprisal_tree_advantages(
    parent: ArrayLike,
    surprisal: ArrayLike,
    leaf_reward: ArrayLike,
    *,
    beyond: float = 0.3,
    cap: float | None = None,
) -> FloatArray:
    """Advantage of every turn of a tree: its value against the branches that do not pass through it.

    For a turn n below the node p:

    - `V(n)` is the mean reward below n, where each fork counts its children alike;
    - the baseline is a weighted mean of rewards. Branches that leave p by another turn have weight `w_j`, the
      surprisal of j after p. Branches that do not pass through p have `beyond * w_j`, with the surprisal of
      all of j: they tell of the question instead of the state, and so they are worth less;
    - a turn counts by the probability that an episode that goes down the tree at random passes through it.
      Losses count a turn once for each of its branches; the advantage corrects for that.

    Forks of a node are fair samples of its state only where the choice of the node ignored the turn that was
    sampled there. Then the estimate is unbiased (without `cap`); after expansion by entropy it is not quite.
    On chains this is `weighted_baseline_advantages`, whatever `beyond` is.

    Args:
        parent: int[N], -1 for the root.
        surprisal: float[N], total surprisal of the sampled tokens of each turn in nats; that of the root is
            not used.
        leaf_reward: float[N], nan on inner nodes.
        beyond: Weight of the branches that do not share the turn's state, at least 0.
        cap: Nats of a turn's surprisal above which its advantage is scaled down, by `cap / surprisal`; None
            never does. It makes the estimate biased, and calmer.

    Returns:
        float64[N], 0 for the root. All 0 where all rewards are equal; a tree with one leaf keeps its reward.

    Raises:
        ValueError: Not a tree, shapes that differ, no leaf, or a number that is negative or not finite.
    """
    parents = check_parent(parent)
    turns = np.asarray(surprisal, dtype=np.float64)
    check_finite(turns, parents.shape, "surprisal")
    rewards = np.asarray(leaf_reward, dtype=np.float64)
    if rewards.shape != parents.shape:
        raise ValueError(f"leaf_reward must have shape {parents.shape}, got {rewards.shape}")
    leaves = np.flatnonzero(~np.isnan(rewards))
    if not leaves.size:
        raise ValueError("a tree without leaves has no credit to give")
    reward = rewards[leaves]
    check_finite(reward, reward.shape, "the rewards of leaves")
    if not (math.isfinite(beyond) and beyond >= 0):
        raise ValueError(f"beyond must be a finite number of at least 0, got {beyond}")
    if cap is not None and not cap > 0:
        raise ValueError(f"cap must be greater than 0 (or None), got {cap}")
    if turns[1:].min(initial=0.0) < 0:
        raise ValueError(f"surprisal must be at least 0, got {turns[1:].min()}")

    # Going down: which leaves lie below each node, the surprisal from the root, and the chance to pass there.
    count = len(parents)
    below = np.zeros((count, len(leaves)), dtype=np.bool_)
    below[leaves, np.arange(len(leaves))] = True
    children = np.bincount(parents[1:], minlength=count)
    total, chance = np.zeros(count), np.ones(count)
    for node in range(1, count):
        total[node] = total[parents[node]] + turns[node]
        chance[node] = chance[parents[node]] / children[parents[node]]
    for node in range(count - 1, 0, -1):
        below[parents[node]] |= below[node]

    # Each turn's value, and the weights of the other branches: those that part from it, and those beyond.
    up = np.maximum(parents, 0)
    share = below * (chance[leaves] / chance[:, None])
    value = share @ reward
    after = np.maximum(total[leaves] - total[up, None], 0.0) * chance[leaves]
    parting = below[up] & ~below
    elsewhere = ~below[up]
    weights = parting * after + beyond * elsewhere * (total[leaves] * chance[leaves])
    plain = (parting + beyond * elsewhere) * chance[leaves]
    advantages = value - _baselines(weights, plain, reward)
    if reward.min() == reward.max() and len(reward) > 1:
        return np.zeros(count)
    advantages *= chance * len(leaves) / below.sum(axis=1)
    if cap is not None:
        advantages *= np.minimum(1.0, cap / np.maximum(turns, cap))
    advantages[0] = 0.0
    return advantages


def _baselines(weights: FloatArray, plain: FloatArray, rewards: FloatArray) -> FloatArray:
    """Mean of the rewards, float[G], by each row of weights, float[R, G].

    A row without weight takes those of `plain`; 0 where both are 0.
    """
    rows = np.where(weights.sum(axis=1, keepdims=True) > 0, weights, plain)
    mass = rows.sum(axis=1)
    means: FloatArray = np.where(mass > 0, rows @ rewards / np.where(mass > 0, mass, 1.0), 0.0)
    return means
