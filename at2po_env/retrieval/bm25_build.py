"""Passages to BM25 postings in bounded memory.

The weight of term t in passage d is stored ready to be summed, as in the paper of bm25s:

    w(t, d) = idf(t) * tf / (tf + k1 * (1 - b + b * |d| / mean |d|))
    idf(t) = ln(1 + (N - df + 0.5) / (df + 0.5))

This is Lucene's BM25 (method "lucene" of bm25s), with the exact passage length where Lucene rounds it to
one byte.

One pass over the passages writes blocks of counted terms, a second over the blocks places every posting
where it belongs. Memory: the vocabulary and a block of `BLOCK_TERMS` terms; postings lie in the arrays
that the store gives.

References:
    Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009.
    Lù, "BM25S", https://arxiv.org/abs/2407.03618
"""

import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from at2po_env.data.passages import Passage
from at2po_env.data.progress import progress_bar
from at2po_env.retrieval.tokens import tokenize

Array = npt.NDArray[Any]
Block = npt.NDArray[np.uint32]  # [3, n]: term, row, frequency; sorted by term, then row

BLOCK_TERMS = 1 << 21


class Settings(NamedTuple):
    """What an index depends on beside the corpus."""

    k1: float
    b: float
    stop_words: frozenset[str]


class Postings(NamedTuple):
    """The index: the term with hash terms[i] has the postings starts[i] to starts[i + 1]."""

    terms: npt.NDArray[np.uint64]  # sorted
    starts: npt.NDArray[np.int64]
    rows: Array  # unsigned, ascending within a term
    weights: npt.NDArray[np.float32]


class Store(Protocol):
    """Where a build keeps its blocks and its result."""

    def put(self, block: Block) -> None:
        """Keep a block."""

    def blocks(self) -> Iterator[Block]:
        """Return the blocks in the order in which they came."""

    def array(self, name: str, dtype: type[np.generic], length: int) -> Array:
        """Return a writable array of the result."""


class MemoryStore:
    """Keeps everything in memory."""

    def __init__(self) -> None:
        self._blocks: list[Block] = []

    def put(self, block: Block) -> None:
        """Keep a block."""
        self._blocks.append(block)

    def blocks(self) -> Iterator[Block]:
        """Return the blocks in the order in which they came."""
        return iter(self._blocks)

    def array(self, name: str, dtype: type[np.generic], length: int) -> Array:  # noqa: ARG002
        """Return a new array."""
        return np.zeros(length, dtype)


class FolderStore:
    """Keeps blocks and result as files of one folder; the system pages them out under memory pressure."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def put(self, block: Block) -> None:
        """Write a block."""
        np.save(self._folder / f"block-{self._count}.npy", block)
        self._count += 1

    def blocks(self) -> Iterator[Block]:
        """Read each block and delete its file."""
        for number in range(self._count):
            path = self._folder / f"block-{number}.npy"
            yield np.load(path)
            path.unlink()

    def array(self, name: str, dtype: type[np.generic], length: int) -> Array:
        """Return a new memory-mapped file (of at least one item: an empty file cannot be mapped)."""
        path, size = self._folder / name, max(length, 1) * np.dtype(dtype).itemsize
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, not a crash at the first write
                os.posix_fallocate(file.fileno(), 0, size)
            file.truncate(size)
        return np.memmap(path, dtype, mode="r+")[:length]


def term_hash(term: str) -> int:
    """Return the 64-bit key under which a term is stored."""
    return int.from_bytes(
        hashlib.blake2b(term.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
    )


def build(passages: Iterable[Passage], settings: Settings, store: Store, *, total: int) -> Postings:
    """Build the postings of `passages`; `total` is their number."""
    vocabulary: dict[str, int] = {}
    lengths = np.zeros(total, np.int64)
    frequency = np.zeros(0, np.int64)
    with progress_bar("Indexing", total, unit="passages") as advance:
        for first, term_ids, counts in _batches(passages, settings.stop_words, vocabulary):
            lengths[first : first + len(counts)] = counts
            block = _block(first, term_ids, counts, total)
            frequency = np.bincount(block[0], minlength=len(vocabulary)) + _padded(frequency, len(vocabulary))
            store.put(block)
            advance(len(counts))
    return _place(vocabulary, frequency, lengths, settings, store)


def _batches(
    passages: Iterable[Passage], stop_words: frozenset[str], vocabulary: dict[str, int]
) -> Iterator[tuple[int, Array, Array]]:
    """Yield (first row, term ids of some passages one after the other, number of terms of each)."""
    term_ids, counts, first = array("I"), array("I"), 0
    for passage in passages:
        terms = tokenize(f"{passage.title} {passage.text}", stop_words)
        term_ids.extend([vocabulary.setdefault(term, len(vocabulary)) for term in terms])
        counts.append(len(terms))
        if len(term_ids) >= BLOCK_TERMS:
            yield first, np.array(term_ids, np.int64), np.array(counts, np.int64)
            first += len(counts)
            term_ids, counts = array("I"), array("I")
    if counts:
        yield first, np.array(term_ids, np.int64), np.array(counts, np.int64)


def _block(first: int, term_ids: Array, counts: Array, total: int) -> Block:
    rows = np.repeat(np.arange(first, first + len(counts)), counts)
    pairs, frequency = np.unique(term_ids * total + rows, return_counts=True)
    return np.stack([pairs // total, pairs % total, frequency]).astype(np.uint32)


def _padded(counts: Array, length: int) -> Array:
    return np.pad(counts, (0, length - len(counts)))


def _place(
    vocabulary: dict[str, int], frequency: Array, lengths: Array, settings: Settings, store: Store
) -> Postings:
    """Put every posting at its place: terms in the order of their hashes, rows ascending within a term.

    Two terms with the same 64-bit hash (a chance of 2 in a million for 8 million terms) would hide one of
    them.
    """
    hashes = np.fromiter(map(term_hash, vocabulary), np.uint64, len(vocabulary))
    order = np.argsort(hashes)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    postings = Postings(
        store.array("terms.u64", np.uint64, len(order)),
        store.array("starts.i64", np.int64, len(order) + 1),
        store.array("rows.u32", np.uint32, int(frequency.sum())),
        store.array("weights.f32", np.float32, int(frequency.sum())),
    )
    postings.terms[:] = hashes[order]
    postings.starts[1:] = np.cumsum(frequency[order])
    idf = np.log1p((len(lengths) - frequency + 0.5) / (frequency + 0.5))[order]
    relative = lengths * (len(lengths) / max(int(lengths.sum()), 1))
    norm = settings.k1 * (1 - settings.b + settings.b * relative)
    free = postings.starts[:-1].copy()
    with progress_bar("Writing the index", len(postings.rows), unit="postings") as advance:
        for block in store.blocks():
            term, row, tf = rank[block[0]], block[1], block[2].astype(np.float64)
            runs = np.flatnonzero(np.diff(term, prepend=-1))
            sizes = np.diff(runs, append=len(term))
            at = free[term] + np.arange(len(term)) - np.repeat(runs, sizes)
            free[term[runs]] += sizes
            postings.rows[at] = row
            postings.weights[at] = idf[term] * tf / (tf + norm[row])
            advance(len(term))
    return postings
