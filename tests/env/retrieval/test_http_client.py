import contextlib
import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable

import pytest

from at2po_env.data.corpus import Passage
from at2po_env.data.tasks import Task
from at2po_env.episodes.tool_env import ToolEnv
from at2po_env.errors import ConfigError, RetrievalError
from at2po_env.retrieval import client as module
from at2po_env.retrieval.client import CircuitBreaker, HttpRetriever
from at2po_env.retrieval.counters import counted
from at2po_env.retrieval.opening import open_retriever
from at2po_env.tools.base import ToolContext, call_tool
from at2po_env.tools.search import SearchTool

FOUND = {"result": [[{"document": {"id": "7", "contents": '"A title"\nIts text.'}, "score": 1.5}]]}
EXPECTED = [[Passage("7", "A title", "Its text.", 1.5)]]


def answer(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def says(body: bytes, status: str = "200 OK", *headers: str):
    return lambda connection, _request: connection.sendall(answer(body, status, *headers))


GOOD = says(json.dumps(FOUND).encode())


def truncated(connection: socket.socket, _request: bytes) -> None:
    connection.sendall(answer(json.dumps(FOUND).encode())[:-20])


def hangs_up(connection: socket.socket, _request: bytes) -> None:
    connection.close()


def silent(_connection: socket.socket, _request: bytes) -> None:
    time.sleep(30)


def trickles_headers(connection: socket.socket, _request: bytes) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    for number in range(300):
        connection.sendall(f"X-{number}: y\r\n".encode())
        time.sleep(0.1)


def trickles_body(connection: socket.socket, _request: bytes) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 300\r\n\r\n")
    for _ in range(300):
        connection.sendall(b" ")
        time.sleep(0.1)


def client(url: str, **settings: object) -> HttpRetriever:
    return HttpRetriever(url=url, **{"timeout_s": 5.0, "backoff_s": 0.01, **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fault",
    [
        truncated,
        hangs_up,
        says(b"<html>busy</html>"),
        says(b"oops", "500 Internal Server Error"),
        says(b"", "503 Service Unavailable"),
        says(b"{}", "429 Too Many Requests"),
    ],
    ids=["truncated", "hangs_up", "not_json", "500", "503", "429"],
)
def test_a_passing_fault_is_tried_again(fault_server: Callable, fault: Callable) -> None:
    server = fault_server(fault, fault, GOOD)
    before = counted().get("retries", 0)
    assert client(server.url).search(["a"], 3) == EXPECTED
    assert counted()["retries"] - before == 2
    assert len(server.seen) == 3


@pytest.mark.parametrize("fault", [truncated, hangs_up, says(b"not json"), says(b"no", "500 No")])
def test_a_lasting_fault_is_an_error_after_a_bounded_number_of_tries(fault_server: Callable, fault: Callable):
    server = fault_server(fault)
    before = counted().get("failures", 0)
    with pytest.raises(RetrievalError, match=r"3 tries"):
        client(server.url, retries=2).search(["a"], 3)
    assert len(server.seen) == 3
    assert counted()["failures"] - before == 1


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b"null",
        b'{"result": {}}',
        b'{"result": []}',
        b'{"result": [[], []]}',
        b'{"result": [["text"]]}',
        b'{"result": [[{"document": {"id": "0"}, "score": 1}]]}',
        b'{"result": [[{"document": {"contents": "a"}, "score": "high"}]]}',
        b'{"result": [[{"document": {"contents": 3}}]]}',
        *(
            b'{"result": [[{"document": {"contents": "a"}, "score": %b}]]}' % score
            for score in (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 400, b"-" + b"9" * 400)
        ),
    ],
)
def test_an_answer_of_the_wrong_shape_is_an_error_at_once(fault_server: Callable, body: bytes) -> None:
    server = fault_server(says(body))
    with pytest.raises(RetrievalError):
        client(server.url).search(["a"], 3)
    assert len(server.seen) == 1


@pytest.mark.parametrize("status", ["400 Bad", "401 No", "404 Not Found", "413 Large", "422 No", "301 Moved"])
def test_a_refusal_is_an_error_at_once_and_shows_what_the_server_said(fault_server: Callable, status: str):
    server = fault_server(says(b'{"detail": "topk 500, at most 100"}', status))
    with pytest.raises(RetrievalError, match="at most 100"):
        client(server.url).search(["a"], 3)
    assert len(server.seen) == 1


