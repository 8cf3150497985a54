"""Branches of trees as arrays: the tokens from the prompt to a leaf, and which of them are trained.

Alignment, here and in every batch: entry t belongs to token t, and its log-prob is that of token t given the
tokens before it; so token 0 is never trained. Turn ids count the turns of the branch, 0 to K-1, and are -1 on
everything that the policy did not sample: prompt, observations, forced tokens, padding.

Under a window transcript each turn has a prompt of its own, so a branch is several sequences, one after the
other; no token sees another sequence. `starts` tells where they begin; such a token is never trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from numpy.typing import ArrayLike

from at2po_agent.tree import Tree
from at2po_agent.types import Float32Array, IntArray

Overflow: TypeAlias = Literal["error", "truncate", "drop"]


class BranchTokens(NamedTuple):
    """One branch of T tokens, in one sequence or several.

    Attributes:
        ids: int64[T].
        turn_ids: int64[T], -1 where not trained.
        advantages: float32[T], 0 where not trained.
        log_probs: float32[T], nats, as sampled; 0 where not trained.
        starts: Where its sequences begin, in increasing order; the first is 0.
        tree: Index of its tree among those that were given.
    """

    ids: IntArray
    turn_ids: IntArray
    advantages: Float32Array
    log_probs: Float32Array
    starts: tuple[int, ...] = (0,)
    tree: int = 0

    @property
    def sequences(self) -> list[IntArray]:
        """The ids of each sequence."""
        return np.split(self.ids, self.starts[1:])

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(sequence) for sequence in self.sequences)


def tree_branches(
    trees: Sequence[Tree],
    advantages: Sequence[ArrayLike],
    *,
    max_length: int | None = None,
    overflow: Overflow = "error",
) -> list[BranchTokens]:
    """Read the branches of trees, in the order of the trees and their leaves.

    Args:
        trees: Trees with at least one leaf in all.
        advantages: One array per tree: float[N] per node, float[L] per branch (leaves in order of creation),
            or float[L, N] per node and branch.
        max_length: Longest sequence allowed, in tokens; None for no limit.
        overflow: What happens to a branch with a longer one: `error`; `truncate` the end of its sequences
            (the tokens beyond are not trained, the rest keeps its advantages); `drop` it.

    Raises:
        ValueError: No branch has tokens, one is too long, or advantages have the wrong shape or are not
        finite
            on a branch.
    """
    if len(trees) != len(advantages):
        raise ValueError(
            f"need one array of advantages per tree: got {len(advantages)} for {len(trees)} trees"
        )
    if overflow not in get_args(Overflow):
        raise ValueError(f"overflow must be one of {get_args(Overflow)}, got {overflow!r}")
    branches = [
        branch._replace(tree=index)
        for index, (tree, given) in enumerate(zip(trees, advantages, strict=True))
        for branch in _branches(tree, given)
    ]
    if max_length is not None:
        branches = _limit(branches, max_length, overflow)
    if not any(len(branch.ids) for branch in branches):
        raise ValueError(
            "nothing to pack: no tree has a leaf with tokens, or every branch was dropped as too long"
        )
    return branches


def _branches(tree: Tree, advantages: ArrayLike) -> Iterator[BranchTokens]:
    leaves = tree.leaves()
    given = np.asarray(advantages, dtype=np.float64)
    # A number per branch is one for each of its nodes. The root is no leaf, so shapes (L,) and (N,) differ.
    if given.shape == (len(leaves),):
        given = given[:, None]
    elif given.shape not in ((len(tree),), (len(leaves), len(tree))):
        raise ValueError(
            f"advantages of a tree with {len(tree)} nodes and {len(leaves)} leaves must have shape "
            f"({len(tree)},), ({len(leaves)},) or ({len(leaves)}, {len(tree)}), got {given.shape}"
        )
    per_branch = np.broadcast_to(given, (len(leaves), len(tree)))

    # The tokens of each node, read once however many branches run through it: first what the turn observed
    # (or its own prompt), which is not sampled, then what the policy wrote, of which some tokens may have
    # been forced.
    ids = [np.array(tree.prompt_ids, dtype=np.int64)]
    sampled = [np.zeros(len(tree.prompt_ids), dtype=np.bool_)]
    log_probs = [np.zeros(len(tree.prompt_ids), dtype=np.float32)]
    fresh = [False]  # whether a turn begins a sequence
    for turn in tree.turns[1:]:
        assert turn is not None, "only the root has no turn"
        fresh.append(turn.prompt_ids is not None)
        observed = len(turn.ids) - len(turn.action_ids)
        ids.append(np.array(turn.ids, dtype=np.int64))
        sampled.append(np.concatenate([np.zeros(observed, dtype=np.bool_), turn.sampled_mask]))
        log_probs.append(np.concatenate([np.zeros(observed, dtype=np.float32), turn.sampled_log_probs]))

    for leaf, values in zip(leaves, per_branch, strict=True):
        path = tree.path(leaf)
        if not np.isfinite(values[path[1:]]).all():
            raise ValueError(
                f"advantages must be finite on every turn of a branch; branch of node {leaf}: {values}"
            )
        trained = np.concatenate([sampled[node] for node in path])
        lengths = [len(ids[node]) for node in path]
        begins = np.cumsum([0, *lengths[:-1]])
        starts = (0, *(int(begin) for begin, node in zip(begins, path, strict=True) if fresh[node]))
        trained[[start for start in starts if start < len(trained)]] = False
        turn_ids = np.repeat(np.arange(-1, len(path) - 1), lengths)  # -1 is the root, that is, the prompt
        spread = np.repeat(values[path], lengths)
        yield BranchTokens(
            ids=np.concatenate([ids[node] for node in path]),
            turn_ids=np.where(trained, turn_ids, -1),
            advantages=np.where(trained, spread, 0.0).astype(np.float32),
            log_probs=np.where(trained, np.concatenate([log_probs[n] for n in path]), np.float32(0)),
            starts=starts,
        )


def _limit(branches: list[BranchTokens], max_length: int, overflow: Overflow) -> list[BranchTokens]:
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    too_long = [branch.longest for branch in branches if branch.longest > max_length]
    if overflow == "drop":
        return [branch for branch in branches if branch.longest <= max_length]
    if overflow == "truncate":
        return [_truncate(branch, max_length) for branch in branches]
    if too_long:
        raise ValueError(
            f"{len(too_long)} of {len(branches)} rows are longer than max_length {max_length} (the longest "
            f"has {max(too_long)} tokens); shorten the rollout, raise max_length, or choose "
            "overflow='truncate' or 'drop'"
        )
    return branches


def _truncate(branch: BranchTokens, max_length: int) -> BranchTokens:
    """Cut every sequence of a branch after so many tokens."""
    lengths = [len(sequence) for sequence in branch.sequences]
    kept = np.concatenate([np.arange(length) < max_length for length in lengths])
    starts = np.cumsum([0, *(min(length, max_length) for length in lengths[:-1])])
    return BranchTokens(
        branch.ids[kept],
        branch.turn_ids[kept],
        branch.advantages[kept],
        branch.log_probs[kept],
        tuple(starts.tolist()),
        branch.tree,
    )
