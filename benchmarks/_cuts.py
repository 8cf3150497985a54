"""How good the cuts of `prefixes.cut_branches` are: small random trees, against exhaustive search."""

from __future__ import annotations

import numpy as np

from at2po_agent.packing.prefixes import SortedBranches, cut_branches, lower_bound, sort_branches
from benchmarks._trees import TreeShape, random_tree


def cut_quality(trees: int = 2000, seed: int = 0) -> dict[str, float]:
    """Cuts of small random trees against the best of all groupings of their branches, by exhaustive search.

    Returns:
        optimal: Share of trees that were cut as well as possible; excess_mean and excess_max: tokens over the
        best, relative to it; bound_excess_mean: the same over `lower_bound`.
    """
    rng = np.random.default_rng(seed)
    excess, over_bound = [], []
    for _ in range(trees):
        tree = random_tree(
            TreeShape(int(rng.integers(2, 5)), int(rng.integers(1, 4)), 1, (1, 5), (5, 40), (3, 20), (3, 20)),
            vocabulary=50,
            seed=int(rng.integers(1 << 31)),
        )
        rows = sort_branches([np.array(tree.branch_ids(leaf)) for leaf in tree.leaves()])
        budget = int(rng.integers(rows.lengths.max(), rows.unique_tokens + 1))
        got = sum(_size(rows, cut) for cut in cut_branches(rows, budget))
        best = _best_grouping(rows, budget)
        excess.append(got / best - 1)
        over_bound.append(got / lower_bound(rows, budget) - 1)
    return {
        "optimal": float(np.mean(np.array(excess) == 0)),
        "excess_mean": float(np.mean(excess)),
        "excess_max": float(np.max(excess)),
        "bound_excess_mean": float(np.mean(over_bound)),
    }


def _size(rows: SortedBranches, cut: slice) -> int:
    return int((rows.lengths[cut] - rows.shared[cut]).sum() + rows.shared[cut.start])


def _best_grouping(rows: SortedBranches, budget: int) -> int:
    """The fewest tokens over all set partitions of the branches into packs within the budget."""
    count = len(rows.order)
    sizes = {}
    for chosen in range(1, 1 << count):
        part = rows.keep(rows.order[[i for i in range(count) if chosen >> i & 1]])
        sizes[chosen] = part.unique_tokens
    best = {0: 0}
    for chosen in range(1, 1 << count):
        first, part, options = chosen & -chosen, chosen, []
        while part:
            if part & first and sizes[part] <= budget:
                options.append(sizes[part] + best[chosen ^ part])
            part = (part - 1) & chosen
        best[chosen] = min(options)
    return best[(1 << count) - 1]
