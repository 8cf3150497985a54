"""Expansion that decides at every tool result whether to branch: ARPO's and AEPO's, as pure functions.

Both are asked round by round. A round looks at one depth of all branches grown so far, so the budget is
spent in the order of turns, as if all branches advanced in step; that branches are grown to their ends before
a copy is made of one of their turns changes nothing, since a copy does not touch the original. Chosen nodes
are re-sampled: the copy sees the same tool result.

N nodes; `parent[0] == -1`; `first_entropy` float[N] is the entropy over the first tokens of each turn
(`expansion.top_entropy`), 0 for the root.
"""

import numpy as np

from at2po_agent.expansion.rules import aepo_branch_probability, aepo_root_chains, arpo_branch_probability
from at2po_agent.tree import ROOT
from at2po_agent.types import BoolArray, FloatArray, IntArray


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
