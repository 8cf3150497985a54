import contextlib
import http.client
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import pytest

pytest.importorskip("starlette", reason="needs the extra 'serve'")
pytest.importorskip("prometheus_client", reason="needs the extra 'serve'")
pytest.importorskip("uvicorn", reason="needs the extra 'serve'")

from at2po_env.data.corpus import Passage
from at2po_env.errors import ConfigError, RetrievalError
from at2po_env.retrieval.bm25.retriever import Bm25Retriever
from at2po_env.retrieval.client import HttpRetriever
from at2po_env.retrieval.server.app import ServerConfig
from at2po_env.retrieval.server.running import serve, serving

CORPUS_LINE = '{{"id": "{0}", "contents": "\\"Title {0}\\"\\nText about number{0} and all."}}\n'


class Recording:
    """Answers with the query as title; notes the batches and may be slow or fail."""

    digest = "d" * 64

    def __init__(self, *, seconds: float = 0.0) -> None:
        self.seconds, self.batches = seconds, list[tuple[list[str], int]]()

    def search(self, queries: Sequence[str], topk: int) -> list[list[Passage]]:
        self.batches.append((list(queries), topk))
        time.sleep(self.seconds)
        if "poison" in queries:
            raise RetrievalError("the index is damaged")
        return [[Passage(str(i), q, "text", 1.0) for i in range(topk)] for q in queries]


def post(url: str, body: bytes | dict, path: str = "/retrieve", **headers: str) -> tuple[int, dict]:
    if isinstance(body, dict):
        body = json.dumps(body).encode()
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    try:
        connection.request("POST", path, body, headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def get(url: str, path: str, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


@pytest.fixture
def bm25_url(passages: tuple[Passage, ...]) -> Iterator[str]:
    with serving(Bm25Retriever.from_passages(passages)) as url:
        yield url


def test_both_shapes_are_those_of_search_r1(bm25_url: str) -> None:
    queries = ["first program", "enigma machine"]
    status, scored = post(bm25_url, {"queries": queries, "topk": 1, "return_scores": True})
    assert status == 200
    assert list(scored) == ["result"]
    document = {
        "id": "0",
        "contents": '"Ada Lovelace"\nAda Lovelace wrote the first program for the engine.',
    }
    assert scored["result"][0][0]["document"] == document
    assert scored["result"][0][0]["score"] > 0
    assert scored["result"][1][0]["document"]["id"] == "3"
    _, bare = post(bm25_url, {"queries": queries, "topk": 1})
    assert bare["result"][0] == [document]


def test_the_single_form_gives_one_list(bm25_url: str) -> None:
    request = {"query": "enigma", "topk": 2, "return_scores": True, "other_key": 1}
    status, answer = post(bm25_url, request)
    assert status == 200
    assert [item["document"]["id"] for item in answer["result"][0]] == ["3"]
    assert len(answer["result"]) == 1


def test_client_and_server_give_what_the_retriever_gives(
    passages: tuple[Passage, ...], bm25_url: str
) -> None:
    direct = Bm25Retriever.from_passages(passages)
    client = HttpRetriever(url=bm25_url)
    queries = ["London engine", "日本語", "nothing known here zzz", "", "machine"]
    assert client.search(queries, 3) == direct.search(queries, 3)
    assert client.search(["london"], 1)[0][0].text == passages[2].text
    assert client.digest == direct.digest


def test_topk_and_scores_have_the_usual_defaults() -> None:
    with serving(Recording()) as url:
        assert len(post(url, {"queries": ["a"]})[1]["result"][0]) == 3
        assert len(post(url, {"queries": ["a"], "topk": None})[1]["result"][0]) == 3
        assert post(url, {"queries": []})[1] == {"result": []}


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"not json", 422, "JSON"),
        (b"[]", 422, "object"),
        ({}, 422, "either"),
        ({"queries": ["a"], "query": "a"}, 422, "either"),
        ({"queries": "a"}, 422, "queries"),
        ({"queries": [1]}, 422, "queries"),
        ({"queries": ["a"], "topk": 0}, 422, "topk"),
        ({"queries": ["a"], "topk": "3"}, 422, "topk"),
        ({"queries": ["a"], "topk": 11}, 422, "at most 10"),
        ({"queries": ["a"] * 5}, 422, "at most 4"),
        ({"queries": ["a" * 51]}, 422, "at most 50"),
        ({"queries": ["a"], "padding": "x" * 1000}, 413, "larger than 500"),
        (b'{"queries": ["\\ud800"]}', 422, ""),
        (b"[" * 400, 422, ""),
    ],
)
def test_what_is_beyond_a_limit_is_refused_with_the_limit(body: bytes | dict, status: int, says: str) -> None:
    limits = {"max_topk": 10, "max_queries": 4, "max_query_chars": 50, "max_body_bytes": 500}
    retriever = Recording()
    with serving(retriever, ServerConfig(port=0, **limits)) as url:
        got, answer = post(url, body)
        assert (got, says in answer["detail"]) == (status, True), answer
        assert retriever.batches == []
        assert post(url, {"queries": ["still there"]})[0] == 200


