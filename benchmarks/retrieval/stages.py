"""The stages of `benchmarks.retrieval`; each runs in a process of its own, so that its memory is its own."""

from __future__ import annotations

import json
import os
import re
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from at2po_env.data.corpus import Corpus
from at2po_env.retrieval.base import Retriever
from at2po_env.retrieval.opening import open_retriever

TOPK = 3
FEWEST, MOST = 12, 20  # rows of a MuSiQue question
SLACK = 4  # rows by which repeated paragraphs shift a number
FIRST = 400  # rows among which the first question starts
DENSE = ("flat", "ivf", "hnsw", "ivfpq")
SECONDS = float(os.environ.get("AT2PO_BENCH_SECONDS", "5"))


def peak_mb() -> float:
    """Most memory that this process has had, in MB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def questions(qa: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a question file."""
    return [json.loads(line) for line in (qa / name / "train.jsonl").read_text("utf-8").splitlines()]


def texts(qa: Path) -> list[str]:
    """The 200 questions of HotpotQA and MuSiQue."""
    return [row["question"] for name in ("hotpotqa", "musique") for row in questions(qa, name)]


class KnownEncoder:
    """The real encoder, that looks up the vectors of passages which repeat those of a small corpus.

    Encoding a million passages takes hours on two cores and says nothing about an index. The model is loaded
    and used for queries and for some passages, so that memory is what it is in earnest.
    """

    def __init__(self, small: Path) -> None:
        from at2po_env.retrieval.dense.build import VECTORS, build
        from at2po_env.retrieval.dense.encoders import SentenceEncoder

        self._encoder = SentenceEncoder("minilm", device="cpu")
        self.name, self.dimension = self._encoder.name, self._encoder.dimension
        corpus = Corpus(small)
        home = build(corpus, self._encoder, "flat")
        vectors = np.fromfile(home / VECTORS, np.float32).reshape(len(corpus), -1)
        self._known = {p.contents: v for p, v in zip(corpus, vectors, strict=True)}
        self.encode_queries = self._encoder.encode_queries
        self._encoder.encode_passages(list(self._known)[:64])

    def encode_passages(self, passages: Sequence[str]) -> Any:
        """Vectors of known passages."""
        return np.stack([self._known[text] for text in passages])


def open_kind(kind: str, corpus: Path, small: Path) -> Retriever:
    """Open (and build when missing) a retriever by the benchmark's name for it."""
    if kind in ("bm25", "lucene"):
        return open_retriever(kind, corpus)
    if kind == "hybrid":
        return open_retriever("hybrid", corpus, parts=["bm25", open_kind("flat", corpus, small)])
    return open_retriever("dense", corpus, encoder=KnownEncoder(small), index_kind=kind)


def build(kind: str, corpus: Path, small: Path) -> dict[str, float]:
    """Build an index, or say that it was there."""
    start = time.perf_counter()
    open_kind(kind, corpus, small)
    return {"build_and_open_s": round(time.perf_counter() - start, 2), "build_peak_mb": peak_mb()}


def rates_of(search: Callable[[list[str]], object], queries: list[str], batch: int) -> dict[str, float]:
    """Measure queries per second one by one and in batches, and the latencies of single ones."""
    search(queries[:batch])
    singles, start = list[float](), time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        began = time.perf_counter()
        search([queries[len(singles) % len(queries)]])
        singles.append(time.perf_counter() - began)
    count, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < SECONDS:
        search([queries[(count + i) % len(queries)] for i in range(batch)])
        count += batch
    return {
        "single_qps": round(len(singles) / sum(singles), 1),
        "single_p50_ms": round(float(np.percentile(singles, 50)) * 1e3, 3),
        "single_p99_ms": round(float(np.percentile(singles, 99)) * 1e3, 3),
        "batched_qps": round(count / passed, 1),
    }


def search(kind: str, corpus: Path, small: Path, qa: Path) -> dict[str, float]:
    """Rates and latencies of a kind; for dense ones also without the encoder."""
    retriever, queries = open_kind(kind, corpus, small), texts(qa)
    rates: dict[str, float] = rates_of(lambda some: retriever.search(some, TOPK), queries, 128)
    if kind in DENSE:
        index: Any = getattr(retriever, "_search")  # noqa: B009 - the index below the encoder
        known = dict(zip(queries, getattr(retriever, "encoder").encode_queries(queries), strict=True))  # noqa: B009
        bare = rates_of(lambda some: index.search(np.stack([known[q] for q in some]), TOPK), queries, 128)
        rates |= {f"index_only_{name}": value for name, value in bare.items()}
        if kind == "flat":
            rates |= _bandwidth(len(Corpus(corpus)) * 4 * len(known[queries[0]]), rates)
    return {**rates, "search_peak_mb": peak_mb()}


