"""Lies to our clients, and sends hostile bytes to our retrieval server.

A client gets a sound answer or one of its errors, within its deadline. The server answers a hostile request
with a refusal or closes the connection within its time, never with an error of its own (5xx other than 503),
never without its token, and sound requests in between are answered.
"""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import logging
import math
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import get_args
from urllib.parse import urlsplit

from pydantic import SecretStr

from at2po_agent.policies.base import Request
from at2po_agent.policies.openai import OpenAIPolicy
from at2po_agent.policies.openai.client import Server
from at2po_agent.policies.openai.messages import Dialect, Endpoint
from at2po_env.data.corpus import Passage
from at2po_env.errors import PolicyError, RetrievalError
from at2po_env.retrieval.bm25.retriever import Bm25Retriever
from at2po_env.retrieval.client import HttpRetriever
from at2po_env.retrieval.server.app import ServerConfig
from at2po_env.retrieval.server.running import serving
from benchmarks.campaign.runner import Try, words
from benchmarks.campaign.snapshots import mutate

DEADLINE_S, MARGIN_S = 0.5, 1.5
RECEIVE_S = 1.0
TOKEN = "campaign-token"
PASSAGES = [Passage(str(n), f"Title {n}", f"the first program of number {n}", 1.0) for n in range(20)]

# Lying servers --------------------------------------------------------------------------------------------

_FOUND = {
    "result": [[{"document": {"id": "7", "contents": '"A title"\nIts text.'}, "score": 1.5}] * 3, []],
}
_SPOKEN = {
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "<answer>x</answer>", "tool_calls": []},
            "text": "<answer>x</answer>",
            "finish_reason": "stop",
            "logprobs": {
                "content": [{"token": "x", "logprob": -0.5, "bytes": [120], "top_logprobs": []}],
                **{"tokens": ["x"], "token_logprobs": [-0.5], "text_offset": [0]},
            },
        }
    ],
    "usage": {"prompt_tokens": 10, "completion_tokens": 5},
}
_STATUSES = (*[200] * 15, 100, 204, 206, 301, 400, 401, 404, 408, 413, 418, 429, 500, 503, 999)
_HEADERS = words("""Retry-After: 999999999|Retry-After: -1|Retry-After: nan|Content-Length: 3
Retry-After: Wed, 21 Oct 2099 07:28:00 GMT|Content-Type: text/html; charset=utf-99|Content-Encoding: gzip
Content-Encoding: br|Transfer-Encoding: chunked|Transfer-Encoding: chunked, chunked|Location: /retrieve
Connection: keep-alive|no colon|\0: \0|Content-Length: -3|Content-Length: 99999999999999999999""")
_HEADERS.append("X: " + "y" * 70_000)


def lie(truth: object, rng: random.Random) -> tuple[bytes, str]:
    """Bytes of an answer, and how they are sent: "whole", "slowly", "reset" or "open" (not closed after)."""
    body = json.dumps(truth).encode()
    if rng.random() < 0.7:
        body = mutate(body.decode(), rng).encode("utf-8", "surrogatepass")
    kind = rng.randrange(12)
    if kind == 0:
        body = gzip.compress(body if rng.random() < 0.5 else b"[" * 10_000_000)
    elif kind == 1:
        size = len(body) + rng.choice((0, 0, -1, 5, 1 << 40))
        body = b"%x\r\n%s\r\n" % (size, body) + rng.choice((b"0\r\n\r\n", b""))
    elif kind == 2:
        body = rng.choice((b"", b"<html>please log in</html>", b"null", b"[" * 100_000, rng.randbytes(500)))
    status, length = rng.choice(_STATUSES), len(body) + rng.choice((0, 0, 0, -1, 1, 100))
    headers = [f"Content-Length: {length}"] * rng.choice((0, 1, 1, 1, 1, 2))
    headers += rng.sample(_HEADERS, rng.choice((0, 0, 1, 2)))
    if kind == 1:
        headers = ["Transfer-Encoding: chunked"]
    head = "\r\n".join([f"HTTP/1.{rng.choice('1110')} {status} Well", *headers, "", ""]).encode()
    data = head + body
    if rng.random() < 0.15:
        data = data[: rng.randrange(len(data) + 1)]
    if rng.random() < 0.05:
        continued = b"HTTP/1.1 100 Continue\r\n\r\n" * 3_000
        data = rng.choice((b"", b"\0" * 99, b"SSH-2.0-x\r\n", continued, rng.randbytes(300)))
    return data, rng.choices(("whole", "slowly", "reset", "open"), (12, 1, 2, 2))[0]