def test_a_body_without_a_length_is_bounded_too() -> None:
    with serving(Recording(), ServerConfig(port=0, max_body_bytes=500)) as url:
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
        connection.request("POST", "/retrieve", iter([b"x" * 400, b"x" * 400]), encode_chunked=True)
        assert connection.getresponse().status == 413
        connection.close()


def test_a_body_that_never_comes_is_given_up() -> None:
    with (
        serving(Recording(), ServerConfig(port=0, timeout_s=0.3)) as url,
        socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), 10) as connection,
    ):
        connection.sendall(b"POST /retrieve HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
        assert b" 408 " in connection.recv(1000)


def test_the_token_is_asked_for() -> None:
    with serving(Recording(), ServerConfig(port=0, token="right")) as url:
        body = {"queries": ["a"]}
        assert post(url, body)[0] == 401
        assert post(url, body, Authorization="Bearer wrong")[0] == 401
        assert post(url, body, Authorization="Bearer right")[0] == 200
        for path in ("/metrics", "/health", "/docs", "/openapi.json", "/nothing"):
            assert get(url, path)[0] == 401
        assert get(url, "/health", Authorization="Bearer right")[0] == 200
        assert HttpRetriever(url=url, token="right").search(["a"], 1)
        with pytest.raises(RetrievalError, match="401"):
            HttpRetriever(url=url).search(["a"], 1)


@pytest.mark.parametrize(
    "incomplete",
    [
        b"",
        b"POST /retr",
        b"GET /health HTTP/1.1\r\nHost: a\r\n",
        b"POST /nothing HTTP/1.1\r\nContent-Length: 9\r\n\r\n{",
    ],
    ids=["nothing", "line", "headers", "body"],
)
def test_a_request_that_does_not_arrive_whole_in_time_is_dropped(incomplete: bytes) -> None:
    with serving(Recording(), ServerConfig(port=0, receive_s=0.5)) as url:
        address = urlsplit(url).hostname, urlsplit(url).port
        with socket.create_connection(address, 10) as first, socket.create_connection(address, 10) as kept:
            kept.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            assert kept.recv(1000).startswith(b"HTTP/1.1 200")
            time.sleep(0.7)  # a connection without a request may rest longer
            start = time.monotonic()
            for connection in (first, kept):
                with contextlib.suppress(OSError):  # the first has been dropped already
                    connection.sendall(incomplete or b"G")
                with contextlib.suppress(ConnectionError):
                    while connection.recv(1000):
                        pass
            assert time.monotonic() - start < 3


def test_half_open_connections_shut_nobody_out_for_long() -> None:
    config = ServerConfig(port=0, max_connections=20, receive_s=1.0)
    with serving(Recording(), config) as url, contextlib.ExitStack() as stack:
        address = urlsplit(url).hostname, urlsplit(url).port
        for _ in range(40):
            connection = stack.enter_context(socket.create_connection(address, 10))
            connection.sendall(b"POST /retrieve HTTP/1.1\r\n")
        time.sleep(0.2)
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 503
        connection.close()
        assert HttpRetriever(url=url, timeout_s=10).search(["a"], 1)[0][0].title == "a"


@pytest.mark.parametrize("method", [b"POST", b"HEAD"])
def test_a_broken_body_leaves_no_traceback_in_the_log(
    method: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    head = b" /retrieve HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    with serving(Recording(), ServerConfig(port=0, token="t")) as url:
        for name in ("uvicorn.error", "asyncio"):
            logging.getLogger(name).addHandler(caplog.handler)
        for body in (b"no chunk\r\n", b"1\r\nxx\r\n"):
            with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), 10) as connection:
                connection.sendall(method + head + body)
                with contextlib.suppress(ConnectionError):
                    while connection.recv(1000):
                        pass
        assert HttpRetriever(url=url, token="t", timeout_s=10).search(["a"], 1)[0][0].title == "a"
        for name in ("uvicorn.error", "asyncio"):
            logging.getLogger(name).removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


