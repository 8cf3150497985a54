"""Runs a retrieval server until SIGTERM or Ctrl-C: `serve`, `serve_processes`; or in a thread: `serving`.

A stop refuses new connections and answers every request that was taken.
"""

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

from at2po_env.errors import At2poError, RetrievalError
from at2po_env.http.server import listen, make_server, running_in_thread
from at2po_env.retrieval.base import Retriever
from at2po_env.retrieval.server.app import SHARED_FOLDER, ServerConfig, create_app

if TYPE_CHECKING:
    import uvicorn


def serve(retriever: Retriever, config: ServerConfig | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C, then answer what was taken and return.

    Raises:
        ConfigError: listening beyond this machine without a token.
        RetrievalError: the address cannot be used.
    """
    config = config or ServerConfig()
    with listen(config, RetrievalError) as listener:
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
    with (
        listen(config, RetrievalError) as listener,
        running_in_thread(_server(retriever, config), listener, config, RetrievalError) as url,
    ):
        yield url


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
    with (
        listen(config, RetrievalError) as listener,
        tempfile.TemporaryDirectory(prefix="at2po-serve-") as folder,
    ):
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


def _server(retriever: Retriever, config: ServerConfig) -> "uvicorn.Server":
    return make_server(create_app(retriever, config), config)


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