class Liar:
    """A server on loopback that answers every request with the same bytes.

    Attributes:
        data: The bytes.
        how: How they are sent; see `lie`.
    """

    def __init__(self) -> None:
        self.data, self.how = b"", "whole"
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._answer, args=(connection, self.data, self.how), daemon=True).start()

    def _answer(self, connection: socket.socket, data: bytes, how: str) -> None:
        with contextlib.suppress(OSError), connection:
            connection.settimeout(2.0)
            request = connection.recv(1 << 16)
            head, _, rest = request.partition(b"\r\n\r\n")
            lines = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
            sizes = [line.split(b":")[1] for line in lines]
            while sizes and len(rest) < int(sizes[0]):
                rest += connection.recv(1 << 16)
            if how == "slowly":
                for place in range(0, min(len(data), 40)):
                    connection.sendall(data[place : place + 1])
                    time.sleep(0.05)
            else:
                connection.sendall(data)
            if how == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif how == "open":
                connection.recv(1)


@contextlib.contextmanager
def lying_servers(folder: Path) -> Iterator[Try]:
    """By turns an `HttpRetriever` and an `OpenAIPolicy` that ask a liar."""
    del folder
    liar = Liar()
    limits = {"timeout_s": DEADLINE_S, "attempt_s": 0.3, "retries": 1, "backoff_s": 0.005}
    retriever = HttpRetriever(url=liar.url, breaker_failures=1 << 40, **limits)  # type: ignore[arg-type]
    patience = Server(f"{liar.url}/v1", **limits)  # type: ignore[arg-type]
    policies = [
        OpenAIPolicy(patience, "tiny", dialect=Dialect(endpoint, logprobs=True), max_failures=None)
        for endpoint in get_args(Endpoint)
    ]

    def attempt(rng: random.Random, number: int) -> str:
        asked = number % 4
        liar.data, liar.how = lie(_FOUND if asked < 2 else _SPOKEN, rng)
        started = time.monotonic()
        what = _search(retriever) if asked < 2 else _generate(policies[asked - 2])
        took = time.monotonic() - started
        if not what and took > DEADLINE_S + MARGIN_S:
            what = f"it took {took:.1f} s"
        client = "HttpRetriever" if asked < 2 else "OpenAIPolicy"
        return f"{client}: {what}: {liar.how} {liar.data[:600]!r}" if what else ""

    yield attempt


def _search(retriever: HttpRetriever) -> str:
    """Search, and say what is wrong with the answer."""
    try:
        found = retriever.search(["one", "two"], 3)
    except RetrievalError:
        return ""
    except Exception as error:  # noqa: BLE001  this is what is looked for
        return f"{type(error).__name__}: {error}"
    if len(found) != 2:
        return f"{len(found)} lists for two queries"
    for passage in [passage for some in found for passage in some]:
        texts = (passage.id, passage.title, passage.text)
        if any(type(text) is not str for text in texts) or type(passage.score) not in (int, float):
            return f"a passage is {passage!r:.300}"
        if not math.isfinite(passage.score):
            return f"a score is {passage.score}"
    return ""


def _generate(policy: OpenAIPolicy) -> str:
    """Ask for a generation, and say what is wrong with it."""
    try:
        request = Request(tuple(policy.tokenizer.encode("Say x.")), 50, stop=("</answer>",))
        (answer,) = policy.generate([request])
    except PolicyError:
        return ""
    except Exception as error:  # noqa: BLE001  this is what is looked for
        return f"{type(error).__name__}: {error}"
    policy.tokenizer.decode(answer.ids).encode("utf-8", "surrogatepass")
    if len(answer.ids) != len(answer.log_probs):
        return f"{len(answer.ids)} ids and {len(answer.log_probs)} log-probs"
    if any(not math.isfinite(value) or value > 1e-3 for value in answer.log_probs.tolist()):
        return f"log-probs {answer.log_probs.tolist()!r:.200}"
    counted = [value for value in vars(policy.stats).values() if isinstance(value, int | float)]
    if not all(map(math.isfinite, counted)):
        return f"the statistics are {policy.stats}"
    return ""


# Hostile clients ------------------------------------------------------------------------------------------

_GOOD = json.dumps({"queries": ["first program"], "topk": 2, "return_scores": True})
_ASKED_HEADERS = words("""Authorization: Bearer \xff|Authorization:|Host: y|Transfer-Encoding: chunked
Expect: 100-continue|Connection: Upgrade|no colon| folded|A\0: b|Content-Length: 5|Connection: close""")
_ASKED_HEADERS += ["Authorization: Basic " + "x" * 9_000, "X: " + "y" * 20_000]
_PATHS = words("""/retrieve|/retrieve|/retrieve|/retrieve|/health|/metrics|/docs|/|*|//retrieve|/retrieve?x=y
/../../etc/passwd|/retrieve/%00|http://other/retrieve|/\xff|""")
_PATHS.append("/" + "z" * 20_000)
_METHODS = ("POST", "POST", "POST", "GET", "PUT", "HEAD", "OPTIONS", "CONNECT", "x" * 300, "\0")


