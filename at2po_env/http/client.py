"""Sends requests to one server, each within a deadline and an amount that it may answer."""

from __future__ import annotations

import os
import ssl
import time
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpcore

from at2po_env.errors import ConfigError

KEPT_CONNECTIONS = 32
KEPT_S = 30.0  # less than servers keep an idle connection, so that it is rarely closed just when it is used


class TransferError(Exception):
    """There was no whole answer: no connection, a time-out, or an answer cut short."""


class OversizeError(Exception):
    """The answer is larger than agreed."""


class Answer(NamedTuple):
    """An answer: its status, its headers by their names in small letters, and its body."""

    status: int
    headers: dict[str, str]
    content: bytes


class Connections:
    """The kept connections to one server; thread safe, and safe after a fork of the process.

    Args:
        url: `http://HOST:PORT`, with or without a path.
        token: Bearer token of every request.

    Raises:
        ConfigError: The address or the token cannot be used.
    """

    def __init__(self, url: str, token: str | None = None) -> None:
        self.url = url.rstrip("/")
        _check_address(self.url)
        self._headers = [("Content-Type", "application/json"), ("Accept", "application/json")]
        if token:
            if not (token.isascii() and token.isprintable()):
                raise ConfigError("a token consists of printable ASCII characters; this one does not.")
            self._headers.append(("Authorization", f"Bearer {token}"))
        # By process: after a fork the child opens connections of its own. It does not even close its copies
        # of the parent's, because a lock of that pool may have been held by another thread during the fork.
        self._pools: dict[int, httpcore.ConnectionPool] = {}
        weakref.finalize(self, _close_pool, self._pools)

    def post(self, path: str, body: bytes, *, deadline: float, max_bytes: int) -> Answer:
        """Send a request and return the answer, whatever its status.

        Args:
            path: Below the address, with its slash.
            body: JSON.
            deadline: Time of `time.monotonic` by which all must be over.
            max_bytes: Largest body of an answer.

        Raises:
            TransferError: There was no whole answer in time.
            OversizeError: The answer is larger.
        """
        pool = self._pools.get(os.getpid()) or self._pools.setdefault(os.getpid(), _new_pool(self.url))
        timeouts = dict.fromkeys(("connect", "read", "write"), deadline)  # of `_TimedStream`
        content = bytearray()
        try:
            with pool.stream(
                "POST",
                f"{self.url}{path}",
                headers=self._headers,
                content=body,
                extensions={"timeout": timeouts},
            ) as response:
                for piece in response.iter_stream():
                    content += piece
                    if len(content) > max_bytes:
                        raise OversizeError(f"the answer is larger than {max_bytes} bytes")
        except httpcore.TimeoutException as error:
            raise TransferError("no whole answer in time") from error
        except (httpcore.NetworkError, httpcore.ProtocolError) as error:
            raise TransferError(f"{type(error).__name__}: {error}") from error
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers
        }
        return Answer(response.status, headers, bytes(content))


def _check_address(url: str) -> None:
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            httpcore.URL(url)
            return
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
