"""Runs a retrieval server until SIGTERM or Ctrl-C: `serve`, `serve_processes`; or in a thread: `serving`.

A stop refuses new connections and answers every request that was taken.
"""

import asyncio
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

from at2po_env.errors import At2poError, MissingExtraError, RetrievalError
from at2po_env.retrieval.base import Retriever
from at2po_env.retrieval.server.app import SHARED_FOLDER, ServerConfig, create_app

try:
    import h11
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ModuleNotFoundError as _error:
    raise MissingExtraError(f"{_error}. Fix: pip install 'at2po[serve]'") from _error

BACKLOG = 2048
START_S = 30.0
MAX_HEAD_BYTES = 16 * 2**10  # of a request's first line and headers


def serve(retriever: Retriever, config: ServerConfig | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C, then answer what was taken and return.

    Raises:
        ConfigError: listening beyond this machine without a token.
        RetrievalError: the address cannot be used.
    """
    config = config or ServerConfig()
    with _listening(config) as listener:
        _server(retriever, config).run([listener])


@contextmanager
def serving(retriever: Retriever, config: ServerConfig | None = None) -> Iterator[str]:
    """Serve from a thread of this process while the block runs; yields the server's URL.

    This is for notebooks, tests and benchmarks.

    Args:
        retriever: What to serve.
        config: Default: loopback, any free port.

    Raises:
        ConfigError, RetrievalError: as `serve`, or the server does not start.
    """
    config = config or ServerConfig(port=0)
    with _listening(config) as listener:
        port = listener.getsockname()[1]
        server = _server(retriever, config)
        thread = threading.Thread(target=server.run, args=([listener],), name="at2po-server", daemon=True)
        thread.start()
        try:
            deadline = time.monotonic() + START_S
            while not server.started:
                if not thread.is_alive() or time.monotonic() > deadline:
                    raise RetrievalError(f"the retrieval server did not start on {config.host}:{port}")
                time.sleep(0.005)
            yield f"http://{config.host}:{port}"
        finally:
            server.should_exit = True
            thread.join(config.drain_s + 5)


def serve_processes(opener: Callable[[], Retriever], config: ServerConfig) -> None:
    """Serve with `config.processes` processes until SIGTERM or Ctrl-C; call it from the main thread.

    Each process opens the retriever and answers for itself. All of them accept from one listening socket. A
    stop is handed on to all and waits for them; when one dies, all stop.

    Args:
        opener: Opens the retriever, in each process; must be picklable.
        config: `max_waiting` is shared out among the processes.

    Raises:
        ConfigError: listening beyond this machine without a token.
        RetrievalError: the address cannot be used, or a process died.
    """
    context = multiprocessing.get_context("spawn")
    own = config.model_copy(update={"max_waiting": max(1, config.max_waiting // config.processes)})
    with _listening(config) as listener, tempfile.TemporaryDirectory(prefix="at2po-serve-") as folder:
        children = [
            context.Process(target=_serve_child, args=(opener, own, listener))
            for _ in range(config.processes)
        ]
        os.environ[SHARED_FOLDER] = folder  # for the children's metrics
        try:
            for child in children:
                child.start()
        finally:
            del os.environ[SHARED_FOLDER]
        listener.close()  # the children have it; once they stop, nothing may still be accepted here
        _watch(children, config.drain_s + 5)


def _listening(config: ServerConfig) -> socket.socket:
    """Listen on the address of `config`, of which another server cannot take a share."""
    config.check_address()
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)
        family, _, _, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        raise RetrievalError(
            f"cannot listen on {config.host}:{config.port} ({error.strerror}). Fix: give another --port, or "
            "stop what listens there."
        ) from error


class _ImpatientProtocol(H11Protocol):
    """uvicorn's HTTP, with a limit on the time in which a request must arrive, and quiet about broken bodies.

    uvicorn bounds the size of a request's head, but waits for the rest of an incomplete request for ever: so
    many half-open connections as a process may have files would shut everyone else out.
    """

    receive_s: float
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._timer = self.loop.call_later(self.receive_s, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):  # the request has arrived whole
            self._stop_timer()
        elif self._timer is None:  # its first bytes came on a connection that was kept open
            self._timer = self.loop.call_later(self.receive_s, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP; where it is the body of a request under way, close the connection.

        uvicorn would send this refusal and the request's answer, and both fail with a traceback in the log.
        """
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            super().send_400_response(msg)
            return
        cycle.disconnected = True
        cycle.message_event.set()
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _server(retriever: Retriever, config: ServerConfig) -> uvicorn.Server:
    class Protocol(_ImpatientProtocol):
        receive_s = config.receive_s

    return uvicorn.Server(
        uvicorn.Config(
            create_app(retriever, config),
            http=Protocol,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            limit_concurrency=config.max_connections,
            ws="none",
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=60,
            timeout_graceful_shutdown=int(max(config.drain_s, 1)),
            backlog=BACKLOG,
        )
    )


def _serve_child(opener: Callable[[], Retriever], config: ServerConfig, listener: socket.socket) -> None:
    """Serve as one of several processes."""
    try:
        server = _server(opener(), config)
    except At2poError as error:
        sys.exit(f"error: {error}")
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])  # a parent that was killed could not tell
        server.should_exit = True

    threading.Thread(target=follow, daemon=True).start()
    server.run([listener])


def _watch(children: Sequence[BaseProcess], stop_s: float) -> None:
    """Wait until all children have ended; the first to end, and a signal, end the others.

    Raises:
        RetrievalError: a child ended without being told to.
    """
    told = False

    def stop(number: int = 0, frame: object = None) -> None:  # noqa: ARG001 - a signal handler
        nonlocal told
        told = True
        for child in children:
            if child.is_alive():
                child.terminate()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        ended = wait([child.sentinel for child in children])
        first = next(child for child in children if child.sentinel in ended)
        first.join()
        died = not told
        stop()
        for child in children:
            child.join(stop_s)
            if child.exitcode is None:
                child.kill()
                child.join()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if died:
        raise RetrievalError(
            f"a server process ended with exit code {first.exitcode}; see its message above."
        )
