import re
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from helpers.paths import REAL_DATA

from at2po_env.data.corpus import Passage

PASSAGES = (
    Passage("0", "Ada Lovelace", "Ada Lovelace wrote the first program for the engine."),
    Passage("1", "Charles Babbage", "Babbage designed the analytical engine in London."),
    Passage("2", "London", 'London is the capital of England; 日本語 and "quotes"\ntwo lines.'),
    Passage("3", "Enigma", "The Enigma machine was broken at Bletchley Park."),
)


@pytest.fixture
def passages() -> tuple[Passage, ...]:
    return PASSAGES


@pytest.fixture(scope="session")
def real_corpus() -> Path:
    path = REAL_DATA / "corpus" / "wiki_hotpotqa_musique.jsonl"
    if not path.exists():
        pytest.skip("needs the real data in ../shared/data")
    return path


Behaviour = Callable[[socket.socket, bytes], None]


class FaultServer:
    """Reads a request, then does whatever the next behaviour says; the last one repeats."""

    def __init__(self, behaviours: Sequence[Behaviour]) -> None:
        self._behaviours, self.seen = list(behaviours), list[bytes]()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                request = self.receive(connection)
                if request:
                    number = len(self.seen)
                    self.seen.append(request)
                    self._behaviours[min(number, len(self._behaviours) - 1)](connection, request)
            except OSError:
                pass

    @staticmethod
    def receive(connection: socket.socket) -> bytes:
        """One whole request, body included: it may arrive in several pieces; b"" when there is none."""
        request = connection.recv(1 << 16)
        while request.startswith((b"GET ", b"POST ")):  # and not the hello of TLS
            head, end, body = request.partition(b"\r\n\r\n")
            length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
            if end and len(body) >= (int(length[1]) if length else 0):
                break
            piece = connection.recv(1 << 16)
            if not piece:
                break
            request += piece
        return request

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def fault_server() -> Iterator[Callable[..., FaultServer]]:
    servers: list[FaultServer] = []

    def start(*behaviours: Behaviour) -> FaultServer:
        servers.append(FaultServer(behaviours))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
