"""Branches that share prefixes, as intervals of one sequence: pure index arithmetic.

Branches sorted by their ids are the leaves of their prefix tree in depth-first order, and the number of
leading ids that neighbours share says everything about that tree. Branch i adds a *run*: its ids after the
`shared[i]` leading ones that it has in common with the branch before it. All runs, one after another, hold
every unique token once, and the descendants of a token follow it without a gap: token j is an ancestor of
token i (or i itself) exactly if `j <= i < last[j]`.

    branches   5 / 7 8 / 7 8 9 1 / 7 8 9 2          place     0   1 2   3 4   5
    shared     0   0     2         3                runs      5 | 7 8 | 9 1 | 2
                                                    position  0   0 1   2 3   3
                                                    last      1   6 6   6 5   6

A branch of several sequences (a window transcript gives each turn a prompt of its own) is sorted as one text:
its sequences one after the other. What two branches share counts up to where these texts first differ, and
what the sequences of one branch have in common counts once. So counts are exact within a branch and at least
the truth between branches; a pack lays out all sequences, and shares whatever they share.

This module knows neither trees of turns nor tensors.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from at2po_agent.types import IntArray


class SortedBranches(NamedTuple):
    """Branches in depth-first order.

    Attributes:
        order: int64[B], indices of the branches.
        lengths: int64[B], tokens of `order[i]`; those that its own sequences share count once.
        shared: int64[B], leading tokens that `order[i]` has in common with `order[i - 1]`; `shared[0]` is 0.
    """

    order: IntArray
    lengths: IntArray
    shared: IntArray

    @property
    def unique_tokens(self) -> int:
        """Tokens when every shared prefix counts once."""
        return int((self.lengths - self.shared).sum())

    def keep(self, branches: IntArray) -> SortedBranches:
        """Some of the branches; two of them share the least that is shared on the way between them."""
        places = np.flatnonzero(np.isin(self.order, branches))
        if not len(places):
            return SortedBranches(*(field[:0] for field in self))
        shared = self.shared[: places[-1] + 1]
        least = np.minimum.reduceat(shared, np.concatenate([[0], places[:-1] + 1]))
        least[0] = 0
        return SortedBranches(self.order[places], self.lengths[places], least)


def sort_branches(
    branches: Sequence[IntArray], starts: Sequence[Sequence[int]] | None = None
) -> SortedBranches:
    """Put branches into depth-first order and find what neighbours share.

    Args:
        branches: int64[T_i] each, token ids.
        starts: Where the sequences of each branch begin; None for one sequence each.
    """
    if starts is not None and any(len(begins) > 1 for begins in starts):
        return _sort_sequences(branches, starts)
    order = _sorted_order(branches)
    shared = np.zeros(len(order), dtype=np.int64)
    for place, (one, other) in enumerate(pairwise(order), start=1):
        shared[place] = _common(branches[one], branches[other])
    lengths = np.array([len(branches[index]) for index in order], dtype=np.int64)
    return SortedBranches(np.array(order, dtype=np.int64), lengths, shared)


def _sort_sequences(branches: Sequence[IntArray], starts: Sequence[Sequence[int]]) -> SortedBranches:
    """Sort branches of several sequences.

    The text of a branch is its sequences, with a mark before each but the first, so that branches that are
    cut in different places differ. Sequence k adds the tokens after its first `known[k]`, which an earlier
    sequence of the branch begins with too. So the first s places of a text stand for
    `sum over k of clip(s - begin[k] - known[k], 0, added[k])` tokens.
    """
    texts, begins, known, added = [], [], [], []
    for ids, cuts in zip(branches, starts, strict=True):
        sequences = np.split(ids, list(cuts[1:]))
        # Among the earlier sequences, in sorted order, a neighbour has most in common with the next one.
        seen: list[tuple[bytes, int]] = []
        overlaps = []
        for number, sequence in enumerate(sequences):
            entry = _sort_key(sequence), number
            place = bisect(seen, entry)
            beside = seen[max(0, place - 1) : place + 1]
            overlaps.append(max((_common(sequence, sequences[other]) for _, other in beside), default=0))
            seen.insert(place, entry)
        texts.append(np.insert(ids, list(cuts[1:]), -1))
        begins.append(np.array(cuts) + np.arange(len(cuts)))
        known.append(np.array(overlaps))
        added.append(np.array([len(sequence) for sequence in sequences]) - known[-1])

    order = _sorted_order(texts)
    shared = np.zeros(len(order), dtype=np.int64)
    for place, (one, other) in enumerate(pairwise(order), start=1):
        alike = _common(texts[one], texts[other])
        shared[place] = np.clip(alike - begins[other] - known[other], 0, added[other]).sum()
    lengths = np.array([int(added[index].sum()) for index in order], dtype=np.int64)
    return SortedBranches(np.array(order, dtype=np.int64), lengths, shared)


def _sorted_order(texts: Sequence[IntArray]) -> list[int]:
    keys = [_sort_key(text) for text in texts]
    return sorted(range(len(texts)), key=keys.__getitem__)


def _sort_key(ids: IntArray) -> bytes:
    """Bytes that sort as the numbers do: those of big-endian ones, which compare at the speed of memcmp."""
    return ids.astype(">u8").tobytes()


def _common(one: IntArray, other: IntArray) -> int:
    """How many leading numbers two arrays have in common."""
    size = min(len(one), len(other))
    differ = np.flatnonzero(one[:size] != other[:size])
    return int(differ[0]) if len(differ) else size


def cut_branches(branches: SortedBranches, max_tokens: int) -> list[slice]:
    """Cut branches into packs of at most `max_tokens` unique tokens, with as little repetition as possible.

    A pack is a slice of the depth-first order. A pack that begins with branch i holds the `shared[i]` tokens
    again that the pack before it holds already, and that is all the repetition there is:
    `sum of the packs = unique_tokens + sum over the cuts of shared[i]`. Dynamic programming over the last cut
    finds the packs with the least sum, among those the fewest, and among those the ones whose largest pack is
    smallest. A branch longer than the budget makes a pack of its own length, which it shares with nothing but
    branches that lie within it.

    Distance from the least possible: no cut of this order repeats less (a test compares all of them); other
    groupings could only gain by putting branches that are no neighbours into one pack. Over 2,000 random
    trees of up to 7 branches the sum was that of the best of *all* groupings in 86%, 0.9% above it in the
    mean and 22% at worst (`benchmarks.packing`). Trees of the published shape are cut into halves at
    `lower_bound` itself, into quarters within 6% of it.

    Args:
        branches: Branches in depth-first order.
        max_tokens: Budget of a pack.

    Returns:
        Slices of the order, one per pack.
    """
    count = len(branches.order)
    shared, lengths = branches.shared.tolist(), branches.lengths.tolist()
    most = max([max_tokens, *lengths])
    # best[end] describes the best packs of the first `end` branches: tokens that they repeat, how many they
    # are, tokens of the largest, and where the last one begins. Tuples compare in this order of importance.
    best: list[tuple[int, int, int, int]] = [(0, 0, 0, 0)]
    for end in range(1, count + 1):
        size, longest, options = 0, 0, []
        for start in range(end - 1, -1, -1):
            # The last pack is [start, end): the first branch whole, and of every other what it adds. Going
            # down with `start`, `size` sums what is added; what the first branch repeats comes on top.
            size += lengths[start] - shared[start]
            longest = max(longest, lengths[start])
            if size > most:
                break
            again = shared[start]
            if size + again <= max(max_tokens, longest):
                repeated, packs, largest, _ = best[start]
                options.append((repeated + again, packs + 1, max(largest, size + again), start))
        best.append(min(options))
    # Follow the last packs from the end.
    cuts, end = [], count
    while end:
        start = best[end][3]
        cuts.append(slice(start, end))
        end = start
    return cuts[::-1]


def lower_bound(branches: SortedBranches, max_tokens: int) -> int:
    """A number of tokens that no grouping into packs of at most `max_tokens` can go below.

    n packs hold the prefix that all branches share n times: `unique + (n - 1) c`, and n packs of at most
    `max_tokens` hold that only if `n >= (unique - c) / (max_tokens - c)`.
    """
    if not len(branches.order):
        return 0
    common = int(branches.shared[1:].min()) if len(branches.order) > 1 else int(branches.lengths[0])
    unique = branches.unique_tokens
    if max_tokens <= common:
        return unique
    packs = max(1, -(-(unique - common) // (max_tokens - common)))
    return unique + (packs - 1) * common


@dataclass(frozen=True, eq=False)
class Layout:
    """Where each of the P tokens of a pack stands, and which tokens descend from it.

    Attributes:
        runs: The places of each run. A token's ancestors in its own run are the tokens before it there.
        segments: Its ancestors in other runs, as pairs (ancestors, descendants) of slices: every token of the
            first is an ancestor of every token of the second. Together with the runs they name each pair of
            ancestor and descendant once.
        last: int64[P], one past the last descendant of each token, itself included.
        positions: int64[P], depth of each token in its branches.
        paths: For each branch, in order, the places int64[T_i] of its tokens.
    """

    runs: list[slice]
    segments: list[tuple[slice, slice]]
    last: IntArray
    positions: IntArray
    paths: list[IntArray]

    @property
    def longest(self) -> int:
        """Tokens of the longest branch."""
        return int(self.positions.max()) + 1 if len(self.positions) else 0


def lay_out(lengths: IntArray, shared: IntArray) -> Layout:
    """Place the tokens of some neighbouring branches.

    Args:
        lengths: int64[B], at least one.
        shared: int64[B]; the first is not looked at: the first branch is placed whole.
    """
    fresh = lengths - np.concatenate([[0], shared[1:]])
    total = int(fresh.sum())
    last = np.full(total, total, dtype=np.int64)
    positions = np.empty(total, dtype=np.int64)
    runs: list[slice] = []
    paths: list[IntArray] = []
    path = np.empty(0, dtype=np.int64)
    begin = 0
    for length, new in zip(lengths.tolist(), fresh.tolist(), strict=True):
        # The path leaves that of the branch before after `kept` tokens. The tokens behind that
        # have no more descendants: the next token, at `begin`, is not one of them.
        kept = length - new
        last[path[kept:]] = begin
        end = begin + new
        path = np.concatenate([path[:kept], np.arange(begin, end)])
        positions[begin:end] = np.arange(kept, length)
        if new:
            runs.append(slice(begin, end))
        paths.append(path)
        begin = end

    # The tokens of a run fall into segments with the same last descendant. Those whose descendants go on
    # beyond the run are ancestors of everything that follows it up to there.
    segments = []
    for run in runs:
        bounds = np.flatnonzero(np.diff(last[run.start : run.stop])) + run.start + 1
        for first, stop in pairwise([run.start, *bounds.tolist(), run.stop]):
            if last[first] > run.stop:
                segments.append((slice(first, stop), slice(run.stop, int(last[first]))))
    return Layout(runs, segments, last, positions, paths)
