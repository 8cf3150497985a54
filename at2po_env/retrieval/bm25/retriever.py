"""Searches by BM25 in this process: exact, deterministic, thread safe, without Java or a compiler.

Equal scores rank by row number. Terms are lower-case runs of letters and digits without Lucene's English
stop words; a term that a query repeats counts as often. k1 and b default to 0.9 and 0.4, as in Pyserini's
wiki-18 indexes.

The index of a corpus file is a folder, which is built once, continued after a kill and checked at every
opening. It lies beside the corpus (in the cache folder where that is read-only) unless another place is
given.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from at2po_env.data.corpus import Corpus, Passage
from at2po_env.errors import DataError, RetrievalError
from at2po_env.retrieval.base import CorpusRetriever, check_search
from at2po_env.retrieval.bm25.build import Bm25Config, FolderStore, Postings, Store, build
from at2po_env.retrieval.bm25.rank import Ranker
from at2po_env.retrieval.manifest import FIX, HASHED_BYTES, Manifest, build_once, check, home_of, plan
from at2po_env.retrieval.tokens import STOP_WORDS, tokenize

QUERY_CHARS = 8192
FILES = {"terms.u64": np.uint64, "starts.i64": np.int64, "rows.u32": np.uint32, "weights.f32": np.float32}
IN_MEMORY_BYTES = HASHED_BYTES  # larger indexes are mapped
_TERMS = "lower-case runs of letters and digits"


class Bm25Retriever(CorpusRetriever):
    """BM25 over a corpus file, or over passages given in memory (`from_passages`).

    Immutable, so copies of an environment share it. A pickle holds the corpus path only.
    """

    def __init__(
        self,
        corpus: str | Path,
        *,
        k1: float = 0.9,
        b: float = 0.4,
        stop_words: Iterable[str] = STOP_WORDS,
        index: str | Path | None = None,
    ) -> None:
        """Open the index of `corpus`; the first opening builds it.

        Args:
            corpus: JSON lines in wiki-18 form.
            k1: How slowly repeated terms saturate.
            b: How much long passages are discounted, 0 to 1.
            stop_words: Terms that are not indexed.
            index: Folder of an index made before; the default is the one beside the corpus or in the cache.

        Raises:
            DataError: the corpus is unreadable or has a bad line.
            RetrievalError: the index is damaged, or belongs to another corpus or another configuration.
        """
        config = bm25_config(k1, b, stop_words)
        self._again: Callable[[], Bm25Retriever] = partial(
            Bm25Retriever, corpus, k1=k1, b=b, stop_words=config.stop_words, index=index
        )
        self._corpus = opened = Corpus(corpus)
        home = build_index(opened, config) if index is None else Path(index)
        self._start(open_index(home, opened, config), config, opened.digest)

    @classmethod
    def from_passages(
        cls,
        passages: Iterable[Passage],
        *,
        k1: float = 0.9,
        b: float = 0.4,
        stop_words: Iterable[str] = STOP_WORDS,
    ) -> "Bm25Retriever":
        """Index `passages` in memory; row numbers are their order."""
        self = cls.__new__(cls)
        config = bm25_config(k1, b, stop_words)
        self._corpus = passages = tuple(passages)
        self._again = partial(cls.from_passages, passages, k1=k1, b=b, stop_words=config.stop_words)
        text = json.dumps([passage[:3] for passage in passages])
        self._start(build(passages, config, Store()), config, hashlib.sha256(text.encode()).hexdigest())
        return self

    def _start(self, postings: Postings, config: Bm25Config, corpus_digest: str) -> None:
        self._ranker = Ranker(postings, len(self))
        self._stop_words = config.stop_words
        text = json.dumps([1, _TERMS, config.k1, config.b, sorted(config.stop_words)])
        digest = hashlib.sha256(text.encode()).hexdigest()
        self.digest = hashlib.sha256(f"bm25 {corpus_digest} {digest}".encode()).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        return self._again, ()

    def search(self, queries: Sequence[str], topk: int) -> list[list[Passage]]:
        """Return for each query at most `topk` passages with a positive score, best first.

        A query longer than `QUERY_CHARS` is cut there; one without a known term gives an empty list.

        Raises:
            RetrievalError: the corpus or the index was damaged while it was open.
        """
        check_search(queries, topk)
        found = {query: self._search(query, topk) for query in dict.fromkeys(queries)}
        return [list(found[query]) for query in queries]

    def _search(self, query: str, topk: int) -> list[Passage]:
        counts = Counter(tokenize(query[:QUERY_CHARS], self._stop_words))
        try:
            return [Passage(*self._corpus[row][:3], score) for row, score in self._ranker.rank(counts, topk)]
        except (DataError, IndexError) as error:
            what = f"the corpus or its index was damaged while in use ({error})"
            raise RetrievalError(
                f"{self!r}: {what}. Fix: get the corpus again and delete its index."
            ) from error


def bm25_config(k1: float = 0.9, b: float = 0.4, stop_words: Iterable[str] = STOP_WORDS) -> Bm25Config:
    """Check the options that an index depends on.

    Raises:
        RetrievalError: k1 or b is impossible.
    """
    if not (k1 >= 0 and 0 <= b <= 1):
        raise RetrievalError(f"BM25 needs k1 >= 0 and b in [0, 1], got k1={k1}, b={b}.")
    return Bm25Config(float(k1), float(b), frozenset(stop_words))


def _manifest(corpus: Corpus, config: Bm25Config) -> Manifest:
    """Return the manifest that the index of `corpus` has."""
    values: dict[str, Any] = {"k1": config.k1, "b": config.b, "tokens": _TERMS}
    return plan("bm25", corpus, {**values, "stop_words": sorted(config.stop_words)})


def build_index(corpus: Corpus, config: Bm25Config, home: Path | None = None) -> Path:
    """Build the index of `corpus` unless it is there; see `manifest.build_once`.

    Raises:
        RetrievalError: `home` holds something else, or cannot be written.
        DataError: a line of the corpus is not a passage.
    """
    wanted = _manifest(corpus, config)
    home = home or home_of(corpus, wanted)
    return build_once(home, wanted, lambda work: build(corpus, config, FolderStore(work)))


def open_index(folder: Path, corpus: Corpus, config: Bm25Config) -> Postings:
    """Open the index in `folder` if it is whole and was made from this corpus with this configuration.

    Raises:
        RetrievalError: it is not; names the file and the fix.
    """
    found = check(folder, _manifest(corpus, config))
    # Small indexes are read whole. Larger ones are mapped: the system loads the pages that a search touches
    # and drops them again under memory pressure, and all processes share them.
    mapped = sum(file.bytes for file in found.files.values()) > IN_MEMORY_BYTES
    try:
        terms, starts, rows, weights = (
            np.asarray(np.memmap(folder / name, kind, mode="r"))
            if mapped
            else np.fromfile(folder / name, kind)
            for name, kind in FILES.items()
        )
    except (OSError, ValueError) as error:
        raise RetrievalError(f"{folder}: cannot read the index ({error}). {FIX}") from error
    if len(starts) < 1 or starts[0] != 0 or (np.diff(starts) < 1).any() or starts[-1] > len(rows):
        raise RetrievalError(f"{folder / 'starts.i64'} is damaged: it does not ascend. {FIX}")
    return Postings(terms[: len(starts) - 1], starts, rows, weights)
