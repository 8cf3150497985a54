"""The metrics of a retrieval server, for Prometheus.

Where several processes serve one address, `PROMETHEUS_MULTIPROC_DIR` names a folder in which each keeps its
numbers (prometheus_client's multiprocess mode), and any of them shows the sum of all.
"""

import os

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

from at2po_env.retrieval.counters import counted

SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # read by prometheus_client when it is imported
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class ServerMetrics:
    """One server's metrics in a registry of their own, so that several servers may live in one process."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        own = self._registry = CollectorRegistry()
        self._requests = Counter("at2po_retrieve_requests", "Answers.", ["status"], registry=own)
        self._queries = Counter("at2po_retrieve_queries", "Searched queries.", registry=own)
        self._seconds = Histogram(
            "at2po_retrieve_seconds", "From request to answer.", buckets=_SECONDS, registry=own
        )
        self._batch = Histogram(
            "at2po_search_batch_queries", "Queries per search.", buckets=_SIZES, registry=own
        )
        self._search = Histogram("at2po_search_seconds", "One search.", buckets=_SECONDS, registry=own)
        self.waiting = Gauge(
            "at2po_waiting_queries", "Waiting queries.", registry=own, multiprocess_mode="livesum"
        )
        self._totals: dict[str, Counter] = {}  # of `counters.counted`
        self._seen: dict[str, int] = {}

    def answered(self, status: int, seconds: float) -> None:
        """Record one answer."""
        self._requests.labels(status).inc()
        self._seconds.observe(seconds)

    def on_batch(self, queries: int, seconds: float) -> None:
        """Record one search."""
        self._queries.inc(queries)
        self._batch.observe(queries)
        self._search.observe(seconds)
        self._take_totals()

    def page(self) -> bytes:
        """Return the page in Prometheus' text form."""
        self._take_totals()
        registry = self._registry
        if SHARED_FOLDER in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)

    def _take_totals(self) -> None:
        """Bring what retrieval has counted in this process (hits of a cache, retries, ...) up to date."""
        for name, value in counted().items():
            if name not in self._totals:
                text = f"Total of {name} in this process."
                self._totals[name] = Counter(f"at2po_retrieval_{name}", text, registry=self._registry)
            self._totals[name].inc(value - self._seen.get(name, 0))
            self._seen[name] = value
