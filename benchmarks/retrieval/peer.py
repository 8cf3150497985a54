"""Compares BM25 in this process with pyserini's own searcher: same questions, batches and topk, in turns."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from at2po_env.data.corpus import Corpus
from at2po_env.retrieval.lucene.jvm import jvm
from at2po_env.retrieval.opening import open_retriever
from at2po_env.retrieval.tokens import tokenize
from benchmarks.retrieval.stages import SECONDS, TOPK, peak_mb, texts

BATCH = 128


def english_index(corpus: Path) -> Path:
    """The folder of the Lucene index with English terms, which is what pyserini's users search."""
    for manifest in corpus.parent.glob(f"{corpus.name}.lucene-*/manifest.json"):
        if json.loads(manifest.read_text("utf-8"))["settings"] == {"tokens": "english"}:
            return manifest.parent / "lucene"
    raise SystemExit(f"no Lucene index of {corpus}: run the kind lucene first")


def compare(corpus: Path, qa: Path) -> dict[str, Any]:
    """Queries a second of each way, in rounds in which every way has its turn; medians over the rounds.

    `ids`: rows and scores alone; `passages`: with the texts, which both read from the corpus file. `lucene`
    is our own way to the same index; `pyserini_unread` leaves pyserini's results in Java.
    """
    bm25, lucene = open_retriever("bm25", corpus), open_retriever("lucene", corpus)
    ranker: Any = getattr(bm25, "_ranker")  # noqa: B009 - what lies below the passages
    machine, rows, queries = jvm(), Corpus(corpus), texts(qa)
    threads = len(os.sched_getaffinity(0))
    names = [str(number) for number in range(BATCH)]

    def open_pyserini() -> Any:
        os.environ.setdefault("OPENAI_API_KEY", "unused")
        from pyserini.search.lucene import LuceneSearcher

        searcher = LuceneSearcher(str(english_index(corpus)))
        searcher.set_bm25(0.9, 0.4)
        return searcher

    pyserini = machine.run(open_pyserini)

    def unread(some: list[str]) -> dict[str, Any]:
        found: dict[str, Any] = pyserini.batch_search(some, names[: len(some)], TOPK, threads)
        return found

    def ids(some: list[str]) -> list[list[tuple[int, float]]]:
        found = unread(some)
        return [[(int(hit.docid), hit.score) for hit in found[name]] for name in names[: len(some)]]

    def passages(some: list[str]) -> object:
        return [[rows[row]._replace(score=score) for row, score in hits] for hits in ids(some)]

    ways: dict[str, Callable[[list[str]], object]] = {
        "bm25_ids": lambda some: [ranker.rank(Counter(tokenize(query)), TOPK) for query in some],
        "pyserini_ids": lambda some: machine.run(lambda: ids(some)),
        "pyserini_unread": lambda some: machine.run(lambda: unread(some)),
        "bm25_passages": lambda some: bm25.search(some, TOPK),
        "lucene_passages": lambda some: lucene.search(some, TOPK),
        "pyserini_passages": lambda some: machine.run(lambda: passages(some)),
    }
    result: dict[str, Any] = _in_turns(ways, queries)
    for what in ("ids", "passages"):
        result[f"times_pyserini_{what}"] = round(result[f"bm25_{what}"] / result[f"pyserini_{what}"], 2)
    return {**result, "threads_of_pyserini": threads, "batch": BATCH, "peak_mb": peak_mb()}


def _in_turns(ways: dict[str, Callable[[list[str]], object]], queries: list[str]) -> dict[str, float]:
    """Median queries a second over rounds; the first two warm up (Java compiles what it runs often)."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    end, rounds = time.perf_counter() + 4 * SECONDS, 0
    while rounds < 6 or time.perf_counter() < end:
        batch = [queries[(rounds * BATCH + i) % len(queries)] for i in range(BATCH)]
        for name, way in ways.items():
            start = time.perf_counter()
            way(batch)
            if rounds >= 2:
                seconds[name].append(time.perf_counter() - start)
        rounds += 1
    return {name: round(BATCH / sorted(taken)[len(taken) // 2], 1) for name, taken in seconds.items()}
