"""A retrieval server in a thread of this process, for notebooks, tests and benchmarks."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from at2po_env.errors import RetrievalError
from at2po_env.retrieval.base import Retriever
from at2po_env.retrieval.server.app import create_app, uvicorn_server
from at2po_env.retrieval.server.config import ServerConfig

START_S = 30.0


@contextmanager
def serving(retriever: Retriever, settings: ServerConfig | None = None) -> Iterator[str]:
    """Serve while the block runs; yields the server's URL.

    Args:
        retriever: What to serve.
        settings: Default: loopback, any free port.

    Raises:
        RetrievalError: the server does not start.
    """
    settings = settings or ServerConfig(port=0)
    settings.check_address()
    server = uvicorn_server(create_app(retriever, settings), settings)
    with socket.create_server((settings.host, settings.port), backlog=2048) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=server.run, args=([listener],), name="at2po-server", daemon=True)
        thread.start()
        try:
            deadline = time.monotonic() + START_S
            while not server.started:
                if not thread.is_alive() or time.monotonic() > deadline:
                    raise RetrievalError(f"the retrieval server did not start on {settings.host}:{port}")
                time.sleep(0.005)
            yield f"http://{settings.host}:{port}"
        finally:
            server.should_exit = True
            thread.join(settings.drain_s + 5)
