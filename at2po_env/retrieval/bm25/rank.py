"""Finds the best rows for weighted terms: exactly, with numpy alone.

A row's score is the sum of its weights over the query's terms. With few postings they are all summed
(`_sum`). With many, frequent terms would cost most and decide least, so they are pruned (`_prune`, MaxScore):

1. Sum the postings of the terms from the rarest on.
2. After each term, bound what the remaining terms can still add: the sum of their highest weights. When the
   best rows are ahead of all others by more than that, no new row can reach them: stop reading postings.
3. For the rows that can still win, look up the remaining terms one by one, and after each drop the rows that
   fell too far behind.

Every row's score is summed in the same order either way, so pruning changes no bit of the result.

References:
    Turtle and Flood, "Query evaluation: strategies and optimizations", 1995.
"""

from collections import deque
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from at2po_env.retrieval.bm25.build import Postings, term_hash

PRUNE_FROM = 1 << 14  # postings; below, summing all of them is faster
_SLACK = 1.0 - 1e-4  # covers the rounding of float32 sums
_KNOWN_TERMS = 1 << 16

Rows = npt.NDArray[Any]
Scores = npt.NDArray[np.float32]


class _Term(NamedTuple):
    """A term of a query: its postings are start to start + length of the index.

    `length` comes first, so that sorting terms puts the rarest first. `times` is how often the query has it.
    """

    length: int
    start: int
    highest: float
    times: int


class Ranker:
    """Ranks the rows of one index; thread safe.

    Args:
        postings: The index.
        size: The number of rows.
    """

    def __init__(self, postings: Postings, size: int) -> None:
        self._terms, self._starts, self._rows, self._weights = postings
        if not isinstance(self._rows.base, np.memmap):  # numpy indexes faster with its own integer type
            self._rows = self._rows.astype(np.intp)
        self._size = size
        self._term = lru_cache(_KNOWN_TERMS)(self._find)
        # Scores by row, all zero between searches. Each search takes a buffer and gives it back, so there are
        # as many as searches ever ran at once, and none has to be filled with zeros again.
        self._buffers: deque[Scores] = deque()

    def rank(self, counts: Mapping[str, int], topk: int) -> list[tuple[int, float]]:
        """Return at most `topk` (row, score > 0), best first, equal scores by row."""
        terms = sorted(filter(None, map(self._term, counts, counts.values())))
        if not terms:
            return []
        few = sum(term.length for term in terms) <= PRUNE_FROM
        rows, scores = self._sum(terms) if few else self._prune(terms, topk)
        # `_sum` returns a row once for each of its terms. So the best topk * terms entries hold at least the
        # best topk rows, and `>=` keeps all ties with the last of them; only these are sorted.
        enough = topk * len(terms)
        if len(scores) > enough:
            best = scores >= _nth_best(scores, enough)
            rows, scores = rows[best], scores[best]
        ranked = sorted(set(zip((-scores).tolist(), rows.tolist(), strict=True)))[:topk]
        return [(row, -score) for score, row in ranked]

    def _find(self, term: str, times: int) -> _Term | None:
        key = np.uint64(term_hash(term))
        at = int(np.searchsorted(self._terms, key))
        if at == len(self._terms) or self._terms[at] != key:
            return None
        start, end = int(self._starts[at]), int(self._starts[at + 1])
        return _Term(end - start, start, float(self._weights[start:end].max()), times)

    def _postings(self, term: _Term) -> tuple[Rows, Scores]:
        here = slice(term.start, term.start + term.length)
        weights = self._weights[here]
        return self._rows[here], weights if term.times == 1 else weights * np.float32(term.times)

    def _sum(self, terms: list[_Term]) -> tuple[Rows, Scores]:
        """Sum all postings; a row comes as often as terms have it, each time with its whole score."""
        found = [self._postings(term) for term in terms]
        rows = np.concatenate([rows for rows, _ in found])
        buffer = self._take()
        np.add.at(buffer, rows, np.concatenate([weights for _, weights in found]))
        scores = buffer[rows]
        buffer[rows] = 0
        self._buffers.append(buffer)
        return rows, scores

    def _prune(self, terms: list[_Term], topk: int) -> tuple[Rows, Scores]:
        """Sum as `_sum` does, leaving out rows that cannot be among the best."""
        buffer = self._take()
        seen: list[Rows] = []
        postings_left = sum(term.length for term in terms)
        floor = 0.0
        # Read postings until rows not seen yet cannot win. `floor` is then the score that a row needs by now;
        # it is positive exactly when a row without any of the terms so far (score 0) is too far behind.
        for number, term in enumerate(terms, start=1):
            new, weights = self._postings(term)
            np.add.at(buffer, new, weights)
            seen.append(new)
            postings_left -= term.length
            if postings_left > term.length:  # else the next term is as cheap as finding the floor
                # `seen` has a row up to `number` times: the topk-th best row is among the best topk * number.
                floor = _floor(buffer[np.concatenate(seen)], topk * number, terms[number:])
                if floor > 0:
                    break
        rows, scores = self._drain(buffer, seen, floor)
        # Complete the scores of the rows that are left; the more terms are done, the higher the floor.
        for done, term in enumerate(terms[number:], start=number + 1):
            self._look_up(term, rows, scores)
            keep = scores >= _floor(scores, topk, terms[done:])
            rows, scores = rows[keep], scores[keep]
        return rows, scores

    def _drain(self, buffer: Scores, seen: list[Rows], floor: float) -> tuple[Rows, Scores]:
        """Return each row of `seen` that has at least `floor` once, and its score; give the buffer back."""
        rows, scores = [], []
        for some in seen:
            here = buffer[some]
            buffer[some] = 0  # so that a later term does not return the row again
            keep = (here >= floor) & (here > 0)
            rows.append(some[keep])
            scores.append(here[keep])
        self._buffers.append(buffer)
        return np.concatenate(rows), np.concatenate(scores)

    def _look_up(self, term: _Term, candidates: Rows, scores: Scores) -> None:
        """Add the term's weights to the scores of the candidates that have it."""
        here = slice(term.start, term.start + term.length)
        rows, weights = self._rows[here], self._weights[here]
        # The rows of a term ascend: bisect for each candidate instead of reading all of them.
        at = np.minimum(np.searchsorted(rows, candidates.astype(rows.dtype)), term.length - 1)
        has = rows[at] == candidates
        scores[has] += weights[at[has]] * np.float32(term.times)

    def _take(self) -> Scores:
        try:
            return self._buffers.pop()
        except IndexError:
            return np.zeros(self._size, np.float32)


def _floor(scores: Scores, n: int, left: list[_Term]) -> float:
    """Return the score that a row needs by now to be among the best `n` when the terms `left` are summed too.

    That is the n-th best score so far less all that the terms left can add to a row behind it.
    """
    return _nth_best(scores, n) * _SLACK - sum(term.highest * term.times for term in left)


def _nth_best(scores: Scores, n: int) -> float:
    return float(np.partition(scores, -n)[-n]) if len(scores) >= n else 0.0
