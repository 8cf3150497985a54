"""Turns passages into BM25 postings in bounded memory.

The weight of term t in passage d is stored ready to be summed, as in the paper of bm25s:

    w(t, d) = idf(t) * tf / (tf + k1 * (1 - b + b * |d| / mean |d|))
    idf(t) = ln(1 + (N - df + 0.5) / (df + 0.5))

This is Lucene's BM25 (method "lucene" of bm25s), with the exact passage length where Lucene rounds it to
one byte.

A build makes two passes:

1. It tokenizes the passages, counts the terms of each, and keeps the counts in blocks of about `BLOCK_TERMS`
   terms (`_count`). Only the vocabulary, the passage lengths and one block are in memory. The weights need
   idf and the mean length, which are known after the last passage.
2. It reads the blocks again and writes every posting directly to its final position (`_place`).

The store keeps blocks and postings in memory or in a folder. In a folder, a build continues after the last
block that a killed build has written, and the blocks are dropped when the postings are complete.

References:
    Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009.
    Lù, "BM25S", https://arxiv.org/abs/2407.03618
"""

import hashlib
import os
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from at2po_env.data.corpus import Corpus, Passage
from at2po_env.data.progress import ProgressBar
from at2po_env.retrieval.tokens import tokenize

BLOCK_TERMS = 1 << 21

Array = npt.NDArray[Any]


class Bm25Config(NamedTuple):
    """The options that an index depends on, beside the corpus."""

    k1: float
    b: float
    stop_words: frozenset[str]


class Postings(NamedTuple):
    """The index: the term with hash terms[i] has the postings starts[i] to starts[i + 1]."""

    terms: npt.NDArray[np.uint64]  # sorted
    starts: npt.NDArray[np.int64]
    rows: Array  # unsigned, ascending within a term
    weights: npt.NDArray[np.float32]


class CountedBlock(NamedTuple):
    """The counted terms of some consecutive passages."""

    block: npt.NDArray[np.uint32]  # [3, n]: term id, row, frequency; sorted by term id, then row
    lengths: npt.NDArray[np.uint32]  # terms of each passage
    terms: list[str]  # the terms that no earlier block had; their ids follow those of the earlier ones


class Store:
    """Keeps the blocks and the result of a build, here in memory."""

    def __init__(self) -> None:
        self._blocks: list[CountedBlock] = []

    def put(self, block: CountedBlock) -> None:
        """Keep a block."""
        self._blocks.append(block)

    def blocks(self) -> Iterator[CountedBlock]:
        """Return all blocks in order, those of a killed build first."""
        return iter(self._blocks)

    def array(self, name: str, dtype: type[np.generic], length: int) -> Array:  # noqa: ARG002
        """Return a writable array of the result."""
        return np.zeros(length, dtype)

    def finish(self) -> None:
        """Drop the blocks: the result is complete."""
        self._blocks.clear()


