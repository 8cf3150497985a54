"""HTTP/1.1 connections that are kept open, and never take longer than they were given.

The time-outs of HTTP libraries hold for one read at a time, so that a server that sends a byte now and then
is waited for without end. Here every read gets what is left until the deadline of the whole exchange.
(Looking up a host name is the system's business and not covered; give an address where that matters.)
"""

import http.client
import io
import os
import socket
import ssl
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping
from email.message import Message
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from at2po_env.errors import ConfigError


class Answer(NamedTuple):
    """An HTTP answer, read whole."""

    status: int
    headers: Message
    body: bytes


class StaleConnectionError(ConnectionError):
    """A kept connection had been closed by the server; the request was not seen by it."""


class TooLargeError(OSError):
    """An answer has more bytes than are read."""


class _Timed(io.RawIOBase):
    """The reading side of a socket; every read ends before the deadline or raises `TimeoutError`."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock, self._deadline = sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._sock.settimeout(left)
        return self._sock.recv_into(buffer)


class _TimedSocket:
    """What `http.client` uses of a socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.deadline = sock, 0.0

    def sendall(self, data: Any) -> None:
        self.sock.settimeout(max(self.deadline - time.monotonic(), 1e-3))
        self.sock.sendall(data)  # its time-out is for all of it

    def makefile(self, mode: str) -> io.BufferedReader:  # noqa: ARG002
        return io.BufferedReader(_Timed(self.sock, self.deadline), 1 << 16)

    def close(self) -> None:
        self.sock.close()


class _Connection:
    def __init__(self, pool: "ConnectionPool", deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        sock = socket.create_connection((pool.host, pool.port), left)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if pool.tls is not None:
                sock.settimeout(max(deadline - time.monotonic(), 1e-3))
                sock = pool.tls.wrap_socket(sock, server_hostname=pool.host)
        except BaseException:
            sock.close()
            raise
        self.timed, self.used = _TimedSocket(sock), False
        self.http = http.client.HTTPConnection(pool.host, pool.port)
        self.http.auto_open = 0
        self.http.sock = self.timed

    def close(self) -> None:
        self.http.close()
        self.timed.close()


class ConnectionPool:
    """Kept connections to one server; thread safe, and safe after a fork of the process.

    Args:
        url: `http://HOST:PORT/PATH` or https.
        keep: Connections that stay open between exchanges.
        max_bytes: Longest answer.
    """

    def __init__(self, url: str, *, keep: int = 32, max_bytes: int = 64 * 2**20) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is no address of a server. Fix: write http://HOST:PORT")
        self.host, self.tls = parts.hostname, None
        if parts.scheme == "https":
            self.tls = ssl.create_default_context()
        self.port = parts.port or (443 if self.tls else 80)
        self.path = parts.path.rstrip("/")
        self._keep, self._max_bytes = keep, max_bytes
        self._free: deque[_Connection] = deque()
        self._pid, self._lock = os.getpid(), threading.Lock()
        weakref.finalize(self, _close_all, self._free)

    def exchange(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], *, deadline: float
    ) -> Answer:
        """Send a request and read its whole answer before `deadline` (of `time.monotonic`).

        Raises:
            TimeoutError: the deadline came first.
            StaleConnectionError: a kept connection was dead; worth an immediate second try.
            OSError, http.client.HTTPException: the server is away, or its answer is cut short or no HTTP.
        """
        connection = self._take() or _Connection(self, deadline)
        try:
            answer, alive = self._exchange(connection, method, self.path + path, body, headers, deadline)
        except BaseException:
            connection.close()
            raise
        if alive and len(self._free) < self._keep:
            connection.used = True
            self._free.append(connection)
        else:
            connection.close()
        return answer

    def _exchange(
        self,
        connection: _Connection,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str],
        deadline: float,
    ) -> tuple[Answer, bool]:
        connection.timed.deadline = deadline
        try:
            connection.http.request(method, path, body, dict(headers))
            response = connection.http.getresponse()
        except (ConnectionError, http.client.RemoteDisconnected) as error:
            if connection.used:
                raise StaleConnectionError(str(error)) from error
            raise
        with response:
            content = response.read(self._max_bytes + 1)
            if len(content) > self._max_bytes:
                raise TooLargeError(f"the answer is larger than {self._max_bytes} bytes")
            if response.length:  # read(amount) does not complain about an answer that was cut short
                raise http.client.IncompleteRead(content, response.length)
            alive = not response.will_close
        return Answer(response.status, response.headers, content), alive

    def _take(self) -> _Connection | None:
        with self._lock:
            if (
                self._pid != os.getpid()
            ):  # the parent process goes on using these; closing our copies leaves its open
                _close_all(self._free)
                self._pid = os.getpid()
        try:
            return self._free.pop()
        except IndexError:
            return None

    def close(self) -> None:
        """Close the kept connections."""
        _close_all(self._free)


def _close_all(connections: deque[_Connection]) -> None:
    while connections:
        connections.pop().close()
