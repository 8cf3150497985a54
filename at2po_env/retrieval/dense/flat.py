"""Exact search over a matrix of vectors, in memory or mapped from disk.

One query reads the whole matrix once, so memory bandwidth is its limit: the matrix is split between threads,
each of which runs FAISS' inner-product kernel over its part. Many queries are limited by arithmetic: blocks
of the matrix are multiplied by all queries with the BLAS of numpy, and only scores above each query's current
topk-th are looked at.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from at2po_env.errors import require

Scores = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]

FEW_QUERIES = 24  # up to here a pass of the kernel per query is cheaper than a matrix product of them all
_BLOCK_BYTES = 64 * 2**20  # large, because BLAS threads wait for each other at the end of every block
_QUERIES_AT_ONCE = 256


class FlatSearch:
    """Inner-product search over `matrix` [N, D] float32; thread safe.

    Args:
        matrix: The vectors; never copied.
        threads: Parts for single queries; default: the processors of this machine.
        owner: Kept alive with the matrix, when the memory belongs to something else.
    """

    def __init__(
        self, matrix: npt.NDArray[np.float32], *, threads: int | None = None, owner: object = None
    ) -> None:
        self._faiss: Any = require("faiss", "dense")
        self._matrix, self._owner = matrix, owner
        self.ntotal, self.d = matrix.shape
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._threads = threads or cores
        # Each thread has its part: threads that FAISS starts in it would only wait for each other.
        self._pool = ThreadPoolExecutor(
            self._threads, "at2po-flat", self._faiss.omp_set_num_threads, initargs=(1,)
        )

    def search(self, queries: npt.NDArray[np.float32], topk: int) -> tuple[Scores, Rows]:
        """Return scores and rows [Q, k] of the best k = min(topk, N); equal scores among them rank by row."""
        topk = min(topk, len(self._matrix))
        if len(queries) <= FEW_QUERIES:
            return self._few(np.ascontiguousarray(queries), topk)
        parts = [
            self._many(queries[start : start + _QUERIES_AT_ONCE], topk)
            for start in range(0, len(queries), _QUERIES_AT_ONCE)
        ]
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    def _few(self, queries: npt.NDArray[np.float32], topk: int) -> tuple[Scores, Rows]:
        edges = np.linspace(0, len(self._matrix), self._threads + 1).astype(int).tolist()

        def part(start: int, end: int) -> tuple[Scores, Rows]:
            scores, rows = self._faiss.knn(
                queries, self._matrix[start:end], min(topk, end - start), self._faiss.METRIC_INNER_PRODUCT
            )
            return scores, rows + start

        spans = [(start, end) for start, end in pairwise(edges) if end > start]
        found = list(self._pool.map(lambda span: part(*span), spans))
        scores = np.concatenate([scores for scores, _ in found], axis=1)
        return _best(scores, np.concatenate([rows for _, rows in found], axis=1), topk)

    def _many(self, queries: npt.NDArray[np.float32], topk: int) -> tuple[Scores, Rows]:
        height = max(_BLOCK_BYTES // (4 * self._matrix.shape[1]), topk)
        kept_scores = np.full((len(queries), 0), -np.inf, np.float32)
        kept_rows = np.zeros((len(queries), 0), np.int64)
        for start in range(0, len(self._matrix), height):
            scores = queries @ self._matrix[start : start + height].T
            if kept_scores.shape[1] == topk:
                hopeful = np.flatnonzero((scores > kept_scores[:, -1:]).any(axis=1))
            else:
                hopeful = np.arange(len(queries))
            if not len(hopeful):
                continue
            some = scores[hopeful]
            columns = _columns(some, topk)
            merged_scores = np.concatenate(
                [kept_scores[hopeful], np.take_along_axis(some, columns, 1)], axis=1
            )
            merged_rows = np.concatenate([kept_rows[hopeful], columns + start], axis=1)
            best_scores, best_rows = _best(merged_scores, merged_rows, topk)
            if kept_scores.shape[1] != best_scores.shape[1]:
                kept_scores, kept_rows = best_scores, best_rows
            else:
                kept_scores[hopeful], kept_rows[hopeful] = best_scores, best_rows
        return kept_scores, kept_rows


def _columns(scores: Scores, topk: int) -> Rows:
    """Return the columns of the `topk` best scores of each row, in no order."""
    if scores.shape[1] <= topk:
        return np.broadcast_to(np.arange(scores.shape[1]), scores.shape).copy()
    return np.argpartition(scores, -topk, axis=1)[:, -topk:]


def _best(scores: Scores, rows: Rows, topk: int) -> tuple[Scores, Rows]:
    order = np.lexsort((rows, -scores), axis=1)[:, :topk]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