@pytest.mark.parametrize("fault", [silent, trickles_headers, trickles_body])
def test_nothing_takes_longer_than_the_deadline(fault_server: Callable, fault: Callable) -> None:
    server = fault_server(fault)
    start = time.monotonic()
    with pytest.raises(RetrievalError, match="in time"):
        client(server.url, timeout_s=0.6).search(["a"], 3)
    assert 0.3 < time.monotonic() - start < 1.2


@pytest.mark.parametrize("version", ["HTTP/1.0 200 OK", "HTTP/1.1 200 OK\r\nConnection: close"])
@pytest.mark.parametrize("length", [True, False], ids=["length", "until the end"])
def test_a_server_may_close_after_each_answer(fault_server: Callable, version: str, length: bool) -> None:
    def closes(connection: socket.socket, _request: bytes) -> None:
        body = json.dumps(FOUND).encode()
        head = f"{version}\r\n" + (f"Content-Length: {len(body)}\r\n" if length else "") + "\r\n"
        for part in (head.encode(), body[:20], body[20:]):  # arriving one by one
            connection.sendall(part)
            time.sleep(0.02)

    server = fault_server(closes)
    retriever = client(server.url, retries=0)
    assert [retriever.search(["a"], 3) for _ in range(5)] == [EXPECTED] * 5


