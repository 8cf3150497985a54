"""A corpus to a Lucene index: streamed, committed in parts, continued after a kill.

One thread adds the passages in row order and each part ends with a commit, so the number of documents in the
index says how far it got.
"""

import os
from pathlib import Path
from typing import Any

from at2po_env.data.corpus import Corpus, Passage
from at2po_env.data.progress import progress_bar
from at2po_env.errors import RetrievalError
from at2po_env.retrieval.lucene.jvm import Jvm
from at2po_env.retrieval.tokens import tokenize

TOKENS = ("english", "plain")
_COMMIT_EVERY = 200_000
_AT_ONCE = 2_000


def indexed_text(passage: Passage, tokens: str) -> str:
    """Return what Lucene gets to see of a passage: its own terms for "plain", the text for "english"."""
    text = f"{passage.title} {passage.text}"
    return " ".join(tokenize(text)) if tokens == "plain" else text


def build_lucene(work: Path, corpus: Corpus, jvm: Jvm, tokens: str) -> None:
    """Build an index in `work`, going on from what a killed build committed there."""
    folder = work / "lucene"
    done = jvm.run(lambda: _documents(jvm, folder))
    if done > len(corpus):
        raise RetrievalError(f"{folder} has more documents than the corpus. Fix: delete {work}.")
    with progress_bar("Indexing", len(corpus), unit="passages") as advance:
        advance(done)
        for start in range(done, len(corpus), _COMMIT_EVERY):
            rows = range(start, min(start + _COMMIT_EVERY, len(corpus)))
            _add_part(jvm, folder, corpus, rows, tokens, advance)
    if not len(corpus):
        raise RetrievalError(f"{corpus.path} is empty.")


def _documents(jvm: Jvm, folder: Path) -> int:
    """Return the number of committed documents; frees the lock that a killed build left."""
    if not any(folder.glob("segments_*")):
        return 0
    (folder / "write.lock").unlink(missing_ok=True)
    directory = jvm.java_class("org.apache.lucene.store.FSDirectory").open(_path(jvm, folder))
    reader = jvm.java_class("org.apache.lucene.index.DirectoryReader").open(directory)
    try:
        return int(reader.numDocs())
    finally:
        reader.close()
        directory.close()


def _path(jvm: Jvm, folder: Path) -> Any:
    return jvm.java_class("java.io.File")(os.fspath(folder)).toPath()


def _add_part(jvm: Jvm, folder: Path, corpus: Corpus, rows: range, tokens: str, advance: Any) -> None:
    def open_indexer() -> Any:
        arguments = ["-index", os.fspath(folder), "-collection", "JsonCollection", "-input", ""]
        arguments += ["-threads", "1", "-append"]
        if tokens == "plain":
            arguments.append("-pretokenized")
        return jvm.java_class("io.anserini.index.SimpleIndexer")(arguments)

    indexer = jvm.run(open_indexer)
    document = jvm.java_class("io.anserini.collection.JsonCollection$Document")

    def add(texts: list[tuple[str, str]]) -> None:
        for docid, text in texts:
            indexer.addJsonDocument(document.fromFields(docid, text))

    try:
        for start in range(rows.start, rows.stop, _AT_ONCE):
            some = range(start, min(start + _AT_ONCE, rows.stop))
            texts = [(str(row), indexed_text(corpus[row], tokens)) for row in some]
            jvm.run(lambda texts=texts: add(texts))  # type: ignore[misc]
            advance(len(some))
    finally:
        jvm.run(indexer.close)
