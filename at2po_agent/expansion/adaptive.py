"""Expansion that decides at every tool result whether to branch: ARPO's and AEPO's, as pure functions.

Both are asked round by round. A round looks at one depth of all branches grown so far, so the budget is
spent in the order of turns, as if all branches advanced in step; that branches are grown to their ends before
a copy is made of one of their turns changes nothing, since a copy does not touch the original. Chosen nodes
are re-sampled: the copy sees the same tool result.

N nodes; `parent[0] == -1`; `first_entropy` float[N] is the entropy over the first tokens of each turn
(`top_entropy`), 0 for the root.
"""

import math

import numpy as np
from numpy.typing import ArrayLike

from at2po_agent.tree import ROOT
from at2po_agent.types import BoolArray, FloatArray, IntArray


def top_entropy(top_log_probs: ArrayLike) -> float:
    """Mean entropy of some positions, each from the few most probable tokens: `-(1/k) sum_t sum_j p ln p`.

    ARPO measures it over the first 20 tokens after a tool result with the 10 highest log-probs of each. The
    tail beyond them is left out, not renormalised.

    Args:
        top_log_probs: float[k, j], nats.

    Returns:
        Entropy in nats; 0 without any position.
    """
    log_probs = np.asarray(top_log_probs, dtype=np.float64)
    if log_probs.ndim != 2:
        raise ValueError(f"top_log_probs must be [positions, tokens], got shape {log_probs.shape}")
    if log_probs.shape[0] == 0:
        return 0.0
    probabilities = np.exp(log_probs)
    surprisal = np.where(probabilities > 0, -log_probs, 0.0)
    return float((probabilities * surprisal).sum(axis=1).mean())


def arpo_branch_probability(
    entropy: ArrayLike,
    initial_entropy: ArrayLike,
    *,
    vocab_size: int,
    base: float = 0.5,
    weight: float = 0.2,
) -> FloatArray:
    """Probability that a chain branches after a tool result, elementwise.

    `P = clip(base + weight * (H - H_initial) / ln V, 0, 1)`

    Args:
        entropy: Entropy after the tool result in nats.
        initial_entropy: The same chain's first such entropy in nats.
        vocab_size: V, at least 2.
        base: Probability when nothing changed.
        weight: Weight of the normalised change.

    Returns:
        Probabilities.

    References:
        ARPO, https://arxiv.org/abs/2507.19849.
    """
    if vocab_size < 2:
        raise ValueError(f"vocab_size must be at least 2, got {vocab_size}")
    change = np.asarray(entropy, dtype=np.float64) - np.asarray(initial_entropy, dtype=np.float64)
    if not np.isfinite(change).all():
        raise ValueError("entropy and initial_entropy must be finite")
    return np.clip(base + weight * change / math.log(vocab_size), 0.0, 1.0)


def aepo_branch_probability(
    probability: ArrayLike, consecutive: ArrayLike, *, penalty: float = 0.05
) -> FloatArray:
    """Lower ARPO's probability for a path that has just branched: `P (1 - penalty * l)`, at least 0.

    Args:
        probability: ARPO's branch probability.
        consecutive: l, how many branches in a row the same path has made.
        penalty: Price of one consecutive branch.

    Returns:
        Probabilities.
    """
    factor = 1.0 - penalty * np.asarray(consecutive, dtype=np.float64)
    return np.asarray(probability, dtype=np.float64) * np.maximum(factor, 0.0)


def aepo_root_chains(
    budget: int, root_entropy: float, tool_entropies: ArrayLike, *, beta: float = 1.0
) -> int:
    """Split a question's budget before the rollout: how many chains start at the root.

    `m = round(budget * sigmoid(beta * (H_root - mean H_tool)))`, kept within 1 and the budget; the other
    `budget - m` leaves come from branching.

    Args:
        budget: Leaves of the question.
        root_entropy: Entropy of the monitoring chain's first tokens in nats.
        tool_entropies: Its entropies after each tool result in nats; none counts as no difference.
        beta: Sharpness.

    Returns:
        m.
    """
    if budget < 1:
        raise ValueError(f"budget must be at least 1, got {budget}")
    after_tools = np.asarray(tool_entropies, dtype=np.float64)
    mean = float(after_tools.mean()) if after_tools.size else root_entropy
    difference = root_entropy - mean
    if not math.isfinite(difference):
        raise ValueError(f"entropies must be finite, got {root_entropy} and a mean of {mean}")
    share = 0.5 * (1.0 + math.tanh(0.5 * beta * difference))
    return min(budget, max(1, round(budget * share)))


