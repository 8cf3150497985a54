"""Search on a server: at2po's own, Search-R1's, or any other that answers `/retrieve` as `messages` says.

A call returns the passages or raises `RetrievalError`, and does either before its deadline. Until then it
tries again after failures that may pass (no connection, a time-out, an answer cut short or not JSON, status
408, 425, 429, 5xx), with growing pauses that differ between callers. A server that stays dead is left alone
for a while: calls then fail at once. Searching twice changes nothing on a server, so a retry is always safe.
"""

import hashlib
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

import tenacity

from at2po_env.data.corpus import Passage
from at2po_env.errors import ConfigError, RetrievalError
from at2po_env.forking.frozen import Shared
from at2po_env.http.client import Connections, OversizeError, TransferError
from at2po_env.retrieval.base import check_search
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
MAX_ANSWER_BYTES = 64 * 2**20
MAX_PAUSE_S = 2.0
MAX_ASKED_PAUSE_S = 10.0  # the longest pause that a server may ask for
TOKEN_VARIABLE = "AT2PO_RETRIEVER_TOKEN"
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})


class _PassingError(Exception):
    """A failure that another try may not meet; `pause_s` is what the server asked for."""

    def __init__(self, reason: str, pause_s: float = 0.0) -> None:
        super().__init__(reason)
        self.pause_s = pause_s


class HttpRetriever(Shared):
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
        breaker_rest_s: Seconds for which it is left alone.
    """

    def __init__(  # noqa: PLR0913 - keyword-only options of one client
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
        self._connections = Connections(self.url, token or os.environ.get(TOKEN_VARIABLE))
        self._timeout_s, self._attempt_s, self._retries = timeout_s, attempt_s, retries
        self._backoff = tenacity.wait_combine(  # half of a pause, and a random part of its other half
            tenacity.wait_exponential(backoff_s / 2, MAX_PAUSE_S / 2),
            tenacity.wait_random_exponential(backoff_s / 2, MAX_PAUSE_S / 2),
        )
        self._form = cast(Form, form)
        self._batch = 1 if form == "query" else batch
        self._breaker = CircuitBreaker(breaker_failures, breaker_rest_s)
        # Of the address, until the server tells the digest of its own retriever.
        self.digest = hashlib.sha256(f"http {self.url}".encode()).hexdigest()

    def __repr__(self) -> str:
        return f"HttpRetriever({self.url!r})"

    def search(self, queries: Sequence[str], topk: int) -> list[list[Passage]]:
        """Return for each query at most `topk` passages, best first; returns or raises within the deadline.

        A query longer than `MAX_QUERY_CHARS` is cut there.

        Raises:
            RetrievalError: the server cannot be reached, refuses, or does not answer properly in time.
        """
        check_search(queries, topk)
        deadline = time.monotonic() + self._timeout_s
        found: list[list[Passage]] = []
        for start in range(0, len(queries), self._batch):
            texts = [query[:MAX_QUERY_CHARS] for query in queries[start : start + self._batch]]
            count(requests=1, queries=len(texts))
            try:
                found += self._request(texts, topk, deadline)
            except RetrievalError:
                count(failures=1)
                raise
        return found

    def _request(self, queries: list[str], topk: int, deadline: float) -> list[list[Passage]]:
        """Ask until there is an answer, a refusal, no try left, or no time for another one."""
        if not self._breaker.allows():
            count(circuit_open=1)
            raise RetrievalError(f"{self.url}: left alone for a while, because it kept failing.")
        body = request_body(queries, topk, self._form)

        def pause(state: tenacity.RetryCallState) -> float:
            error = state.outcome and state.outcome.exception()
            asked_s = error.pause_s if isinstance(error, _PassingError) else 0.0
            return max(self._backoff(state), asked_s)

        tries = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_PassingError),
            stop=tenacity.stop_any(
                tenacity.stop_after_attempt(self._retries + 1),
                tenacity.stop_before_delay(deadline - time.monotonic()),
            ),
            wait=pause,
            before_sleep=lambda _: count(retries=1),
            reraise=True,
        )
        try:
            found = tries(self._try, body, len(queries), topk, deadline)
        except _PassingError as error:
            self._breaker.record(ok=False)
            made = tries.statistics["attempt_number"]
            raise RetrievalError(f"{self.url}: {error} ({made} tries).") from error
        except RetrievalError:
            self._breaker.record(ok=True)  # it answers, if only to refuse
            raise
        self._breaker.record(ok=True)
        return found

    def _try(self, body: bytes, queries: int, topk: int, deadline: float) -> list[list[Passage]]:
        until = min(deadline, time.monotonic() + self._attempt_s)
        try:
            status, headers, content = self._connections.post(
                "/retrieve", body, deadline=until, max_bytes=MAX_ANSWER_BYTES
            )
        except TransferError as error:
            raise _PassingError(str(error)) from error
        except OversizeError as error:
            raise RetrievalError(f"{self.url}: {error}.") from error
        detail = content[:200].decode("utf-8", "replace")
        if status in _PASSING:
            asked = headers.get("retry-after", "")
            pause_s = min(float(asked), MAX_ASKED_PAUSE_S) if asked.isdecimal() else 0.0
            raise _PassingError(f"status {status}: {detail}", pause_s)
        if status != 200:
            raise RetrievalError(f"{self.url} answers status {status}: {detail}")
        try:
            found = read_response(content, queries=queries, topk=topk)
        except NotJsonError as error:
            raise _PassingError(str(error)) from error
        except WireError as error:
            raise RetrievalError(f"{self.url}/retrieve: {error}.") from error
        self.digest = headers.get(DIGEST_HEADER.lower()) or self.digest
        return found


class CircuitBreaker:
    """Opens after `failures` failed calls in a row; then lets one call every `rest_s` seconds try.

    Without it, a server that is down would cost each turn of each episode its whole time-out.
    """

    def __init__(self, failures: int = 5, rest_s: float = 5.0) -> None:
        self._limit, self._rest_s = failures, rest_s
        self._failed, self._next_try = 0, 0.0
        self._lock = threading.Lock()

    def allows(self) -> bool:
        """Say if a call may go out now; a yes of an open breaker holds for the caller alone."""
        with self._lock:
            if self._failed < self._limit:
                return True
            now = time.monotonic()
            if now < self._next_try:
                return False
            self._next_try = now + self._rest_s
            return True

    def record(self, ok: bool) -> None:
        """Take note of how a call went."""
        with self._lock:
            self._failed = 0 if ok else self._failed + 1
            self._next_try = time.monotonic() + self._rest_s
