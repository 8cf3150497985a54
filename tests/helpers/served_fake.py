"""A small server on loopback that answers as a test says: real HTTP, faults included."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    """What goes over the wire: `cut` bytes of the body are not sent, `drop` closes before anything is."""

    body: Any = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: int = 0
    drop: bool = False


@dataclass(frozen=True)
class Seen:
    """A request as it arrived."""

    path: str
    headers: Mapping[str, str]
    body: dict[str, Any]
    at: float


Behaviour = Callable[[Seen], Any]


class FakeServer:
    """Its address, and what it saw."""

    def __init__(self, behaviour: Behaviour, models: list[str] | Reply) -> None:
        self.behaviour, self.models = behaviour, models
        self.seen: list[Seen] = []
        self.under_way = self.most_under_way = self.gone = 0
        self.lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                if isinstance(fake.models, Reply):
                    self.answer(fake.models)
                    return
                names = {"object": "list", "data": [{"id": name} for name in fake.models]}
                self.answer(Reply(names))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                seen = Seen(self.path, dict(self.headers.items()), body, time.monotonic())
                with fake.lock:
                    fake.seen.append(seen)
                    fake.under_way += 1
                    fake.most_under_way = max(fake.most_under_way, fake.under_way)
                try:
                    told = fake.behaviour(seen)
                    reply = told if isinstance(told, Reply) else Reply(told)
                    time.sleep(reply.delay)
                finally:
                    with fake.lock:
                        fake.under_way -= 1
                self.answer(reply)

            def answer(self, reply: Reply) -> None:
                if reply.drop:
                    self.close_connection = True
                    return
                data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
                try:
                    self.send_response(reply.status)
                    for name, value in {"Content-Length": str(len(data)), **reply.headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data[: len(data) - reply.cut])
                except OSError:
                    fake.gone += 1
                if reply.cut:
                    self.close_connection = True

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: Any, address: Any) -> None:
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    @property
    def bodies(self) -> list[dict[str, Any]]:
        """What was asked, in the order of arrival."""
        return [seen.body for seen in self.seen]


@contextmanager
def serving(behaviour: Behaviour, *, models: list[str] | Reply | None = None) -> Iterator[FakeServer]:
    """A server while the block runs."""
    fake = FakeServer(behaviour, ["tiny"] if models is None else models)
    thread = threading.Thread(target=fake.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        fake.server.shutdown()
        fake.server.server_close()
        thread.join(5)


def chat(text: str | None, *, finish: str = "stop", **choice: Any) -> dict[str, Any]:
    """An answer of a chat endpoint; `message` adds to the message, other keywords to the choice."""
    message = {"role": "assistant", "content": text, **choice.pop("message", {})}
    usage = choice.pop("usage", {"prompt_tokens": 10, "completion_tokens": 5})
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish, **choice}], "usage": usage}


def completion(text: str, *, finish: str = "stop", **choice: Any) -> dict[str, Any]:
    """An answer of a completion endpoint."""
    usage = {"prompt_tokens": 10, "completion_tokens": 5}
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish, **choice}], "usage": usage}


def chat_log_probs(*tokens: tuple[str, float]) -> dict[str, Any]:
    """Log-probs as a chat endpoint writes them."""
    return {
        "content": [
            {"token": text, "logprob": value, "bytes": list(text.encode()), "top_logprobs": []}
            for text, value in tokens
        ]
    }


def tool_call(name: str, arguments: str) -> dict[str, Any]:
    """A parsed call as a chat endpoint writes it."""
    return {"id": "chatcmpl-tool-1", "type": "function", "function": {"name": name, "arguments": arguments}}


def error(message: str, **more: Any) -> dict[str, Any]:
    """The body of a refusal."""
    return {
        "error": {"message": message, "type": "invalid_request_error", "param": None, "code": None, **more}
    }
