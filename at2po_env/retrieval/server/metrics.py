"""What a retrieval server tells Prometheus."""

from collections.abc import Iterator, Sequence

from at2po_env.errors import MissingExtraError
from at2po_env.retrieval.counters import counted

try:
    from prometheus_client import (
        CONTENT_TYPE_LATEST,
        CollectorRegistry,
        Counter,
        Gauge,
        Histogram,
        generate_latest,
    )
    from prometheus_client.core import CounterMetricFamily, Metric
    from prometheus_client.parser import text_string_to_metric_families
    from prometheus_client.registry import Collector
except ModuleNotFoundError as _error:
    raise MissingExtraError(f"{_error}. Fix: pip install 'at2po[serve]'") from _error

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class _ProcessTotals(Collector):
    """The process-wide totals of `counters`, as one metric per name."""

    def collect(self) -> Iterator[CounterMetricFamily]:
        for name, value in sorted(counted().items()):
            text = f"Total of {name} in this process."
            yield CounterMetricFamily(f"at2po_retrieval_{name}", text, value=value)


class ServerMetrics:
    """One server's metrics in a registry of their own, so that several servers may live in one process."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        registry.register(_ProcessTotals())
        self.requests = Counter("at2po_retrieve_requests", "Answers.", ["status"], registry=registry)
        self.queries = Counter("at2po_retrieve_queries", "Searched queries.", registry=registry)
        self.seconds = Histogram(
            "at2po_retrieve_seconds", "From request to answer.", buckets=_SECONDS, registry=registry
        )
        self.batch = Histogram(
            "at2po_search_batch_queries", "Queries per search.", buckets=_SIZES, registry=registry
        )
        self.search = Histogram("at2po_search_seconds", "One search.", buckets=_SECONDS, registry=registry)
        self.waiting = Gauge("at2po_waiting_queries", "Waiting queries.", registry=registry)

        self._answers: dict[int, Counter] = {}

    def answered(self, status: int, seconds: float) -> None:
        """Record one answer."""
        if status not in self._answers:
            self._answers[status] = self.requests.labels(status)
        self._answers[status].inc()
        self.seconds.observe(seconds)

    def on_batch(self, queries: int, seconds: float) -> None:
        """Record one search."""
        self.queries.inc(queries)
        self.batch.observe(queries)
        self.search.observe(seconds)

    def page(self) -> bytes:
        """Return the page in Prometheus' text form."""
        return generate_latest(self._registry)


def sum_pages(pages: Sequence[str]) -> bytes:
    """Add up the pages of several processes, sample by sample; a time of creation is the earliest."""
    families: dict[str, Metric] = {}
    samples: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for page in pages:
        for family in text_string_to_metric_families(page):
            families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            known = samples.setdefault(family.name, {})
            for sample in family.samples:
                key = sample.name, tuple(sorted(sample.labels.items()))
                merge = min if sample.name.endswith("_created") else sum
                known[key] = merge((known[key], sample.value)) if key in known else sample.value
    for name, family in families.items():
        for (sample_name, labels), value in samples[name].items():
            family.add_sample(sample_name, dict(labels), value)
    registry = CollectorRegistry()
    registry.register(_Families(list(families.values())))
    return generate_latest(registry)


class _Families(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families
