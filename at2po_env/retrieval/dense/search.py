"""Searches vectors: exactly over a matrix (`FlatSearch`), or in FAISS files, on GPUs where wanted.

Exact search takes one of two ways. A single query reads the whole matrix once, so memory bandwidth is its
limit: the matrix is split between threads, each of which runs FAISS' inner-product kernel over its share.
    Many
queries are limited by arithmetic: blocks of the matrix are multiplied by all queries with the BLAS of numpy,
and only queries with a score above their current topk-th look further at the block.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from at2po_env.errors import MissingExtraError, RetrievalError, require
from at2po_env.retrieval.manifest import FIX

Scores = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]

FEW_QUERIES = 24  # up to here a pass of the kernel per query is cheaper than a matrix product of them all
_BLOCK_BYTES = 64 * 2**20  # large, because BLAS threads wait for each other at the end of every block
_QUERIES_AT_ONCE = 256


class FlatSearch:
    """Inner-product search over `matrix` [N, D] float32; thread safe.

    Args:
        matrix: The vectors; never copied.
        threads: How many share the work of a single query; default: the processors of this machine.
        owner: An object that owns the memory of `matrix`, if another does; it is kept alive.
    """

    def __init__(
        self, matrix: npt.NDArray[np.float32], *, threads: int | None = None, owner: object = None
    ) -> None:
        self._faiss: Any = require("faiss", "dense")
        self._matrix, self._owner = matrix, owner
        self.ntotal, self.d = matrix.shape
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._threads = threads or cores
        # Each thread has its share of the matrix: more threads, started by FAISS in it, would only compete.
        self._pool = ThreadPoolExecutor(
            self._threads, "at2po-flat", self._faiss.omp_set_num_threads, initargs=(1,)
        )

    def search(self, queries: npt.NDArray[np.float32], topk: int) -> tuple[Scores, Rows]:
        """Return scores and rows [Q, k] of the best k = min(topk, N); equal scores among them rank by row."""
        topk = min(topk, len(self._matrix))
        if len(queries) <= FEW_QUERIES:
            return self._few(np.ascontiguousarray(queries), topk)
        found = [
            self._many(queries[start : start + _QUERIES_AT_ONCE], topk)
            for start in range(0, len(queries), _QUERIES_AT_ONCE)
        ]
        return np.concatenate([scores for scores, _ in found]), np.concatenate([rows for _, rows in found])

    def _few(self, queries: npt.NDArray[np.float32], topk: int) -> tuple[Scores, Rows]:
        edges = np.linspace(0, len(self._matrix), self._threads + 1).astype(int).tolist()

        def share(span: tuple[int, int]) -> tuple[Scores, Rows]:
            start, end = span
            scores, rows = self._faiss.knn(
                queries, self._matrix[start:end], min(topk, end - start), self._faiss.METRIC_INNER_PRODUCT
            )
            return scores, rows + start

        spans = [(start, end) for start, end in pairwise(edges) if end > start]
        found = list(self._pool.map(share, spans))
        scores = np.concatenate([scores for scores, _ in found], axis=1)
        return _best(scores, np.concatenate([rows for _, rows in found], axis=1), topk)

    def _many(self, queries: npt.NDArray[np.float32], topk: int) -> tuple[Scores, Rows]:
        height = max(_BLOCK_BYTES // (4 * self._matrix.shape[1]), topk)
        kept_scores = np.full((len(queries), 0), -np.inf, np.float32)
        kept_rows = np.zeros((len(queries), 0), np.int64)
        for start in range(0, len(self._matrix), height):
            scores = queries @ self._matrix[start : start + height].T
            # Once topk rows are known, most queries find nothing better in a block and skip the sorting.
            # Equal scores lose against earlier rows, so "above" is enough.
            if kept_scores.shape[1] == topk:
                hopeful = np.flatnonzero((scores > kept_scores[:, -1:]).any(axis=1))
            else:
                hopeful = np.arange(len(queries))
            if not len(hopeful):
                continue
            some = scores[hopeful]
            if some.shape[1] > topk:  # the columns of the best scores, in no order
                columns = np.argpartition(some, -topk, axis=1)[:, -topk:]
            else:
                columns = np.broadcast_to(np.arange(some.shape[1]), some.shape)
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


def _best(scores: Scores, rows: Rows, topk: int) -> tuple[Scores, Rows]:
    order = np.lexsort((rows, -scores), axis=1)[:, :topk]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


def open_faiss(path: Path, *, gpu: bool, nprobe: int, ef_search: int, threads: int | None) -> Any:
    """Open a FAISS file; the result has `search(queries, topk)`, `d` and `ntotal`.

    Raises:
        RetrievalError: it is damaged, or no index.
    """
    faiss = require("faiss", "dense")
    try:
        index = _read(faiss, path)
    except RuntimeError as error:
        raise RetrievalError(f"{path} is damaged or no FAISS index ({str(error)[-120:]}). {FIX}") from error
    if gpu:
        return on_gpus(index)
    if isinstance(index, faiss.IndexFlat) and index.metric_type == faiss.METRIC_INNER_PRODUCT:
        matrix = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(index.ntotal, index.d)
        return FlatSearch(matrix, threads=threads, owner=index)
    inner = faiss.downcast_index(index)
    if hasattr(inner, "nprobe"):
        inner.nprobe = nprobe
    if hasattr(inner, "hnsw"):
        inner.hnsw.efSearch = ef_search
    return index


def _read(faiss: Any, path: Path) -> Any:
    """Map the file; the flag that maps the cells of an inverted file is not the one for everything else."""
    for flags in ("IO_FLAG_MMAP_IFC", "IO_FLAG_MMAP"):
        flag = getattr(faiss, flags, None)  # the first is missing before FAISS 1.11
        if flag is None:
            continue
        try:
            index = faiss.read_index(str(path), flag)
        except RuntimeError:
            continue
        if hasattr(faiss.downcast_index(index), "invlists") == (flags == "IO_FLAG_MMAP"):
            return index
    return faiss.read_index(str(path))


def matrix_on_gpus(matrix: npt.NDArray[np.float32]) -> Any:
    """Put vectors on all GPUs."""
    index = require("faiss", "dense").IndexFlatIP(matrix.shape[1])
    index.add(np.ascontiguousarray(matrix))
    return on_gpus(index)


def on_gpus(index: Any) -> Any:
    """Spread an index over all GPUs, in shards of half precision.

    Raises:
        MissingExtraError: this FAISS knows no GPUs.
        RetrievalError: there are none.
    """
    faiss = require("faiss", "faiss-gpu")
    if not hasattr(faiss, "GpuMultipleClonerOptions"):
        raise MissingExtraError(
            "this FAISS was built without GPUs. Fix: pip uninstall faiss-cpu; pip install 'at2po[faiss-gpu]'"
        )
    if not faiss.get_num_gpus():
        raise RetrievalError("gpu=True, and FAISS sees no GPU. Fix: leave gpu out, or make one visible.")
    options = faiss.GpuMultipleClonerOptions()
    options.shard, options.useFloat16 = True, True
    return faiss.index_cpu_to_all_gpus(index, options)