@pytest.mark.parametrize("head", [b"GET /" + b"a" * 20_000, b"GET / HTTP/1.1\r\nX: " + b"a" * 20_000])
def test_the_head_of_a_request_is_bounded(head: bytes) -> None:
    with (
        serving(Recording(), ServerConfig(port=0, token="t")) as url,
        socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), 10) as connection,
    ):
        connection.sendall(head)
        assert b" 400 " in connection.recv(1000)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_listening_beyond_this_machine_needs_a_token(host: str) -> None:
    with pytest.raises(ConfigError, match="--token-file"):
        serve(Recording(), ServerConfig(host=host))
    ServerConfig(host=host, token="secret").check_address()


def test_an_empty_token_is_refused() -> None:
    with pytest.raises(ConfigError, match="empty"):
        serve(Recording(), ServerConfig(token=""))


def test_an_address_in_use_is_an_error() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(RetrievalError, match="cannot listen"),
    ):
        serve(Recording(), ServerConfig(port=listener.getsockname()[1]))


def at_once(number: int, call) -> list:
    results: list = [None] * number

    def work(i: int) -> None:
        results[i] = call(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return results


def test_concurrent_requests_are_searched_together_and_everyone_gets_their_own() -> None:
    retriever = Recording(seconds=0.1)
    with serving(retriever) as url:
        found = at_once(20, lambda i: post(url, {"queries": [f"q{i}", f"r{i}"], "topk": 1})[1]["result"])
    titles = [[row[0]["contents"].split('"')[1] for row in rows] for rows in found]
    assert titles == [[f"q{i}", f"r{i}"] for i in range(20)]
    assert len(retriever.batches) < 10


def test_requests_with_different_topk_never_share_a_batch() -> None:
    retriever = Recording(seconds=0.05)
    with serving(retriever) as url:
        found = at_once(12, lambda i: post(url, {"queries": ["q"], "topk": 1 + i % 3})[1]["result"])
    assert [len(rows[0]) for rows in found] == [1 + i % 3 for i in range(12)]


def test_a_request_that_fails_does_not_fail_those_beside_it() -> None:
    with serving(Recording(seconds=0.1)) as url:
        texts = ["a", "b", "poison", "c", "d", "e"]
        answers = at_once(6, lambda i: post(url, {"queries": [texts[i]]}))
    assert [status for status, _ in answers] == [200, 200, 500, 200, 200, 200]
    assert answers[2][1]["detail"] == "the index is damaged"


def test_more_than_may_wait_is_refused() -> None:
    with serving(Recording(seconds=0.3), ServerConfig(port=0, max_waiting=2)) as url:
        statuses = [status for status, _ in at_once(12, lambda _: post(url, {"queries": ["a"]}))]
    assert set(statuses) == {200, 503}


def test_a_search_that_takes_too_long_is_answered_in_time() -> None:
    with serving(Recording(seconds=1.0), ServerConfig(port=0, timeout_s=0.2)) as url:
        start = time.monotonic()
        assert post(url, {"queries": ["a"]})[0] == 504
        assert time.monotonic() - start < 0.8


def test_metrics_count_requests_and_batches(bm25_url: str) -> None:
    post(bm25_url, {"queries": ["a", "b"]})
    post(bm25_url, b"no")
    status, page = get(bm25_url, "/metrics")
    assert status == 200
    for line in (
        b'at2po_retrieve_requests_total{status="200"} 1.0',
        b'at2po_retrieve_requests_total{status="422"} 1.0',
        b"at2po_retrieve_queries_total 2.0",
        b"at2po_search_batch_queries_count 1.0",
        b"at2po_waiting_queries 0.0",
    ):
        assert line in page


def start_server(folder: Path, port: int) -> subprocess.Popen:
    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        corpus.write_text("".join(CORPUS_LINE.format(i) for i in range(50)))
    code = (
        "import sys, time\n"
        "from at2po_env.retrieval import open_retriever\n"
        "from at2po_env.retrieval.server.app import ServerConfig\n"
        "from at2po_env.retrieval.server.running import serve\n"
        "class Slow:\n"
        "    def __init__(self, inner): self.inner, self.digest = inner, inner.digest\n"
        "    def search(self, queries, topk):\n"
        "        time.sleep(0.5 * ('slow' in queries))\n"
        "        return self.inner.search(queries, topk)\n"
        "serve(Slow(open_retriever('bm25', sys.argv[1])), ServerConfig(port=int(sys.argv[2])))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code, corpus, str(port)], env=environment)


def wait_until_up(url: str) -> None:
    for _ in range(400):
        try:
            if get(url, "/health")[0] == 200:
                return
        except OSError:
            time.sleep(0.05)
    raise AssertionError("the server did not come up")


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.mark.slow
def test_a_stop_answers_what_was_taken(tmp_path: Path, free_port: int) -> None:
    url, server = f"http://127.0.0.1:{free_port}", start_server(tmp_path, free_port)
    try:
        wait_until_up(url)
        answers, client = list[int](), HttpRetriever(url=url, retries=0)
        threads = [
            threading.Thread(target=lambda: answers.append(len(client.search(["slow", "number7"], 1))))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        time.sleep(0.25)
        server.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(20)
        assert answers == [2] * 8
        server.wait(10)
        with pytest.raises(OSError, match="refused"):
            get(url, "/health")
    finally:
        server.kill()
        server.wait()


@pytest.mark.slow
def test_nothing_is_lost_when_the_server_is_killed_and_comes_back_after_five_seconds(
    tmp_path: Path, free_port: int
) -> None:
    url, server = f"http://127.0.0.1:{free_port}", start_server(tmp_path, free_port)
    found: list[list[tuple[int, str]]] = [[] for _ in range(4)]
    try:
        wait_until_up(url)
        client, killed = HttpRetriever(url=url), threading.Event()

        def run(first: int) -> None:
            after = 0
            while after < 20:  # some searches before the kill, one or more during the outage, some after it
                number = (first + 4 * len(found[first])) % 50
                found[first].append((number, client.search([f"number{number}"], 1)[0][0].id))
                after += killed.is_set()

        threads = [threading.Thread(target=run, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        server.kill()
        server.wait()
        killed.set()
        time.sleep(5)
        server = start_server(tmp_path, free_port)
        for thread in threads:
            thread.join(40)
            assert not thread.is_alive()
    finally:
        server.kill()
        server.wait()
    assert all(len(mine) > 20 for mine in found)
    assert all(int(passage) == number for mine in found for number, passage in mine)