@contextlib.contextmanager
def hostile_clients(folder: Path) -> Iterator[Try]:
    """Hostile bytes for a retrieval server with a token; every tenth try also asks it something sound."""
    del folder
    limits = {"receive_s": RECEIVE_S, "timeout_s": 5.0, "max_body_bytes": 1 << 20}
    config = ServerConfig(port=0, token=SecretStr(TOKEN), **limits)  # type: ignore[arg-type]
    with serving(Bm25Retriever.from_passages(PASSAGES), config) as url:
        expected, errors = _sound(url), _Errors()
        for name in ("uvicorn.error", "asyncio"):
            logging.getLogger(name).addHandler(errors)
        files = [len(os.listdir("/proc/self/fd"))]

        def attempt(rng: random.Random, number: int) -> str:
            data = _hostile_request(rng)
            what = _converse(url, data, rng)
            if not what and number % 10 == 0 and (answer := _sound(url)) != expected:
                what = f"a sound request was answered {answer!r:.200} afterwards"
            if not what and errors.said:
                what = f"the server logged an error: {errors.said}"
                errors.said = ""
            if not what and number % 100 == 0:
                files.append(len(os.listdir("/proc/self/fd")))
                what = f"{files[-1]} files are open, {files[0]} at first" if files[-1] > files[0] + 50 else ""
            return f"{what}: {data[:600]!r}" if what else ""

        yield attempt


class _Errors(logging.Handler):
    """Keeps the last error that a server logs: a neighbour must not fill its log with tracebacks."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.said = f"{record.getMessage()[:200]} ({record.exc_info[1] if record.exc_info else ''})"


def _sound(url: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
    try:
        connection.request("POST", "/retrieve", _GOOD, {"Authorization": f"Bearer {TOKEN}"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def _hostile_request(rng: random.Random) -> bytes:
    """Bytes of one or some requests, most of them wrong somewhere."""
    body = _GOOD if rng.random() < 0.3 else mutate(_GOOD, rng)
    data = body.encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        many = b'{"queries": [' + b'"x",' * 50_000 + b'"x"]}'
        data = rng.choice((b"[" * 200_000, many, rng.randbytes(5_000), b""))
    length = rng.choice((len(data), len(data), len(data), len(data) + 9, max(0, len(data) - 9), -1, 1 << 50))
    headers = [f"Content-Length: {length}", "Host: x", "Content-Type: application/json"]
    if rng.random() < 0.6:
        headers.append(f"Authorization: Bearer {TOKEN}")
    headers += rng.sample(_ASKED_HEADERS, rng.choice((0, 0, 0, 1, 2)))
    method, path = rng.choice(_METHODS), rng.choice(_PATHS)
    version = rng.choice(("HTTP/1.1", "HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/2.0", "HTTP/9", ""))
    request = "\r\n".join([f"{method} {path} {version}", *headers, "", ""]).encode("latin-1") + data
    if rng.random() < 0.2:
        changed = bytearray(request)
        for _ in range(rng.choice((1, 5, 50))):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        request = bytes(changed)
    if rng.random() < 0.2:
        request = request[: rng.randrange(len(request) + 1)]
    return request * rng.choice((1, 1, 1, 1, 2, 20)) if len(request) < 5_000 else request


def _converse(url: str, data: bytes, rng: random.Random) -> str:
    """Send bytes, read what comes, and say what is wrong with it."""
    parts = urlsplit(url)
    address = str(parts.hostname), int(parts.port or 0)
    manner, answer, started = rng.random(), b"", time.monotonic()
    with socket.create_connection(address, timeout=RECEIVE_S + 6.0) as connection:
        try:
            connection.sendall(data)
            if manner < 0.2:
                return ""  # it goes away at once
            if manner < 0.9:
                connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(1 << 16):
                answer += part
                if manner >= 0.9 and answer:
                    break
        except TimeoutError:
            return f"the connection was kept open for {time.monotonic() - started:.1f} s"
        except OSError:
            pass  # it was closed on us
    for line in answer.split(b"\r\n"):
        if line.startswith(b"HTTP/1.1 ") and (status := int(line[9:12])) >= 500 and status != 503:
            return f"it answered {status}"
    if TOKEN.encode() not in data and b"200 OK" in answer:
        return "it answered without the token"
    return ""
