"""Advantages from groups of branches: GRPO, Tree-GRPO, GiGPO, and DAPO's filter and shaping.

Pure functions over the branches (G, or E episodes) and turns (S) of one question; they know no tree.

At the edges: equal rewards have advantage 0; a GRPO group of one keeps its reward; a GiGPO
anchor group of one gets 0. Rewards that are not finite are errors.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import ArrayLike

from at2po_agent.credit.values import center, check_finite, standardize
from at2po_agent.types import FloatArray

Normalization: TypeAlias = Literal["mean_std", "mean"]


def group_advantages(rewards: ArrayLike, *, normalization: Normalization = "mean_std") -> FloatArray:
    """GRPO's advantage of each member of one group, `A = (R - mean) / (std + 1e-6)`, unbiased std.

    Args:
        rewards: float[G].
        normalization: `mean_std`, or `mean` to leave the division out.

    Returns:
        float64[G]; a group of one keeps its reward.

    References:
        GRPO, https://arxiv.org/abs/2402.03300.
    """
    group = np.asarray(rewards, dtype=np.float64)
    if group.ndim != 1 or group.size == 0:
        raise ValueError(f"rewards must be float[G] with G >= 1, got shape {group.shape}")
    check_finite(group, group.shape, "rewards")
    _check_normalization(normalization)
    if group.size == 1:
        return group.copy()
    return standardize(group, ddof=1) if normalization == "mean_std" else center(group)


def tree_grpo_advantages(rewards: ArrayLike, tree_ids: ArrayLike) -> FloatArray:
    """Tree-GRPO's two levels: GRPO z-score over the question plus GRPO z-score over the branch's own tree.

    Args:
        rewards: float[G], one per branch of the question.
        tree_ids: int[G], which of the question's trees each branch belongs to.

    Returns:
        float64[G], for all tokens of the branch. A tree with one branch adds its reward, as a group of one.

    References:
        Tree-GRPO, https://arxiv.org/abs/2509.21240.
    """
    advantages = group_advantages(rewards)
    group = np.asarray(rewards, dtype=np.float64)
    ids = np.asarray(tree_ids)
    if ids.shape != group.shape:
        raise ValueError(f"tree_ids must have shape {group.shape}, got {ids.shape}")
    for members in _groups(ids.tolist()):
        advantages[members] += group_advantages(group[members])
    return advantages


def discounted_returns(rewards: ArrayLike, *, gamma: float = 0.95) -> FloatArray:
    """Return-to-go of each turn of one episode, `G_k = r_k + gamma G_{k+1}`.

    Args:
        rewards: float[K], the reward of each turn.
        gamma: Discount, 0 to 1.

    Returns:
        float64[K].
    """
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma must be between 0 and 1, got {gamma}")
    returns = np.array(rewards, dtype=np.float64)
    check_finite(returns, (returns.size,), "rewards")
    for turn in range(len(returns) - 2, -1, -1):
        returns[turn] += gamma * returns[turn + 1]
    return returns


def anchor_advantages(
    returns: ArrayLike, anchors: Sequence[Hashable], *, normalization: Normalization = "mean_std"
) -> FloatArray:
    """GiGPO's step advantage: returns standardised among the turns that started from the same observation.

    Args:
        returns: float[S], the discounted return of each turn of the question's episodes.
        anchors: S anchor observations; equal ones form a group.
        normalization: `mean_std` (unbiased, + 1e-6) or `mean`.

    Returns:
        float64[S]; 0 where nothing else shares the anchor.

    References:
        GiGPO, https://arxiv.org/abs/2505.10978.
    """
    steps = np.asarray(returns, dtype=np.float64)
    check_finite(steps, (len(anchors),), "returns")
    _check_normalization(normalization)
    advantages = np.zeros(len(anchors))
    for members in _groups(anchors):
        if len(members) > 1:
            advantages[members] = group_advantages(steps[members], normalization=normalization)
    return advantages


def gigpo_advantages(
    episode_rewards: ArrayLike,
    episode_ids: ArrayLike,
    returns: ArrayLike,
    anchors: Sequence[Hashable],
    *,
    step_weight: float = 1.0,
    normalization: Normalization = "mean_std",
) -> FloatArray:
    """GiGPO's advantage of every turn: its episode's group advantage plus its anchor-state advantage.

    Args:
        episode_rewards: float[E], one per episode of the question.
        episode_ids: int[S], the episode of each turn.
        returns: float[S], discounted returns of the turns.
        anchors: S anchor observations.
        step_weight: Weight of the step advantage.
        normalization: `mean_std` or `mean`, at both levels.

    Returns:
        float64[S].

    References:
        GiGPO, https://arxiv.org/abs/2505.10978, eq. 8.
    """
    episode = group_advantages(episode_rewards, normalization=normalization)
    ids = np.asarray(episode_ids, dtype=np.int64)
    if ids.shape != (len(anchors),) or (ids.size and not (ids.min() >= 0 and ids.max() < len(episode))):
        raise ValueError(f"episode_ids must be {len(anchors)} indices of the {len(episode)} episodes")
    step = anchor_advantages(returns, anchors, normalization=normalization)
    return episode[ids] + step_weight * step


def overlong_penalty(
    length: ArrayLike, *, max_length: int = 6192, buffer: int = 2000, factor: float = 1.0
) -> FloatArray:
    """DAPO's reward shaping, `min(-(len - (L_max - L_buf)) / L_buf * f, 0)`, elementwise.

    Args:
        length: Response lengths in tokens.
        max_length: L_max.
        buffer: L_buf, at least 1: how long before the limit the penalty starts.
        factor: f, the penalty at the limit.

    Returns:
        What to add to the rewards, at most 0.

    References:
        DAPO, https://arxiv.org/abs/2503.14476, eq. 13.
    """
    if buffer < 1 or max_length < buffer:
        raise ValueError(f"need 1 <= buffer <= max_length, got buffer {buffer}, max_length {max_length}")
    excess = np.asarray(length, dtype=np.float64) - (max_length - buffer)
    return np.minimum(-excess / buffer * factor, 0.0)


def is_informative(rewards: ArrayLike) -> bool:
    """DAPO's filter: whether a group's rewards differ, so that its advantages are not all 0."""
    group = np.asarray(rewards, dtype=np.float64)
    check_finite(group, group.shape, "rewards")
    return bool(group.size > 1 and group.min() != group.max())


def _groups(keys: Sequence[Hashable]) -> list[list[int]]:
    """Indices that share a key, in order of first appearance."""
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def _check_normalization(normalization: str) -> None:
    if normalization not in get_args(Normalization):
        raise ValueError(f"normalization must be one of {get_args(Normalization)}, got {normalization!r}")
