"""Passages to BM25 postings in bounded memory.

The weight of term t in passage d is stored ready to be summed, as in the paper of bm25s:

    w(t, d) = idf(t) * tf / (tf + k1 * (1 - b + b * |d| / mean |d|))
    idf(t) = ln(1 + (N - df + 0.5) / (df + 0.5))

This is Lucene's BM25 (method "lucene" of bm25s), with the exact passage length where Lucene rounds it to
one byte.

One pass over the passages writes parts of counted terms, a second over the parts places every posting
where it belongs. Memory: the vocabulary and a part of `BLOCK_TERMS` terms; postings lie in the arrays
that the store gives. A build goes on after the last part that its store has kept, and the parts are dropped
when the postings stand.

References:
    Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009.
    Lù, "BM25S", https://arxiv.org/abs/2407.03618
"""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from at2po_env.data.corpus import Corpus, Passage
from at2po_env.data.progress import progress_bar
from at2po_env.retrieval.bm25.store import Array, Block, Part, Store
from at2po_env.retrieval.tokens import tokenize

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


def term_hash(term: str) -> int:
    """Return the 64-bit key under which a term is stored."""
    return int.from_bytes(
        hashlib.blake2b(term.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
    )


class _Tally:
    """What the parts so far say together."""

    def __init__(self, passages: int) -> None:
        self.vocabulary: dict[str, int] = {}
        self.lengths = np.zeros(passages, np.int64)
        self.frequency = np.zeros(0, np.int64)
        self.done = 0

    def add(self, part: Part) -> None:
        """Take a part into account."""
        for term in part.terms:
            self.vocabulary.setdefault(term, len(self.vocabulary))
        self.lengths[self.done : self.done + len(part.lengths)] = part.lengths
        self.done += len(part.lengths)
        size = len(self.vocabulary)
        self.frequency = np.bincount(part.block[0], minlength=size) + _padded(self.frequency, size)


def build(passages: Corpus | Sequence[Passage], settings: Settings, store: Store) -> Postings:
    """Build the postings of `passages`, going on after what the store has kept of a build of the same."""
    tally = _Tally(len(passages))
    for part in store.parts():
        tally.add(part)
    with progress_bar("Indexing", len(passages), unit="passages") as advance:
        advance(tally.done)
        for part in _new_parts(passages, settings.stop_words, tally):
            tally.add(part)
            store.put(part)
            advance(len(part.lengths))
    postings = _place(tally, settings, store)
    store.finish()
    return postings


def _new_parts(
    passages: Corpus | Sequence[Passage], stop_words: frozenset[str], tally: _Tally
) -> Iterator[Part]:
    """Count the passages that `tally` does not have yet; a part must be added to it before the next."""
    vocabulary, known = tally.vocabulary, len(tally.vocabulary)
    term_ids, lengths = array("I"), array("I")

    def part() -> Part:
        terms = list(islice(reversed(vocabulary), len(vocabulary) - known))[::-1]
        block = _block(tally.done, np.array(term_ids, np.int64), np.array(lengths), len(passages))
        return Part(block, np.array(lengths, np.uint32), terms)

    for passage in _after(passages, tally.done):
        words = tokenize(f"{passage.title} {passage.text}", stop_words)
        term_ids.extend([vocabulary.setdefault(word, len(vocabulary)) for word in words])
        lengths.append(len(words))
        if len(term_ids) >= BLOCK_TERMS:
            yield part()
            known = len(vocabulary)
            term_ids, lengths = array("I"), array("I")
    if lengths:
        yield part()


def _after(passages: Corpus | Sequence[Passage], done: int) -> Iterator[Passage]:
    return (passages[row] for row in range(done, len(passages))) if done else iter(passages)


def _block(first: int, term_ids: Array, lengths: Array, total: int) -> Block:
    rows = np.repeat(np.arange(first, first + len(lengths)), lengths)
    pairs, frequency = np.unique(term_ids * total + rows, return_counts=True)
    return np.stack([pairs // total, pairs % total, frequency]).astype(np.uint32)


def _padded(counts: Array, length: int) -> Array:
    return np.pad(counts, (0, length - len(counts)))


def _place(tally: _Tally, settings: Settings, store: Store) -> Postings:
    """Put every posting at its place: terms in the order of their hashes, rows ascending within a term.

    Two terms with the same 64-bit hash (a chance of 2 in a million for 8 million terms) would hide one of
    them.
    """
    vocabulary, frequency, lengths = tally.vocabulary, tally.frequency, tally.lengths
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
        for block, _, _ in store.parts():
            term, row, tf = rank[block[0]], block[1], block[2].astype(np.float64)
            runs = np.flatnonzero(np.diff(term, prepend=-1))
            sizes = np.diff(runs, append=len(term))
            at = free[term] + np.arange(len(term)) - np.repeat(runs, sizes)
            free[term[runs]] += sizes
            postings.rows[at] = row
            postings.weights[at] = idf[term] * tf / (tf + norm[row])
            advance(len(term))
    return postings
