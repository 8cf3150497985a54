"""Searches by Lucene's BM25, through pyserini's jar: for published indexes, stemming and very large corpora.

Parameters have the same names and meaning as those of `bm25`. With `tokens="plain"` the same terms are
indexed too, and both rank alike but for Lucene's rounding of passage lengths to one byte; with
`tokens="english"` (the default, and what published indexes have) Lucene drops the same stop words and stems.
"""

import hashlib
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from at2po_env.data.corpus import Corpus, CorpusRow, Passage
from at2po_env.data.progress import Advance, ProgressBar
from at2po_env.errors import DataError, RetrievalError
from at2po_env.retrieval.base import CorpusRetriever, check_search
from at2po_env.retrieval.lucene.jvm import Jvm, jvm
from at2po_env.retrieval.manifest import Manifest, build_once, check, home_of, plan
from at2po_env.retrieval.tokens import tokenize

QUERY_CHARS = 8192
TOKENS = ("english", "plain")
_COMMIT_EVERY = 200_000
_AT_ONCE = 2_000
# Lone surrogates, which cannot be passed to Java as strings, become spaces.
_BLANK = dict.fromkeys(range(0xD800, 0xE000), " ")


class LuceneRetriever(CorpusRetriever):
    """Lucene search over a corpus; thread safe.

    Args:
        corpus: JSON lines in wiki-18 form.
        k1: How slowly repeated terms saturate.
        b: How much long passages are discounted, 0 to 1.
        tokens: "english" (Porter stemming) or "plain" (the terms of `bm25`).
        index: Folder of an index built before, or of a Lucene index made elsewhere whose document ids are row
            numbers of the corpus; default: beside the corpus, built when missing.
        threads: How many search a batch; default: the processors of this machine.
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
        self._corpus = Corpus(corpus)
        self._tokens, self._threads = tokens, threads or os.cpu_count() or 1
        index = None if index is None else Path(index)
        if index is None or (index / "manifest.json").exists():
            wanted = lucene_plan(self._corpus, tokens)
            home = build(self._corpus, tokens) if index is None else index
            check(home, wanted)
            folder, identity = home / "lucene", wanted.digest
        elif any(index.glob("segments_*")):
            folder, identity = index, index.name
        else:
            raise RetrievalError(f"{index} holds no Lucene index. Fix: give the folder with segments_N.")
        self._jvm = jvm()

        def open_searcher() -> Any:
            searcher = self._jvm.java_class("io.anserini.search.SimpleSearcher")(os.fspath(folder))
            searcher.set_bm25(k1, b)
            if tokens == "plain":
                analyzer = self._jvm.java_class("org.apache.lucene.analysis.core.WhitespaceAnalyzer")
                searcher.set_analyzer(analyzer())
            self._list = self._jvm.java_class("java.util.ArrayList")
            return searcher

        self._searcher: Any = self._jvm.run(open_searcher)
        text = f"lucene {self._corpus.digest} {identity} {tokens} {k1} {b}"
        self.digest = hashlib.sha256(text.encode()).hexdigest()

    def search(self, queries: Sequence[str], topk: int) -> list[list[Passage]]:
        """Return for each query at most `topk` passages with a positive score, best first.

        A query longer than `QUERY_CHARS` is cut there; one without a known term gives an empty list.

        Raises:
            RetrievalError: the index or the corpus is damaged, or this process was forked after opening.
        """
        check_search(queries, topk)
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
            results = [self._searcher.search(text, topk) for text in texts]
        else:
            queries, names = self._list(), self._list()
            for number, text in enumerate(texts):
                queries.add(text)
                names.add(str(number))
            found = self._searcher.batch_search(queries, names, topk, min(self._threads, len(texts)))
            results = [found.get(str(number)) or () for number in range(len(texts))]
        return [[(hit.docid, hit.score) for hit in hits] for hits in results]

    def _passage(self, docid: str, score: float) -> Passage:
        """Return the passage in the row that `docid` names, else the text that the index itself keeps."""
        try:
            if docid.isdecimal():
                return self._corpus[int(docid)]._replace(score=score)
            raw = self._jvm.run(lambda: self._searcher.doc_raw(docid))
            if not raw:
                raise IndexError(
                    f"document {docid!r} is no row of the corpus, and the index holds no text of it"
                )
            title, _, text = CorpusRow.model_validate_json(raw).contents.partition("\n")
            return Passage(docid, title.strip('"'), text, score)
        except (DataError, IndexError) as error:
            raise RetrievalError(f"{self!r}: the index does not fit the corpus ({error}).") from error


def lucene_plan(corpus: Corpus, tokens: str) -> Manifest:
    """Return the manifest that a Lucene index of `corpus` has; k1 and b are chosen when searching."""
    return plan("lucene", corpus, {"tokens": tokens})


def build(corpus: Corpus, tokens: str = "english", home: Path | None = None) -> Path:
    """Build a Lucene index unless it is there; see `manifest.build_once`.

    One thread adds the passages in row order, and each part of `_COMMIT_EVERY` passages ends with a commit.
    So the number of documents in an unfinished index says after which row a killed build has to continue.
    """
    wanted = lucene_plan(corpus, tokens)

    def fill(work: Path) -> None:
        java, folder = jvm(), work / "lucene"
        done = java.run(lambda: _documents(java, folder))
        if done > len(corpus):
            raise RetrievalError(f"{folder} has more documents than the corpus. Fix: delete {work}.")
        with ProgressBar("Indexing", len(corpus), unit="passages") as advance:
            advance(done)
            for start in range(done, len(corpus), _COMMIT_EVERY):
                rows = range(start, min(start + _COMMIT_EVERY, len(corpus)))
                _add(java, folder, corpus, rows, tokens, advance)
        if not len(corpus):
            raise RetrievalError(f"{corpus.path} is empty.")

    return build_once(home or home_of(corpus, wanted), wanted, fill)


def _documents(java: Jvm, folder: Path) -> int:
    """Return the number of committed documents; frees the lock that a killed build left."""
    if not any(folder.glob("segments_*")):
        return 0
    (folder / "write.lock").unlink(missing_ok=True)
    path = java.java_class("java.io.File")(os.fspath(folder)).toPath()
    directory = java.java_class("org.apache.lucene.store.FSDirectory").open(path)
    reader = java.java_class("org.apache.lucene.index.DirectoryReader").open(directory)
    try:
        return int(reader.numDocs())
    finally:
        reader.close()
        directory.close()


def _add(java: Jvm, folder: Path, corpus: Corpus, rows: range, tokens: str, advance: Advance) -> None:
    """Add some passages to the index and commit them; every call into Java is made in its thread."""
    arguments = ["-index", os.fspath(folder), "-collection", "JsonCollection", "-input", ""]
    arguments += ["-threads", "1", "-append", *(["-pretokenized"] if tokens == "plain" else [])]
    indexer = java.run(lambda: java.java_class("io.anserini.index.SimpleIndexer")(arguments))
    document = java.java_class("io.anserini.collection.JsonCollection$Document")

    def add(texts: list[tuple[str, str]]) -> None:
        for docid, text in texts:
            indexer.addJsonDocument(document.fromFields(docid, text))

    try:
        for start in range(rows.start, rows.stop, _AT_ONCE):
            some = range(start, min(start + _AT_ONCE, rows.stop))
            passages = [corpus[row] for row in some]
            contents = [f"{passage.title} {passage.text}" for passage in passages]
            if tokens == "plain":  # Lucene gets our own terms, which it only splits at spaces
                contents = [" ".join(tokenize(text)) for text in contents]
            texts = list(zip(map(str, some), contents, strict=True))
            java.run(partial(add, texts))
            advance(len(some))
    finally:
        java.run(indexer.close)
