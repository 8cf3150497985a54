"""The parts of `benchmarks.retrieval`, each run in a process of its own so that its memory is its own."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from at2po_env.data.corpus import Corpus
from at2po_env.retrieval.base import Retriever
from at2po_env.retrieval.opening import open_retriever
from benchmarks._musique import supporting_rows

TOPK = 3
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
        from at2po_env.retrieval.dense.build import VECTORS, passage_text
        from at2po_env.retrieval.dense.encoders import SentenceEncoder
        from at2po_env.retrieval.dense.retriever import build

        self._encoder = SentenceEncoder("minilm", device="cpu")
        self.name, self.dimension = self._encoder.name, self._encoder.dimension
        corpus = Corpus(small)
        home = build(corpus, self._encoder, "flat")
        vectors = np.fromfile(home / VECTORS, np.float32).reshape(len(corpus), -1)
        self._known = {passage_text(p): v for p, v in zip(corpus, vectors, strict=True)}
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
        index: Any = getattr(retriever, "_search")  # noqa: B009 - what lies below the encoder
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
    rows = supporting_rows(musique, [f'"{p.title}"\n{p.text}' for p in passages])
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
