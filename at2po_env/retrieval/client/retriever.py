"""Search on a server: at2po's own, Search-R1's, or any other that answers `/retrieve` as `wire` says.

A call returns the passages or raises `RetrievalError`, and does either before its deadline. In between it
tries again after failures that may pass (no connection, a time-out, an answer cut short or not JSON, status
408, 429, 5xx), with growing pauses that differ between callers. A server that stays dead is left alone for a
while: calls then fail at once. Searching twice changes nothing on a server, so a retry is always safe.
"""

import hashlib
import http.client
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

from at2po_env.data.passages import Passage
from at2po_env.errors import ConfigError, RetrievalError
from at2po_env.retrieval.client.breaker import CircuitBreaker
from at2po_env.retrieval.client.connection import Answer, ConnectionPool, StaleConnectionError, TooLargeError
from at2po_env.retrieval.counters import count
from at2po_env.retrieval.messages import (
    DIGEST_HEADER,
    Form,
    NotJsonError,
    WireError,
    read_response,
    request_body,
)

MAX_QUERY_CHARS = 8192
MAX_PAUSE_S = 2.0
TOKEN_VARIABLE = "AT2PO_RETRIEVER_TOKEN"
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})


class _PassingError(Exception):
    """A failure that another try may not meet; `pause_s` is what the server asked for."""

    def __init__(self, reason: str, pause_s: float = 0.0) -> None:
        super().__init__(reason)
        self.pause_s = pause_s


