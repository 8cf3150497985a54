"""A retrieval server of several processes on one address: each opens the retriever and answers for itself.

The kernel spreads connections over the processes (SO_REUSEPORT). A stop is handed on to all of them and waits
until each has answered what it took; when one dies, all stop. `/metrics` is the sum over the processes, up to
a second old.
"""

import asyncio
import multiprocessing
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from at2po_env.errors import At2poError, ConfigError, RetrievalError
from at2po_env.retrieval.base import Retriever
from at2po_env.retrieval.server.config import ServerConfig

REFRESH_S = 1.0


def serve_processes(opener: Callable[[], Retriever], settings: ServerConfig) -> None:
    """Serve with `settings.processes` processes until SIGTERM or Ctrl-C; call it from the main thread.

    Args:
        opener: Opens the retriever, in each process; must be picklable.
        settings: `max_waiting` is shared out among the processes.

    Raises:
        ConfigError: listening beyond this machine without a token, or a system without SO_REUSEPORT.
        RetrievalError: the address cannot be used, or a process died.
    """
    settings.check_address()
    if not hasattr(socket, "SO_REUSEPORT"):
        raise ConfigError("this system cannot share an address among processes. Fix: use one process.")
    context = multiprocessing.get_context("spawn")
    share = {"max_waiting": max(1, settings.max_waiting // settings.processes)}
    with tempfile.TemporaryDirectory(prefix="at2po-serve-") as folder, _reserved(settings) as port:
        own = settings.model_copy(update={"port": port, **share})
        children = [
            context.Process(target=_child, args=(opener, own, Path(folder), number))
            for number in range(settings.processes)
        ]
        for child in children:
            child.start()
        _watch(children, settings.drain_s + 5)


@contextmanager
def _reserved(settings: ServerConfig) -> Iterator[int]:
    """Bind the address without listening, so that it is known to be free; yields the port."""
    with _bound(settings) as reserved:
        yield int(reserved.getsockname()[1])


def _bound(settings: ServerConfig) -> socket.socket:
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with ExitStack() as undo:
            bound = undo.enter_context(socket.socket(family, kind))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            bound.bind(address)
            undo.pop_all()
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        fix = "give another --port, or stop what listens there"
        raise RetrievalError(f"cannot listen on {where} ({error.strerror}). Fix: {fix}.") from error
    return bound


def _watch(children: list[Any], stop_s: float) -> None:
    """Wait until all children have ended; the first to end, and a signal, end the others.

    Raises:
        RetrievalError: a child ended without being told to.
    """
    told: list[int] = []

    def stop(number: int = 0, frame: object = None) -> None:  # noqa: ARG001 - a signal handler
        told.append(number)
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


def _child(opener: Callable[[], Retriever], settings: ServerConfig, folder: Path, number: int) -> None:
    from at2po_env.retrieval.server.app import create_app, uvicorn_server

    try:
        app = create_app(opener(), settings, pages=SharedPages(folder, number))
    except At2poError as error:
        sys.exit(f"error: {error}")
    server = uvicorn_server(app, settings)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])  # a parent that was killed could not tell
        server.should_exit = True

    threading.Thread(target=follow, daemon=True).start()
    with _bound(settings) as listener:
        listener.listen(2048)
        server.run([listener])


class SharedPages:
    """The metrics pages of all processes of a server, one file each."""

    def __init__(self, folder: Path, number: int) -> None:
        self._folder, self._own = folder, folder / f"{number}.txt"

    async def keep_writing(self, page: Callable[[], bytes]) -> None:
        """Write this process' page now and every second."""
        while True:
            self.write(page())
            await asyncio.sleep(REFRESH_S)

    def write(self, page: bytes) -> None:
        """Write this process' page, whole or not at all."""
        new = self._own.with_suffix(".new")
        new.write_bytes(page)
        new.replace(self._own)

    def merged(self, own: bytes) -> bytes:
        """Return the sum of all pages, of which this process' is `own`."""
        from at2po_env.retrieval.server.metrics import sum_pages

        self.write(own)
        return sum_pages([path.read_text("utf-8") for path in sorted(self._folder.glob("*.txt"))])
