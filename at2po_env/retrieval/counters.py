"""Counts what happens in the retrieval of this process, so that a trainer can write it to its metrics.

`counted()` returns running totals; the difference between two calls is what happened in between. Names:

| name | counts |
|---|---|
| requests, queries | calls of an HTTP client, and the queries in them |
| retries | further attempts of an HTTP client after a failed one |
| failures | calls that gave up: a `RetrievalError` each |
| circuit_open | failures among them that were refused at once, because the server had been dead |
| cache_hits, cache_misses | queries answered from the cache on disk, and those that were not |
| tool_failures | calls of tools that failed for a `RetrievalError`, a time-out or another `OSError` |
| cache_errors | times when that cache could not be read or written, and the search went on without it |
"""

import threading
from collections import Counter

_totals: Counter[str] = Counter()
_lock = threading.Lock()


def count(**amounts: int) -> None:
    """Add to the totals of this process."""
    with _lock:
        _totals.update(amounts)


def counted() -> dict[str, int]:
    """Return the totals of this process; names that never happened are absent."""
    with _lock:
        return dict(_totals)