def arpo_nodes(  # noqa: PLR0913  the signature of adaptive rules, then the options
    parent: IntArray,
    first_entropy: FloatArray,
    is_leaf: BoolArray,
    *,
    leaves: int,
    round: int,
    vocab_size: int,
    generator: np.random.Generator,
    base: float = 0.5,
    weight: float = 0.2,
    copies: int = 2,
    penalty: float = 0.0,
) -> list[int] | None:
    """ARPO's choice in one round.

    Round r looks at the turns that follow a branch's r-th observation, in order of creation. Each is
    re-sampled with probability `P = clip(base + weight (H - H_initial) / ln V, 0, 1)`, lowered by the factor
    `1 - penalty * l` after l consecutive branchings of its path, while leaves are left to grow. When no
    branch is that deep, the leaves that are left start at the root.

    Args:
        parent: int64[N].
        first_entropy: float64[N], nats; H of a turn, H_initial of a path's first turn.
        is_leaf: bool[N].
        leaves: Leaves of the complete tree.
        round: r, from 1.
        vocab_size: V.
        generator: Source of randomness.
        base: Probability when the entropy has not changed.
        weight: Weight of the change.
        copies: Branches that go on from one point, the original included.
        penalty: AEPO's price of a consecutive branching; 0 is ARPO.

    Returns:
        Nodes to re-sample (the root: a fresh chain), perhaps none; None when the tree is complete.

    References:
        ARPO, https://arxiv.org/abs/2507.19849.
    """
    left = leaves - int(is_leaf.sum())
    if left <= 0:
        return None
    depth = _depths(parent)
    points = np.flatnonzero(depth == round + 1)
    if not points.size:
        return [ROOT] * left
    first = [_ancestor_at(parent, depth, int(node), 1) for node in points]
    probability = arpo_branch_probability(
        first_entropy[points], first_entropy[first], vocab_size=vocab_size, base=base, weight=weight
    )
    consecutive = [_consecutive_branchings(parent, depth, int(node)) for node in points]
    probability = aepo_branch_probability(probability, consecutive, penalty=penalty)
    accepted = points[generator.random(len(points)) < probability]
    return [int(node) for node in np.repeat(accepted, copies - 1)[:left]]


def aepo_nodes(  # noqa: PLR0913  the signature of adaptive rules, then the options
    parent: IntArray,
    first_entropy: FloatArray,
    is_leaf: BoolArray,
    *,
    leaves: int,
    round: int,
    vocab_size: int,
    generator: np.random.Generator,
    base: float = 0.5,
    weight: float = 0.2,
    copies: int = 2,
    penalty: float = 0.05,
    beta: float = 1.0,
) -> list[int] | None:
    """AEPO's choice in one round: after one monitoring chain the rest of the budget is split, then as ARPO.

    Round 1 starts `m - 1` more chains, `m = round(leaves * sigmoid(beta (H_root - mean H_tool)))`; round
    r + 1 is round r of `arpo_nodes` with the penalty on consecutive branchings.

    Args:
        parent: int64[N].
        first_entropy: float64[N], nats.
        is_leaf: bool[N].
        leaves: Leaves of the complete tree.
        round: From 1.
        vocab_size: V.
        generator: Source of randomness.
        base: See `arpo_nodes`.
        weight: See `arpo_nodes`.
        copies: See `arpo_nodes`.
        penalty: Price of a consecutive branching.
        beta: Sharpness of the split.

    Returns:
        As `arpo_nodes`.

    References:
        AEPO, https://arxiv.org/abs/2510.14545.
    """
    if round == 1:
        depth = _depths(parent)
        chains = aepo_root_chains(leaves, float(first_entropy[1]), first_entropy[depth > 1], beta=beta)
        return [ROOT] * (chains - 1)
    return arpo_nodes(
        parent,
        first_entropy,
        is_leaf,
        leaves=leaves,
        round=round - 1,
        vocab_size=vocab_size,
        generator=generator,
        base=base,
        weight=weight,
        copies=copies,
        penalty=penalty,
    )


def _depths(parent: IntArray) -> IntArray:
    depth = np.zeros(len(parent), dtype=np.int64)
    for node in range(1, len(parent)):
        depth[node] = depth[parent[node]] + 1
    return depth


def _ancestor_at(parent: IntArray, depth: IntArray, node: int, level: int) -> int:
    while depth[node] > level:
        node = int(parent[node])
    return node


def _consecutive_branchings(parent: IntArray, depth: IntArray, node: int) -> int:
    """How many of the points right before a turn were branched at; chains from the root are no branching."""
    children = np.bincount(parent[1:], minlength=len(parent))
    count, above = 0, int(parent[node])
    while depth[above] > 1 and children[parent[above]] > 1:
        count, above = count + 1, int(parent[above])
    return count
