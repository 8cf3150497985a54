"""Search on a server: at2po's own, Search-R1's, or any other that answers `/retrieve` as `messages` says.

A call returns the passages or raises `RetrievalError`, and does either before its deadline. Until then it
tries again after failures that may pass (no connection, a time-out, an answer cut short or not JSON, status
408, 425, 429, 5xx), with growing pauses that differ between callers. A server that stays dead is left alone
for a while: calls then fail at once. Searching twice changes nothing on a server, so a retry is always safe.
"""

import hashlib
import os
import ssl
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast, get_args
from urllib.parse import urlsplit

import httpcore
import tenacity

from at2po_env.data.corpus import Passage
from at2po_env.errors import ConfigError, RetrievalError
from at2po_env.forking.frozen import Shared
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
KEPT_CONNECTIONS = 32
KEPT_S = 30.0  # less than servers keep an idle connection, so that it is rarely closed just when it is used
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
        self._target = _target(self.url)
        self._timeout_s, self._attempt_s, self._retries = timeout_s, attempt_s, retries
        self._backoff = tenacity.wait_combine(  # half of a pause, and a random part of its other half
            tenacity.wait_exponential(backoff_s / 2, MAX_PAUSE_S / 2),
            tenacity.wait_random_exponential(backoff_s / 2, MAX_PAUSE_S / 2),
        )
        self._form = cast(Form, form)
        self._batch = 1 if form == "query" else batch
        self._breaker = CircuitBreaker(breaker_failures, breaker_rest_s)
        self._headers = [("Content-Type", "application/json"), ("Accept", "application/json")]
        token = token or os.environ.get(TOKEN_VARIABLE)
        if token:
            if not (token.isascii() and token.isprintable()):
                raise ConfigError("a token consists of printable ASCII characters; this one does not.")
            self._headers.append(("Authorization", f"Bearer {token}"))
        # By process: after a fork the child opens connections of its own. It does not even close its copies
        # of the parent's, because a lock of that pool may have been held by another thread during the fork.
        self._pools: dict[int, httpcore.ConnectionPool] = {}
        weakref.finalize(self, _close_pool, self._pools)
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
        status, headers, content = self._exchange(body, min(deadline, time.monotonic() + self._attempt_s))
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

    def _exchange(self, body: bytes, deadline: float) -> tuple[int, dict[str, str], bytes]:
        """Send a request; return the status, headers and body of its answer."""
        pool = self._pools.get(os.getpid()) or self._pools.setdefault(os.getpid(), _new_pool(self.url))
        timeouts = dict.fromkeys(("connect", "read", "write"), deadline)  # of `_TimedStream`
        content = bytearray()
        try:
            with pool.stream(
                "POST",
                self._target,
                headers=self._headers,
                content=body,
                extensions={"timeout": timeouts},
            ) as response:
                for piece in response.iter_stream():
                    content += piece
                    if len(content) > MAX_ANSWER_BYTES:
                        raise RetrievalError(
                            f"{self.url}: the answer is larger than {MAX_ANSWER_BYTES} bytes."
                        )
        except httpcore.TimeoutException as error:
            raise _PassingError("no whole answer in time") from error
        except (httpcore.NetworkError, httpcore.ProtocolError) as error:
            raise _PassingError(f"{type(error).__name__}: {error}") from error
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers
        }
        return response.status, headers, bytes(content)


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


def _target(url: str) -> httpcore.URL:
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return httpcore.URL(f"{url}/retrieve")
    except ValueError:  # a port beyond 65535, or a name that is not ASCII
        pass
    raise ConfigError(f"{url!r} is no address of a server. Fix: write http://HOST:PORT")


def _new_pool(url: str) -> httpcore.ConnectionPool:
    return httpcore.ConnectionPool(
        ssl_context=ssl.create_default_context() if url.startswith("https:") else None,
        max_connections=None,
        max_keepalive_connections=KEPT_CONNECTIONS,
        keepalive_expiry=KEPT_S,
        network_backend=_TimedBackend(),
    )


def _close_pool(pools: dict[int, httpcore.ConnectionPool]) -> None:
    if own := pools.pop(os.getpid(), None):
        own.close()


class _TimedBackend(httpcore.SyncBackend):
    """Opens connections that keep a deadline."""

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """Connect until the deadline; looking up the host's name is not covered by it."""
        return _TimedStream(super().connect_tcp(host, port, _left(timeout), local_address, socket_options))


class _TimedStream(httpcore.NetworkStream):
    """A connection whose reads and writes all end at one deadline.

    The time-outs of HTTP libraries hold for one read at a time, so that a server that sends a byte now and
    then is waited for without end. httpcore hands the time-outs of a request on to each read and write as
    they are. Here they are not durations but the time (of `time.monotonic`) by which all must be over.
    """

    def __init__(self, stream: httpcore.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), 1 << 16):
            self._stream.write(buffer[start : start + (1 << 16)], _left(timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _TimedStream(self._stream.start_tls(ssl_context, server_hostname, _left(timeout)))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _left(deadline: float | None) -> float | None:
    """Return the seconds until the deadline.

    Raises:
        httpcore.TimeoutException: it is over.
    """
    left = None if deadline is None else deadline - time.monotonic()
    if left is not None and left <= 0:
        raise httpcore.ReadTimeout("timed out")
    return left