@pytest.mark.parametrize("size", ["-5", "-0", "x", "f" * 40])
def test_a_wrong_size_of_a_chunk_is_a_retrieval_error(fault_server: Callable, size: str) -> None:
    head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    server = fault_server(lambda connection, _: connection.sendall(f"{head}{size}\r\n[]\r\n".encode()))
    with pytest.raises(RetrievalError):
        client(server.url, retries=1).search(["a"], 3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_opens_connections_of_its_own(fault_server: Callable) -> None:
    def keeps(connection: socket.socket, request: bytes) -> None:
        body = json.dumps(FOUND).encode()
        while request:
            connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            request = server.receive(connection)

    server = fault_server(keeps)
    retriever = client(server.url, retries=0)
    assert retriever.search(["a"], 3) == EXPECTED
    child = os.fork()
    if child == 0:
        os._exit(0 if retriever.search(["a"], 3) == EXPECTED else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert retriever.search(["a"], 3) == EXPECTED
    assert len(server.seen) == 2  # connections: the parent's goes on, the child had another


def test_a_slow_try_is_given_up_and_tried_again(fault_server: Callable) -> None:
    server = fault_server(silent, GOOD)
    assert client(server.url, attempt_s=0.2).search(["a"], 3) == EXPECTED


def test_an_endless_answer_is_not_read(fault_server: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    server = fault_server(says(b" " * 5000))
    retriever = client(server.url)
    monkeypatch.setattr(module, "MAX_ANSWER_BYTES", 4000)
    with pytest.raises(RetrievalError, match="larger than 4000 bytes"):
        retriever.search(["a"], 3)


def test_bare_documents_and_untitled_contents_are_read(fault_server: Callable) -> None:
    server = fault_server(says(b'{"result": [[{"id": 3, "contents": "just text"}]]}'))
    assert client(server.url).search(["a"], 3) == [[Passage("3", "", "just text", 0.0)]]


def test_many_queries_go_out_in_batches_and_come_back_in_order(fault_server: Callable) -> None:
    def echo(connection: socket.socket, request: bytes) -> None:
        queries = json.loads(request.partition(b"\r\n\r\n")[2])["queries"]
        assert len(queries) <= 2
        rows = [[{"document": {"id": q, "contents": f'"{q}"\ntext'}, "score": 1}] for q in queries]
        connection.sendall(answer(json.dumps({"result": rows}).encode()))

    server = fault_server(echo)
    found = client(server.url, batch=2).search(["a", "b", "c"], 3)
    assert [row[0].id for row in found] == ["a", "b", "c"]
    assert len(server.seen) == 2


def test_the_single_form_sends_one_query_a_request(fault_server: Callable) -> None:
    server = fault_server(GOOD)
    assert client(server.url, form="query").search(["a", "b"], 3) == EXPECTED * 2
    bodies = [json.loads(request.partition(b"\r\n\r\n")[2]) for request in server.seen]
    assert bodies == [{"query": q, "topk": 3, "return_scores": True} for q in "ab"]


def test_no_text_makes_a_search_raise(fault_server: Callable) -> None:
    server = fault_server(GOOD)
    for query in ("", "\x00", "\ud800 lone", "é" * 10_000):
        assert client(server.url).search([query], 3) == EXPECTED


def test_a_connection_is_kept_and_replaced_when_the_server_closed_it(fault_server: Callable) -> None:
    body = json.dumps(FOUND).encode()
    kept = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body

    def twice_then_gone(connection: socket.socket, _request: bytes) -> None:
        connection.sendall(kept)
        server.receive(connection)
        connection.sendall(kept)

    server = fault_server(twice_then_gone)
    retriever = client(server.url, retries=0)
    for _ in range(4):
        assert retriever.search(["a"], 3) == EXPECTED
        time.sleep(0.02)  # let the server's close arrive
    assert len(server.seen) == 2  # connections


def test_a_dead_server_is_left_alone_and_tried_again_later() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    retriever = client(url, retries=0, breaker_failures=2, breaker_rest_s=0.3)
    for _ in range(2):
        with pytest.raises(RetrievalError, match="1 tries"):
            retriever.search(["a"], 3)
    before = counted().get("circuit_open", 0)
    with pytest.raises(RetrievalError, match="left alone"):
        retriever.search(["a"], 3)
    assert counted()["circuit_open"] - before == 1
    time.sleep(0.35)
    with pytest.raises(RetrievalError, match="1 tries"):
        retriever.search(["a"], 3)


def test_an_open_circuit_lets_one_call_through_and_closes_when_it_succeeds() -> None:
    breaker = CircuitBreaker(failures=1, rest_s=0.05)
    breaker.record(ok=False)
    assert not breaker.allows()
    time.sleep(0.06)
    assert [breaker.allows(), breaker.allows()] == [True, False]
    breaker.record(ok=True)
    assert [breaker.allows(), breaker.allows()] == [True, True]


def test_a_failing_server_is_an_observation_of_the_search_tool(fault_server: Callable) -> None:
    server = fault_server(says(b"broken", "500 No"))
    tool = SearchTool(client(server.url, retries=1), topk=3)
    result = call_tool(tool, {"query": "a"}, ToolContext(Task("1", "q")))
    assert not result.ok
    assert "status 500: broken" in result.text


def test_an_episode_goes_on_when_the_server_fails_and_uses_it_when_it_is_back(fault_server: Callable) -> None:
    server = fault_server(says(b"broken", "500 No"), GOOD)
    env = ToolEnv(
        tasks=[Task("1", "Who?", ("Ada",))],
        tools=[SearchTool(client(server.url, retries=0), topk=3)],
        reward="boxed",
    )
    env.reset(seed=0)
    search = "<think>look it up</think><search>who</search>"
    observation, reward, terminated, truncated, info = env.step(search)
    assert (info["outcome"], reward, terminated, truncated) == ("tool_error", 0.0, False, False)
    assert "status 500" in observation
    observation, _, _, _, info = env.step(search)
    assert info["outcome"] == "tool"
    assert "Its text." in observation
    info = env.step("<think>known</think><answer>\\boxed{Ada}</answer>")[-1]
    assert info["em"] == 1.0


def test_an_address_opens_a_client_without_a_corpus(fault_server: Callable) -> None:
    server = fault_server(GOOD)
    retriever = open_retriever(server.url)
    assert retriever.search(["a"], 3) == EXPECTED
    assert open_retriever("http", url=server.url) is retriever


@pytest.mark.parametrize(
    "settings",
    [
        {"url": "localhost:8000"},
        {"url": "ftp://a"},
        {"url": "http://a", "form": "x"},
        {"url": "http://a", "batch": 0},
    ],
)
def test_wrong_settings_are_refused(settings: dict) -> None:
    with pytest.raises(ConfigError):
        HttpRetriever(**settings)


def test_concurrent_calls_share_the_pool(fault_server: Callable) -> None:
    server = fault_server(GOOD)
    retriever, found = client(server.url), []
    threads = [
        threading.Thread(target=lambda: found.append(retriever.search(["a"], 3) == EXPECTED))
        for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert found == [True] * 16


def test_https_to_a_server_without_tls_is_an_error_not_a_hang(fault_server: Callable) -> None:
    def plain(connection: socket.socket, _request: bytes) -> None:
        with contextlib.suppress(ssl.SSLError):
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    url = fault_server(plain).url.replace("http:", "https:")
    with pytest.raises(RetrievalError, match="SSL"):
        client(url, retries=0).search(["a"], 3)
