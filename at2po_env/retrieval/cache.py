"""Results kept on disk: a retriever that remembers, in one SQLite file shared by processes.

Results are keyed by the retriever's digest (kind, corpus, settings), `topk` and the query, so one file
serves several indexes and a changed one finds nothing stale. The file is bounded: when it is full, the
results that were used longest ago make room.

The cache is a convenience: when it cannot be opened, read or written (a full disk, a damaged file), the
search goes on without it and `cache_errors` counts it.
"""

import contextlib
import hashlib
import json
import os
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import ConfigDict, FiniteFloat, TypeAdapter

from at2po_env.data.corpus import Passage
from at2po_env.forking.frozen import Shared
from at2po_env.retrieval.base import Retriever
from at2po_env.retrieval.counters import count

_Result = TypeVar("_Result")

BUSY_S = 5.0
REST_S = 30.0  # how long a cache that failed is left alone
_TOUCH_S = 60  # a result used again within this time is not marked again
_kept = TypeAdapter(list[tuple[str, str, str, FiniteFloat]], config=ConfigDict(strict=True))
_SCHEMA = """
CREATE TABLE IF NOT EXISTS results
  (key BLOB PRIMARY KEY, used INTEGER NOT NULL, found TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_use ON results (used);
CREATE TABLE IF NOT EXISTS size (one INTEGER PRIMARY KEY CHECK (one = 1), results INTEGER NOT NULL);
INSERT OR IGNORE INTO size VALUES (1, 0);
CREATE TRIGGER IF NOT EXISTS one_more AFTER INSERT ON results
  BEGIN UPDATE size SET results = results + 1; END;
CREATE TRIGGER IF NOT EXISTS one_less AFTER DELETE ON results
  BEGIN UPDATE size SET results = results - 1; END;
"""


def _checksum(key: bytes, text: str) -> str:
    return f"{zlib.crc32(text.encode('utf-8', 'surrogatepass'), zlib.crc32(key)):08x}"


def _read(key: bytes, row: str) -> list[Passage]:
    """Read a row: a checksum of key and text, and the text; rows of older releases have no checksum.

    Raises:
        ValueError: The row is damaged.
    """
    text = row if row.startswith("[") else row[8:]
    if text is not row and row[:8] != _checksum(key, text):
        raise ValueError("a row of the cache does not have its checksum")
    return [Passage(*item) for item in _kept.validate_json(text)]


class ResultCache:
    """Lists of passages by key, in a bounded SQLite file; thread safe, shared by processes.

    Args:
        path: The file; made when it is missing.
        max_results: Number of results that are kept.
    """

    def __init__(self, path: str | Path, *, max_results: int = 1_000_000) -> None:
        self.path, self._max_results = Path(path), max_results
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._pid = os.getpid()

    def get(self, keys: Sequence[bytes]) -> list[list[Passage] | None]:
        """Return what is kept for each key.

        Raises:
            sqlite3.Error, OSError, ValueError: the file cannot be read or is damaged.
        """
        with self._lock:
            connection, now = self._open(), int(time.time())
            found: list[list[Passage] | None] = []
            stale = []
            for key in keys:
                row = connection.execute("SELECT used, found FROM results WHERE key = ?", (key,)).fetchone()
                found.append(None if row is None else _read(key, row[1]))
                if row is not None and now - row[0] > _TOUCH_S:
                    stale.append((now, key))
            if stale:
                with connection:
                    connection.execute("BEGIN IMMEDIATE")
                    connection.executemany("UPDATE results SET used = ? WHERE key = ?", stale)
        return found

    def put(self, results: Sequence[tuple[bytes, Sequence[Passage]]]) -> None:
        """Keep results, dropping the ones used longest ago beyond the bound.

        Raises:
            sqlite3.Error, OSError: the file cannot be written.
        """
        now = int(time.time())
        texts = [(key, json.dumps(found, ensure_ascii=False)) for key, found in results]
        rows = [(key, now, _checksum(key, text) + text) for key, text in texts]
        with self._lock:
            connection = self._open()
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.executemany("INSERT OR IGNORE INTO results VALUES (?, ?, ?)", rows)
                (kept,) = connection.execute("SELECT results FROM size").fetchone()
                if kept > self._max_results:  # some more than needed, so that this is not done at every call
                    surplus = kept - self._max_results + self._max_results // 20
                    connection.execute(
                        "DELETE FROM results WHERE key IN (SELECT key FROM results ORDER BY used LIMIT ?)",
                        (surplus,),
                    )

    def __len__(self) -> int:
        """Return the number of results kept."""
        with self._lock:
            (kept,) = self._open().execute("SELECT results FROM size").fetchone()
        return int(kept)

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        with self._lock:
            if self._connection is not None and self._pid == os.getpid():
                self._connection.close()
            self._connection = None

    def _open(self) -> sqlite3.Connection:
        if self._pid != os.getpid():  # SQLite connections must not be carried over a fork of the process
            self._connection, self._pid = None, os.getpid()
        if self._connection is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(
                self.path, timeout=BUSY_S, check_same_thread=False, isolation_level=None
            )
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = NORMAL")
                connection.executescript(_SCHEMA)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection


class CachedRetriever(Shared):
    """A retriever whose results are kept on disk.

    Args:
        retriever: Who searches what is not kept.
        path: SQLite file, shared by processes and by retrievers.
        max_results: Number of results that are kept in the file.
    """

    def __init__(self, retriever: Retriever, path: str | Path, *, max_results: int = 1_000_000) -> None:
        self.retriever = retriever
        self.cache = ResultCache(path, max_results=max_results)
        self._rest_until = 0.0

    def __repr__(self) -> str:
        return f"CachedRetriever({self.retriever!r}, {str(self.cache.path)!r})"

    @property
    def digest(self) -> str:
        """Digest of the retriever that searches: keeping its results changes none."""
        return self.retriever.digest

    def search(self, queries: Sequence[str], topk: int) -> list[list[Passage]]:
        """Return for each query at most `topk` passages: kept ones, else searched for in one batch."""
        found: list[list[Passage] | None] = [None] * len(queries)
        found = self._attempt(lambda: self.cache.get([self._key(q, topk) for q in queries])) or found
        missing = list(dict.fromkeys(q for q, kept in zip(queries, found, strict=True) if kept is None))
        count(cache_hits=sum(kept is not None for kept in found), cache_misses=found.count(None))
        if not missing:
            return [kept for kept in found if kept is not None]
        fresh = dict(zip(missing, self.retriever.search(missing, topk), strict=True))
        self._attempt(lambda: self.cache.put([(self._key(q, topk), fresh[q]) for q in missing]))
        return [list(fresh[q]) if kept is None else kept for q, kept in zip(queries, found, strict=True)]

    def _attempt(self, use: Callable[[], _Result]) -> _Result | None:
        """Use the cache; None where that fails, after which it is left alone for `REST_S`."""
        if time.monotonic() < self._rest_until:
            return None
        try:
            return use()
        except Exception:  # noqa: BLE001 - whatever is wrong with a cache, the search goes on without it
            count(cache_errors=1)
            self._rest_until = time.monotonic() + REST_S
            with contextlib.suppress(sqlite3.Error):
                self.cache.close()
            return None

    def _key(self, query: str, topk: int) -> bytes:
        text = f"{self.retriever.digest} {topk} {query}".encode("utf-8", "surrogatepass")
        return hashlib.blake2b(text, digest_size=16).digest()