class FolderStore(Store):
    """Keeps blocks and result as files of one folder; the system pages them out under memory pressure.

    A block is renamed to `part-N.npz` when it is complete, so a killed build leaves only complete ones.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        while self._path(self._count).exists():
            self._count += 1

    def _path(self, number: int) -> Path:
        return self._folder / f"part-{number}.npz"

    def put(self, block: CountedBlock) -> None:
        """Write a block."""
        new = self._folder / "part.new"
        terms = np.frombuffer("\n".join(block.terms).encode("utf-8", "surrogatepass"), np.uint8)
        with new.open("wb") as file:
            np.savez(file, block=block.block, lengths=block.lengths, terms=terms)
            file.flush()
            os.fsync(file.fileno())
        new.rename(self._path(self._count))
        self._count += 1

    def blocks(self) -> Iterator[CountedBlock]:
        """Read each block."""
        for number in range(self._count):
            with np.load(self._path(number)) as saved:
                text = saved["terms"].tobytes().decode("utf-8", "surrogatepass")
                yield CountedBlock(saved["block"], saved["lengths"], text.split("\n") if text else [])

    def array(self, name: str, dtype: type[np.generic], length: int) -> Array:
        """Return a new memory-mapped file (of at least one item: an empty file cannot be mapped)."""
        path, size = self._folder / name, max(length, 1) * np.dtype(dtype).itemsize
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, not a crash at the first write
                os.posix_fallocate(file.fileno(), 0, size)
            file.truncate(size)
        return np.memmap(path, dtype, mode="r+")[:length]

    def finish(self) -> None:
        """Drop the blocks, the last one first, so that a killed `finish` leaves a build that can continue."""
        (self._folder / "part.new").unlink(missing_ok=True)
        for number in reversed(range(self._count)):
            self._path(number).unlink()
        self._count = 0


class _Totals:
    """Sums over the blocks so far: vocabulary, passage lengths, and in how many passages each term occurs."""

    def __init__(self, passages: int) -> None:
        self.vocabulary: dict[str, int] = {}
        self.lengths = np.zeros(passages, np.int64)
        self.frequency = np.zeros(0, np.int64)
        self.done = 0

    def add(self, block: CountedBlock) -> None:
        for term in block.terms:
            self.vocabulary.setdefault(term, len(self.vocabulary))
        self.lengths[self.done : self.done + len(block.lengths)] = block.lengths
        self.done += len(block.lengths)
        # A block has one entry per term and passage, so the entries of a term are the passages that have it.
        frequency = np.bincount(block.block[0], minlength=len(self.vocabulary))
        frequency[: len(self.frequency)] += self.frequency
        self.frequency = frequency


def build(passages: Corpus | Sequence[Passage], config: Bm25Config, store: Store) -> Postings:
    """Build the postings of `passages`, going on after the blocks that an earlier build left in the store."""
    totals = _Totals(len(passages))
    for block in store.blocks():
        totals.add(block)
    with ProgressBar("Indexing", len(passages), unit="passages") as advance:
        advance(totals.done)
        for block in _count(passages, config.stop_words, totals):
            totals.add(block)
            store.put(block)
            advance(len(block.lengths))
    postings = _place(totals, config, store)
    store.finish()
    return postings


def _count(
    passages: Corpus | Sequence[Passage], stop_words: frozenset[str], totals: _Totals
) -> Iterator[CountedBlock]:
    """Count the terms of the passages that `totals` does not have yet, in blocks of about `BLOCK_TERMS`."""
    done, total = totals.done, len(passages)
    vocabulary, known = totals.vocabulary, len(totals.vocabulary)
    term_ids, lengths = array("I"), array("I")  # the terms of all passages in a row, and how many each has
    left = (passages[row] for row in range(done, total)) if done else iter(passages)
    for row, passage in enumerate(left, done):
        words = tokenize(f"{passage.title} {passage.text}", stop_words)
        term_ids.extend([vocabulary.setdefault(word, len(vocabulary)) for word in words])
        lengths.append(len(words))
        if len(term_ids) < BLOCK_TERMS and row + 1 < total:
            continue
        # One number per term and passage, term * total + row, sorts by term and then by row. `np.unique`
        # sorts the numbers and counts how often each occurs, which is the term's frequency in the passage.
        rows = np.repeat(np.arange(row + 1 - len(lengths), row + 1), np.array(lengths))
        pairs, frequency = np.unique(np.array(term_ids, np.int64) * total + rows, return_counts=True)
        entries = np.stack([pairs // total, pairs % total, frequency]).astype(np.uint32)
        # Dictionaries keep their order: the terms that no earlier block had are the last ones.
        new_terms = list(islice(reversed(vocabulary), len(vocabulary) - known))[::-1]
        yield CountedBlock(entries, np.array(lengths, np.uint32), new_terms)
        known = len(vocabulary)
        term_ids, lengths = array("I"), array("I")


def term_hash(term: str) -> int:
    """Return the 64-bit key under which a term is stored."""
    digest = hashlib.blake2b(term.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _place(totals: _Totals, config: Bm25Config, store: Store) -> Postings:
    """Write every posting to its position: terms in the order of their hashes, rows ascending within a term.

    The index holds hashes and not the terms themselves, so that a term is found by bisection in an array. Two
    terms with the same 64-bit hash (a chance of 2 in a million for 8 million terms) would hide one of them.
    """
    vocabulary, frequency, lengths = totals.vocabulary, totals.frequency, totals.lengths
    hashes = np.fromiter(map(term_hash, vocabulary), np.uint64, len(vocabulary))
    order = np.argsort(hashes)  # position in the index -> term id
    rank = np.empty_like(order)  # term id -> position in the index
    rank[order] = np.arange(len(order))
    postings = Postings(
        store.array("terms.u64", np.uint64, len(order)),
        store.array("starts.i64", np.int64, len(order) + 1),
        store.array("rows.u32", np.uint32, int(frequency.sum())),
        store.array("weights.f32", np.float32, int(frequency.sum())),
    )
    postings.terms[:] = hashes[order]
    # The passes before have counted the postings of each term, so the room of each term is known in advance.
    postings.starts[1:] = np.cumsum(frequency[order])
    idf = np.log1p((len(lengths) - frequency + 0.5) / (frequency + 0.5))[order]
    relative = lengths * (len(lengths) / max(int(lengths.sum()), 1))
    norm = config.k1 * (1 - config.b + config.b * relative)
    # Blocks come in the order of their rows. Each appends its postings of a term where the block before
    # ended: free[t] is the next free position in the room of term t.
    free = postings.starts[:-1].copy()
    with ProgressBar("Writing the index", len(postings.rows), unit="postings") as advance:
        for block, _, _ in store.blocks():
            term, row, tf = rank[block[0]], block[1], block[2].astype(np.float64)
            # Equal terms stand together in a block. `runs` are the indices at which a new term begins; the
            # k-th posting of a run goes to the k-th free position of its term.
            runs = np.flatnonzero(np.diff(term, prepend=-1))
            sizes = np.diff(runs, append=len(term))
            at = free[term] + np.arange(len(term)) - np.repeat(runs, sizes)
            free[term[runs]] += sizes
            postings.rows[at] = row
            postings.weights[at] = idf[term] * tf / (tf + norm[row])
            advance(len(term))
    return postings