def _bandwidth(matrix_bytes: int, rates: dict[str, float]) -> dict[str, float]:
    """Bytes that a single flat query reads a second, and the most that plain reading reaches."""
    from concurrent.futures import ThreadPoolExecutor

    cores = len(os.sched_getaffinity(0))
    parts = [np.ones(2**26, np.int64) for _ in range(cores)]
    best = 0.0
    with ThreadPoolExecutor(cores) as pool:
        for reduce in (np.bitwise_or.reduce, np.sum):
            for _ in range(7):
                start = time.perf_counter()
                list(pool.map(reduce, parts))
                best = max(best, sum(part.nbytes for part in parts) / (time.perf_counter() - start))
    used = matrix_bytes / (rates["index_only_single_p50_ms"] / 1e3)
    return {
        "memory_gb_s": round(best / 1e9, 2),
        "flat_gb_s": round(used / 1e9, 2),
        "flat_share": round(used / best, 3),
    }


def recall(corpus: Path, qa: Path, kinds: Sequence[str]) -> dict[str, dict[str, float]]:
    """Share of the supporting passages' titles among the top 3 for the bare question."""
    passages = list(Corpus(corpus))
    hotpot, musique = questions(qa, "hotpotqa"), questions(qa, "musique")
    rows = supporting_rows(musique, [p.contents for p in passages])
    wanted = {
        "hotpotqa": [(q["question"], set(q["metadata"]["supporting_facts"]["title"])) for q in hotpot],
        "musique": [
            (q["question"], {passages[row].title for row in found})
            for q, found in zip(musique, rows, strict=True)
        ],
    }
    results: dict[str, dict[str, float]] = {"supporting_titles": {}}
    for name, asked in wanted.items():
        results["supporting_titles"][name] = sum(len(titles) for _, titles in asked)
    for kind in kinds:
        retriever, results[kind] = open_kind(kind, corpus, corpus), {}
        for name, asked in wanted.items():
            found = retriever.search([question for question, _ in asked], TOPK)
            hits = sum(
                len({p.title for p in top} & titles) for top, (_, titles) in zip(found, asked, strict=True)
            )
            results[kind][name] = round(hits / results["supporting_titles"][name], 4)
    return results


def supporting_rows(questions: Sequence[dict[str, Any]], contents: Sequence[str]) -> list[list[int]]:
    """Return the rows of the passages that support each MuSiQue question.

    FlashRAG rows of MuSiQue name a supporting paragraph by its number among the question's twenty. The corpus
    in `../shared/data` ends with those twenty of every question in turn, less what had occurred before, so a
    question starts at most 20 rows after the one before it. The starts are chosen by dynamic programming so
    that as many hops as possible find their answer in the row that their number points to; a hop whose answer
    is in none of the rows is left out.

    Args:
        questions: Rows of the question file.
        contents: The corpus' rows.
    """

    def plain(text: str) -> str:
        return re.sub(r"\W+", " ", text.lower()).strip()

    rows = [plain(text) for text in contents]
    hops = [
        [
            (hop["paragraph_support_idx"], plain(hop["answer"]))
            for hop in question["metadata"]["question_decomposition"]
        ]
        for question in questions
    ]

    def row_of(start: int, number: int, answer: str) -> int | None:
        near = (start + number - shift for shift in range(SLACK))
        return next((row for row in near if 0 <= row < len(rows) and answer in rows[row]), None)

    def score(question: int, start: int) -> float:
        found = [(row_of(start, number, answer), start + number) for number, answer in hops[question]]
        return sum((1 - 0.1 * (wanted - row) for row, wanted in found if row is not None), 0.0)

    earliest = max(len(rows) - MOST * len(questions), 0)
    latest = min(earliest + FIRST, len(rows))
    steps = [{start: (score(0, start), -1) for start in range(earliest, latest)}]
    for question in range(1, len(questions)):
        reached: dict[int, tuple[float, int]] = {}
        scores: dict[int, float] = {}
        for before, (total, _) in steps[-1].items():
            for start in range(before + FEWEST, min(before + MOST + 1, len(rows))):
                if start not in scores:
                    scores[start] = score(question, start)
                value = total + scores[start]
                if start not in reached or value > reached[start][0]:
                    reached[start] = (value, before)
        steps.append(reached)
    starts = [max(steps[-1], key=lambda start: steps[-1][start][0])]
    for question in range(len(questions) - 1, 0, -1):
        starts.append(steps[question][starts[-1]][1])
    starts.reverse()
    found = [
        [row_of(start, number, answer) for number, answer in asked]
        for start, asked in zip(starts, hops, strict=True)
    ]
    return [[row for row in question if row is not None] for question in found]
