import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="needs the extra 'serve'")
pytest.importorskip("prometheus_client", reason="needs the extra 'serve'")
pytest.importorskip("uvicorn", reason="needs the extra 'serve'")

from at2po_env.errors import ConfigError, RetrievalError
from at2po_env.retrieval.server.app import ServerConfig
from at2po_env.retrieval.server.running import serve_processes

PROCESSES = 2
# A script of its own, because the processes import it again. Results name the process that found them.
SERVE = """
import os, sys, time
from at2po_env.data.corpus import Passage
from at2po_env.errors import RetrievalError
from at2po_env.retrieval.server.app import ServerConfig
from at2po_env.retrieval.server.running import serve_processes

class Named:
    digest = "d" * 64
    def search(self, queries, topk):
        if "slow" in queries:
            time.sleep(1)
        if "die" in queries:
            os._exit(7)
        return [[Passage("0", str(os.getpid()), query, 1.0)] for query in queries]

def opener():
    if "broken" in sys.argv:
        raise RetrievalError("the index is damaged")
    return Named()

if __name__ == "__main__":
    try:
        serve_processes(opener, ServerConfig(port=int(sys.argv[1]), processes=2, token="t"))
    except RetrievalError as error:
        sys.exit(f"parent: {error}")
"""


class Server:
    def __init__(self, folder: Path, port: int, *arguments: str) -> None:
        script = folder / "serve.py"
        script.write_text(SERVE)
        self.port = port
        self.process = subprocess.Popen(
            [sys.executable, script, str(port), *arguments], stderr=subprocess.PIPE, text=True
        )

    def ask(self, query: str, token: str = "t") -> tuple[int, str]:
        """Ask over a connection of its own; returns the status and the process that answered."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            headers = {"Authorization": f"Bearer {token}"}
            connection.request("POST", "/retrieve", json.dumps({"query": query}), headers)
            response = connection.getresponse()
            answer = json.loads(response.read())
        finally:
            connection.close()
        who = answer["result"][0][0]["contents"].split('"')[1] if response.status == 200 else ""
        return response.status, who

    def page(self) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request("GET", "/metrics", headers={"Authorization": "Bearer t"})
            return connection.getresponse().read().decode()
        finally:
            connection.close()

    def wait_until_all_answer(self) -> set[str]:
        seen: set[str] = set()
        deadline = time.monotonic() + 60
        while len(seen) < PROCESSES:
            assert time.monotonic() < deadline, "the processes did not come up"
            try:
                seen.add(self.ask("hello")[1])
            except OSError:
                time.sleep(0.05)
        return seen


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def make(*arguments: str) -> Server:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = int(listener.getsockname()[1])
        servers.append(Server(tmp_path, port, *arguments))
        return servers[-1]

    yield make
    for server in servers:
        server.process.kill()
        server.process.communicate()


def is_there(pid: str) -> bool:
    return Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text()


@pytest.mark.slow
def test_both_processes_answer_ask_for_the_token_and_are_counted_together(start) -> None:
    server = start()
    server.wait_until_all_answer()
    before = total(server.page())
    statuses = [server.ask("q", token)[0] for token in ["t"] * 12 + ["wrong"] * 3]
    assert statuses == [200] * 12 + [401] * 3
    assert total(server.page()) == (before[0] + 12, before[1] + 3)


def total(page: str) -> tuple[float, float]:
    values = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    name = 'at2po_retrieve_requests_total{{status="{}"}}'
    return float(values.get(name.format(200), 0)), float(values.get(name.format(401), 0))


@pytest.mark.slow
def test_a_stop_answers_what_all_processes_took(start) -> None:
    server = start()
    pids = server.wait_until_all_answer()
    answers: list[tuple[int, str]] = []
    threads = [threading.Thread(target=lambda: answers.append(server.ask("slow"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    server.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(30)
    assert [status for status, _ in answers] == [200] * 8
    assert server.process.wait(20) == 0
    assert not any(map(is_there, pids))


@pytest.mark.slow
def test_a_process_that_dies_ends_the_server_with_an_error(start) -> None:
    server = start()
    pids = server.wait_until_all_answer()
    with pytest.raises(OSError):  # noqa: PT011 - however the connection breaks
        server.ask("die")
    _, said = server.process.communicate(timeout=30)
    assert server.process.returncode == 1
    assert "parent: a server process ended with exit code 7" in said
    assert not any(map(is_there, pids))


@pytest.mark.slow
def test_processes_do_not_outlive_a_parent_that_is_killed(start) -> None:
    server = start()
    pids = server.wait_until_all_answer()
    os.kill(server.process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(map(is_there, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_what_a_process_cannot_open_is_said_once_and_ends_the_server(start) -> None:
    server = start("broken")
    _, said = server.process.communicate(timeout=60)
    assert server.process.returncode == 1
    assert "error: the index is damaged" in said
    assert "Traceback" not in said
    assert "parent: a server process ended with exit code 1" in said


@pytest.mark.slow
def test_a_second_server_on_the_same_port_is_refused(start) -> None:
    server = start()
    server.wait_until_all_answer()
    with pytest.raises(RetrievalError, match=f"cannot listen on 127.0.0.1:{server.port}"):
        serve_processes(pytest.fail, ServerConfig(port=server.port, processes=2))
    assert server.ask("still there")[0] == 200


def test_an_address_in_use_or_open_to_all_is_refused_before_anything_starts() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(RetrievalError, match="cannot listen"),
    ):
        serve_processes(pytest.fail, ServerConfig(port=listener.getsockname()[1], processes=2))
    with pytest.raises(ConfigError, match="--token"):
        serve_processes(pytest.fail, ServerConfig(host="0.0.0.0", processes=2))
