"""Loads the retrieval server by clients in a process of their own, and compares with direct batched calls."""

from __future__ import annotations

import functools
import json
import selectors
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from at2po_env.retrieval.messages import request_body
from at2po_env.retrieval.opening import open_retriever
from at2po_env.retrieval.server.app import ServerConfig
from at2po_env.retrieval.server.running import serve, serve_processes
from benchmarks.retrieval.stages import SECONDS, TOPK, rates_of, texts


def measure(corpus: Path, qa: Path, port: int, processes: list[int]) -> dict[str, Any]:
    """Queries a second through the server, and without it in batches of 128 before and after."""
    retriever, queries = open_retriever("bm25", corpus), texts(qa)

    def direct() -> float:
        return rates_of(lambda some: retriever.search(some, TOPK), queries, 128)["batched_qps"]

    loads: dict[str, dict[str, float]] = {}
    before = direct()
    for count in processes:
        loads |= {f"processes_{count}_{name}": load for name, load in _loads(corpus, qa, port, count).items()}
    rate = (before + direct()) / 2
    for load in loads.values():
        load["of_direct"] = round(load["qps"] / rate, 3)
    return {"direct_batched_qps": round(rate, 1), **loads}


def _loads(corpus: Path, qa: Path, port: int, processes: int) -> dict[str, dict[str, float]]:
    command = [sys.executable, "-m", "benchmarks.retrieval", "--stage"]
    server = subprocess.Popen(
        [*command, "serve", str(corpus), str(port), str(processes)], stdout=subprocess.DEVNULL
    )
    try:
        _wait_until_up(port, processes)
        results = {}
        for per_request in (1, 16):
            for clients in (1, 16, 128):
                load = [*command, "load", str(port), str(qa), str(clients), str(per_request)]
                answer = subprocess.run(load, check=True, stdout=subprocess.PIPE, text=True).stdout
                results[f"clients_{clients}_queries_{per_request}"] = json.loads(answer.splitlines()[-1])
        return results
    finally:
        server.terminate()
        server.wait(30)


def serve_stage(corpus: str, port: int, processes: int) -> None:
    """Serve until told to stop."""
    config = ServerConfig(port=port, processes=processes)
    if processes > 1:
        serve_processes(functools.partial(open_retriever, "bm25", corpus), config)
    else:
        serve(open_retriever("bm25", corpus), config)


def _wait_until_up(port: int, processes: int) -> None:
    """Wait until new connections are taken, and a little longer where several processes have to come up."""
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            time.sleep(3.0 * (processes > 1))
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the server did not come up")


class _Client:
    """A connection that asks again as soon as it has its answer."""

    def __init__(self, port: int, number: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.turn, self.asked, self.size = number * 7, 0.0, 0
        self._got, self._whole = b"", 0

    def ask(self, requests: list[_Request]) -> None:
        message, self.size = requests[self.turn % len(requests)]
        self.turn += 1
        self.asked = time.perf_counter()
        self.socket.sendall(message)

    def answered(self) -> bool:
        """Read what is there; is the answer whole?"""
        data = self.socket.recv(1 << 18)
        assert data, "the server closed a connection"
        self._got = self._got + data if self._got else data
        if not self._whole and (head := self._got.find(b"\r\n\r\n")) >= 0:
            assert self._got.startswith(b"HTTP/1.1 200"), self._got[:200]
            length = self._got[:head].lower().partition(b"content-length:")[2].partition(b"\r")[0]
            self._whole = head + 4 + int(length)
        done = 0 < self._whole <= len(self._got)
        if done:
            self._got, self._whole = b"", 0
        return done


class _Request(NamedTuple):
    message: bytes
    size: int


def load(port: int, qa: Path, clients: int, per_request: int) -> dict[str, float]:
    """Queries a second of clients that each wait for an answer before they ask again; two rounds at least."""
    queries, requests = texts(qa), list[_Request]()
    for first in range(0, len(queries), per_request):
        some = queries[first : first + per_request]
        body = request_body(some, TOPK)
        head = f"POST /retrieve HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
        requests.append(_Request(head.encode() + body, len(some)))
    selector = selectors.DefaultSelector()
    for number in range(clients):
        client = _Client(port, number)
        selector.register(client.socket, selectors.EVENT_READ, client)
        client.ask(requests)
    count, waits, start = 0, list[float](), time.perf_counter() + 0.5
    while (now := time.perf_counter()) < start + SECONDS or len(waits) < 2 * clients:
        for key, _ in selector.select(1.0):
            if key.data.answered():
                if now >= start:
                    count += key.data.size
                    waits.append(time.perf_counter() - key.data.asked)
                key.data.ask(requests)
    waits.sort()
    return {
        "qps": round(count / (now - start), 1),
        "p50_ms": round(1e3 * waits[len(waits) // 2], 2),
        "p99_ms": round(1e3 * waits[len(waits) * 99 // 100], 2),
    }
