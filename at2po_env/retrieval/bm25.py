"""BM25 search in this process: exact, deterministic, thread safe, no Java and no compiler.

Equal scores rank by row number. Terms are lower-case runs of letters and digits without Lucene's English
stop words; a term that a query repeats counts as often. k1 and b default to 0.9 and 0.4, the settings of
Pyserini's wiki-18 indexes.
"""

import hashlib
import json
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from at2po_env.data.corpus import Corpus
from at2po_env.data.passages import Passage
from at2po_env.errors import DataError, RetrievalError
from at2po_env.retrieval.bm25_build import MemoryStore, Postings, Settings, build, term_hash
from at2po_env.retrieval.bm25_index import open_index, open_or_build, settings_digest
from at2po_env.retrieval.tokens import STOP_WORDS, tokenize

QUERY_CHARS = 8192
_Span = tuple[int, int]


class Bm25Retriever:
    """BM25 over a corpus file, or over passages given in memory (`from_passages`).

    Immutable, so copies of an environment share it: `copy.deepcopy` returns the same retriever, and a
    pickle holds the corpus path only.
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
            RetrievalError: the index is damaged, or belongs to another corpus or other settings.
        """
        settings = _settings(k1, b, stop_words)
        self._arguments: dict[str, Any] = {
            "k1": k1,
            "b": b,
            "stop_words": settings.stop_words,
            "index": index,
        }
        self._passages: Sequence[Passage] | Corpus = Corpus(corpus)
        self._corpus_digest = self._passages.digest
        postings = (
            open_or_build(self._passages, settings)
            if index is None
            else open_index(Path(index), self._passages, settings)
        )
        self._start(postings, settings)

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
        settings = _settings(k1, b, stop_words)
        self._arguments = {"k1": k1, "b": b, "stop_words": settings.stop_words}
        self._passages = tuple(passages)
        text = json.dumps([passage[:3] for passage in self._passages])
        self._corpus_digest = hashlib.sha256(text.encode()).hexdigest()
        self._start(build(self._passages, settings, MemoryStore(), total=len(self._passages)), settings)
        return self

    def _start(self, postings: Postings, settings: Settings) -> None:
        self._terms, self._starts, self._rows, self._weights = postings
        if not isinstance(self._rows.base, np.memmap):  # numpy indexes faster with its own integer type
            self._rows = self._rows.astype(np.intp)
        self._stop_words = settings.stop_words
        self.digest = hashlib.sha256(
            f"bm25 {self._corpus_digest} {settings_digest(settings)}".encode()
        ).hexdigest()
        self._span = lru_cache(1 << 16)(self._find)
        # Score buffers, all zero between searches. Each search takes one, so there are as many as ran at
        # once.
        self._buffers: deque[np.ndarray[Any, np.dtype[np.float32]]] = deque()

    def __repr__(self) -> str:
        corpus = (
            self._passages.path if isinstance(self._passages, Corpus) else f"{len(self)} passages in memory"
        )
        return f"Bm25Retriever({str(corpus)!r})"

    def __len__(self) -> int:
        """Return the number of passages."""
        return len(self._passages)

    def __deepcopy__(self, memo: object) -> "Bm25Retriever":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if isinstance(self._passages, Corpus):
            return _reopen, (self._passages.path, self._arguments)
        return _rebuild, (self._passages, self._arguments)

    def search(self, queries: Sequence[str], topk: int) -> list[list[Passage]]:
        """Return for each query at most `topk` passages with a positive score, best first.

        A query longer than `QUERY_CHARS` is cut there; one without a known term gives an empty list.

        Raises:
            RetrievalError: the corpus or the index was damaged while it was open.
        """
        if isinstance(queries, str) or topk < 1:
            raise RetrievalError(
                f"search needs a list of queries and topk >= 1, got {queries!r:.80} and {topk!r}."
            )
        found = {query: self._search(query, topk) for query in dict.fromkeys(queries)}
        return [list(found[query]) for query in queries]

    def _search(self, query: str, topk: int) -> list[Passage]:
        counts = Counter(tokenize(query[:QUERY_CHARS], self._stop_words))
        spans = sorted((*span, count) for term, count in counts.items() if (span := self._span(term)))
        if not spans:
            return []
        try:
            ranked, passages = self._rank(spans, topk), self._passages
            return [Passage(*passages[row][:3], score) for row, score in ranked]
        except (DataError, IndexError) as error:
            what = f"the corpus or its index was damaged while in use ({error})"
            raise RetrievalError(
                f"{self!r}: {what}. Fix: get the corpus again and delete its index."
            ) from error

    def _find(self, term: str) -> _Span | None:
        key = np.uint64(term_hash(term))
        at = int(np.searchsorted(self._terms, key))
        if at == len(self._terms) or self._terms[at] != key:
            return None
        return int(self._starts[at]), int(self._starts[at + 1])

    def _rank(self, spans: list[tuple[int, int, int]], topk: int) -> list[tuple[int, float]]:
        """Return the best (row, score); the same terms in any order give the same bits."""
        rows = np.concatenate([self._rows[start:end] for start, end, _ in spans])
        weights = np.concatenate(
            [
                self._weights[start:end] if count == 1 else self._weights[start:end] * np.float32(count)
                for start, end, count in spans
            ]
        )
        buffer = self._buffers.pop() if self._buffers else np.zeros(len(self), np.float32)
        np.add.at(buffer, rows, weights)
        scores = buffer[rows]
        buffer[rows] = 0
        self._buffers.append(buffer)
        # A row occurs at most once per term, so the best topk * terms entries hold the best topk rows and
        # their ties.
        enough = topk * len(spans)
        if len(scores) > enough:
            best = scores >= np.partition(scores, -enough)[-enough]
            rows, scores = rows[best], scores[best]
        ranked = sorted(set(zip((-scores).tolist(), rows.tolist(), strict=True)))[:topk]
        return [(row, -score) for score, row in ranked]


def _settings(k1: float, b: float, stop_words: Iterable[str]) -> Settings:
    if not (k1 >= 0 and 0 <= b <= 1):
        raise RetrievalError(f"BM25 needs k1 >= 0 and b in [0, 1], got k1={k1}, b={b}.")
    return Settings(float(k1), float(b), frozenset(stop_words))


def _reopen(corpus: Path, arguments: dict[str, Any]) -> Bm25Retriever:
    return Bm25Retriever(corpus, **arguments)


def _rebuild(passages: tuple[Passage, ...], arguments: dict[str, Any]) -> Bm25Retriever:
    return Bm25Retriever.from_passages(passages, **arguments)
