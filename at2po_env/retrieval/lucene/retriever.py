"""BM25 by Lucene, through pyserini's jar: for published indexes, stemming, and corpora beyond `bm25`'s reach.

Parameters have the same names and meaning as those of `bm25`. With `tokens="plain"` the same terms are
indexed too, and both rank alike but for Lucene's rounding of passage lengths to one byte; with
`tokens="english"` (the default, and what published indexes have) Lucene drops the same stop words and stems.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from at2po_env.data.corpus import Corpus, CorpusRow, Passage
from at2po_env.errors import DataError, RetrievalError
from at2po_env.retrieval.lucene.build import TOKENS, build_lucene
from at2po_env.retrieval.lucene.jvm import jvm
from at2po_env.retrieval.manifest import build_once, check, home_of, plan
from at2po_env.retrieval.tokens import tokenize

QUERY_CHARS = 8192
_BLANK = dict.fromkeys(range(0xD800, 0xE000), " ")  # lone surrogates, which Java's strings would not survive


class LuceneRetriever:
    """Lucene search over a corpus; thread safe.

    Args:
        corpus: JSON lines in wiki-18 form.
        k1: How slowly repeated terms saturate.
        b: How much long passages are discounted, 0 to 1.
        tokens: "english" (Porter stemming) or "plain" (the terms of `bm25`).
        index: Folder of an index built before, or of a Lucene index made elsewhere whose document ids are row
            numbers of the corpus; default: beside the corpus, built when missing.
        threads: Of a batch.
    """

    def __init__(
        self,
        corpus: str | Path,
        *,
        k1: float = 0.9,
        b: float = 0.4,
        tokens: str = "english",
        index: str | Path | None = None,
        threads: int | None = None,
    ) -> None:
        if not (k1 >= 0 and 0 <= b <= 1) or tokens not in TOKENS:
            raise RetrievalError(
                f"Lucene needs k1 >= 0, b in [0, 1] and tokens of {TOKENS}, got {k1}, {b}, {tokens!r}."
            )
        self._corpus, self._tokens = Corpus(corpus), tokens
        self._threads = threads or os.cpu_count() or 1
        folder, identity = self._find(None if index is None else Path(index))
        self._jvm = jvm()
        self._searcher: Any = self._jvm.run(lambda: self._open(folder, k1, b))
        text = f"lucene {self._corpus.digest} {identity} {tokens} {k1} {b}"
        self._digest = hashlib.sha256(text.encode()).hexdigest()

    def _find(self, index: Path | None) -> tuple[Path, str]:
        if index is not None and not (index / "manifest.json").exists():
            if not any(index.glob("segments_*")):
                raise RetrievalError(f"{index} holds no Lucene index. Fix: give the folder with segments_N.")
            return index, index.name
        wanted = lucene_plan(self._corpus, self._tokens)
        home = build(self._corpus, self._tokens) if index is None else index
        check(home, wanted)
        return home / "lucene", wanted.digest

    def _open(self, folder: Path, k1: float, b: float) -> Any:
        searcher = self._jvm.java_class("io.anserini.search.SimpleSearcher")(os.fspath(folder))
        searcher.set_bm25(k1, b)
        if self._tokens == "plain":
            analyzer = self._jvm.java_class("org.apache.lucene.analysis.core.WhitespaceAnalyzer")
            searcher.set_analyzer(analyzer())
        self._list = self._jvm.java_class("java.util.ArrayList")
        return searcher

    def __repr__(self) -> str:
        return f"LuceneRetriever({str(self._corpus.path)!r})"

    def __deepcopy__(self, memo: object) -> "LuceneRetriever":
        return self

    def __len__(self) -> int:
        """Return the number of passages."""
        return len(self._corpus)

    @property
    def digest(self) -> str:
        """Digest of the corpus, the index and the settings."""
        return self._digest

    def search(self, queries: Sequence[str], topk: int) -> list[list[Passage]]:
        """Return for each query at most `topk` passages with a positive score, best first.

        A query longer than `QUERY_CHARS` is cut there; one without a known term gives an empty list.

        Raises:
            RetrievalError: the index or the corpus is damaged, or this process was forked after opening.
        """
        if isinstance(queries, str) or topk < 1:
            raise RetrievalError(
                f"search needs a list of queries and topk >= 1, got {queries!r:.80} and {topk!r}."
            )
        texts = {query: self._terms(query) for query in queries}
        unique = list(dict.fromkeys(text for text in texts.values() if text))
        found = dict(zip(unique, self._jvm.run(lambda: self._ids(unique, topk)), strict=True))
        return [
            [self._passage(docid, score) for docid, score in found.get(texts[query], ())] for query in queries
        ]

    def _terms(self, query: str) -> str:
        query = query[:QUERY_CHARS].translate(_BLANK).replace("\0", " ")
        return " ".join(tokenize(query)) if self._tokens == "plain" else query.strip()

    def _ids(self, texts: list[str], topk: int) -> list[list[tuple[str, float]]]:
        """Search; runs in Java's thread."""
        if len(texts) <= 1:
            return [_hits(self._searcher.search(text, topk)) for text in texts]
        queries, names = self._list(), self._list()
        for number, text in enumerate(texts):
            queries.add(text)
            names.add(str(number))
        results = self._searcher.batch_search(queries, names, topk, min(self._threads, len(texts)))
        return [_hits(results.get(str(number)) or ()) for number in range(len(texts))]

    def _passage(self, docid: str, score: float) -> Passage:
        """Return the passage in the row that `docid` names; an index made elsewhere may know it otherwise."""
        try:
            passage = self._corpus[int(docid)] if docid.isdecimal() else None
            if passage is None:
                raw = self._jvm.run(lambda: self._searcher.doc_raw(docid))
                passage = _raw_passage(docid, raw)
            return passage._replace(score=score)
        except (DataError, IndexError) as error:
            raise RetrievalError(f"{self!r}: the index does not fit the corpus ({error}).") from error


def _hits(found: Any) -> list[tuple[str, float]]:
    return [(hit.docid, hit.score) for hit in found]


def _raw_passage(docid: str, raw: str | None) -> Passage:
    if not raw:
        raise IndexError(f"document {docid!r} is no row of the corpus, and the index holds no text of it")
    row = CorpusRow.model_validate_json(raw)
    title, _, text = row.contents.partition("\n")
    return Passage(docid, title.strip('"'), text)


def lucene_plan(corpus: Corpus, tokens: str) -> Any:
    """Return the manifest that a Lucene index of `corpus` has; k1 and b are chosen when searching."""
    return plan("lucene", corpus, {"tokens": tokens})


def build(corpus: Corpus, tokens: str = "english", home: Path | None = None) -> Path:
    """Build a Lucene index unless it is there; see `manifest.build_once`."""
    wanted = lucene_plan(corpus, tokens)
    return build_once(
        home or home_of(corpus, wanted), wanted, lambda work: build_lucene(work, corpus, jvm(), tokens)
    )