class HttpRetriever:
    """A retriever behind HTTP; thread safe, and safe after a fork of the process.

    Args:
        corpus: Ignored (the server knows its own); accepted so that all retrievers open alike.
        url: Address of the server, `http://HOST:PORT`; requests go to `/retrieve` below it.
        token: Bearer token; default: the environment variable `AT2PO_RETRIEVER_TOKEN`.
        timeout_s: Deadline of a call, all tries and pauses included.
        attempt_s: Longest try.
        retries: Further tries of one request; by default enough to use up the deadline.
        backoff_s: First pause; doubles up to `MAX_PAUSE_S`, each time drawn from its upper half.
        batch: Queries in one request.
        form: "queries"; "query" for servers that take one query at a time (T2PO, SkyRL).
        breaker_failures: Failed calls in a row after which the server is left alone.
        breaker_rest_s: For how long.
    """

    def __init__(  # noqa: PLR0913 - keyword-only settings of one client
        self,
        corpus: str | Path | None = None,  # noqa: ARG002
        *,
        url: str,
        token: str | None = None,
        timeout_s: float = 30.0,
        attempt_s: float = 15.0,
        retries: int = 20,
        backoff_s: float = 0.1,
        batch: int = 256,
        form: str = "queries",
        breaker_failures: int = 5,
        breaker_rest_s: float = 5.0,
    ) -> None:
        if form not in get_args(Form):
            raise ConfigError(f"form {form!r} is unknown. Fix: use one of {', '.join(get_args(Form))}.")
        if timeout_s <= 0 or attempt_s <= 0 or retries < 0 or batch < 1:
            raise ConfigError("timeout_s and attempt_s must be positive, retries >= 0 and batch >= 1.")
        self.url = url.rstrip("/").removesuffix("/retrieve")
        self._pool = ConnectionPool(self.url)
        self._timeout_s, self._attempt_s = timeout_s, attempt_s
        self._retries, self._backoff_s = retries, backoff_s
        self._form = cast(Form, form)
        self._batch = 1 if form == "query" else batch
        self._breaker = CircuitBreaker(breaker_failures, breaker_rest_s)
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        token = token or os.environ.get(TOKEN_VARIABLE)
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._random = random.Random()
        self._digest = hashlib.sha256(f"http {self.url}".encode()).hexdigest()

    def __repr__(self) -> str:
        return f"HttpRetriever({self.url!r})"

    def __deepcopy__(self, memo: object) -> "HttpRetriever":
        return self

    @property
    def digest(self) -> str:
        """Digest of the server's retriever when the server tells it, else of its address."""
        return self._digest

    def search(self, queries: Sequence[str], topk: int) -> list[list[Passage]]:
        """Return for each query at most `topk` passages, best first; returns or raises within the deadline.

        A query longer than `MAX_QUERY_CHARS` is cut there.

        Raises:
            RetrievalError: the server cannot be reached, refuses, or does not answer properly in time.
        """
        if isinstance(queries, str) or topk < 1:
            raise RetrievalError(
                f"search needs a list of queries and topk >= 1, got {queries!r:.80} and {topk!r}."
            )
        deadline = time.monotonic() + self._timeout_s
        found: list[list[Passage]] = []
        for start in range(0, len(queries), self._batch):
            texts = [query[:MAX_QUERY_CHARS] for query in queries[start : start + self._batch]]
            found += self._request(texts, topk, deadline)
        return found

    def _request(self, queries: list[str], topk: int, deadline: float) -> list[list[Passage]]:
        count(requests=1, queries=len(queries))
        if not self._breaker.allows():
            count(failures=1, circuit_open=1)
            raise RetrievalError(f"{self.url}: left alone for a while, because it kept failing.")
        body = request_body(queries, topk, self._form)
        tries = 0
        while True:
            tries += 1
            try:
                found = self._try(body, len(queries), topk, deadline)
            except _PassingError as error:
                pause = max(self._pause(tries), error.pause_s)
                if tries > self._retries or time.monotonic() + pause >= deadline:
                    self._breaker.record(ok=False)
                    count(failures=1)
                    raise RetrievalError(f"{self.url}: {error} ({tries} tries).") from error
                count(retries=1)
                time.sleep(pause)
            except RetrievalError:
                self._breaker.record(ok=True)  # it answers, if only to refuse
                count(failures=1)
                raise
            else:
                self._breaker.record(ok=True)
                return found

    def _pause(self, tries: int) -> float:
        longest = min(self._backoff_s * 2.0 ** (tries - 1), MAX_PAUSE_S)
        return longest * self._random.uniform(0.5, 1.0)

    def _try(self, body: bytes, queries: int, topk: int, deadline: float) -> list[list[Passage]]:
        answer = self._exchange(body, min(deadline, time.monotonic() + self._attempt_s))
        if answer.status in _PASSING:
            raise _PassingError(f"status {answer.status}: {_detail(answer)}", _retry_after(answer))
        if answer.status != 200:
            raise RetrievalError(f"{self.url} answers status {answer.status}: {_detail(answer)}")
        try:
            found = read_response(answer.body, queries=queries, topk=topk)
        except NotJsonError as error:
            raise _PassingError(str(error)) from error
        except WireError as error:
            raise RetrievalError(f"{self.url}/retrieve: {error}.") from error
        self._digest = answer.headers.get(DIGEST_HEADER) or self._digest
        return found

    def _exchange(self, body: bytes, deadline: float) -> Answer:
        while True:
            try:
                return self._pool.exchange("POST", "/retrieve", body, self._headers, deadline=deadline)
            except StaleConnectionError:  # at most as often as there are kept connections
                continue
            except TooLargeError as error:
                raise RetrievalError(f"{self.url}: {error}.") from error
            except TimeoutError as error:
                raise _PassingError("no whole answer in time") from error
            except http.client.IncompleteRead as error:
                raise _PassingError(f"the answer was cut short after {len(error.partial)} bytes") from error
            except (OSError, http.client.HTTPException) as error:
                raise _PassingError(f"{type(error).__name__}: {error}") from error


def _detail(answer: Answer) -> str:
    return answer.body[:200].decode("utf-8", "replace")


def _retry_after(answer: Answer) -> float:
    given = str(answer.headers.get("Retry-After", ""))
    return min(float(given), 10.0) if given.isdigit() else 0.0
