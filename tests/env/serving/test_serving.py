"""Served environments: the same episodes by HTTP as here, forks of sessions, hostile clients."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import gymnasium
import httpx
import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")

from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from at2po_env import ToolEnv, check_env, fork, restore, snapshot
from at2po_env.contract.testing import EnvContract, PigEnv
from at2po_env.errors import ConfigError, EnvError, SnapshotError
from at2po_env.forking.snapshots import Snapshot
from at2po_env.serving import RemoteEnv
from at2po_env.serving.app import EnvServerConfig, create_env_app, make_served_env, serving_env


def sums(**options: Any) -> ToolEnv:
    def add(a: int, b: int) -> int:
        """Add."""
        return a + b

    tasks = [{"question": f"1 + {number}?", "golden_answers": [str(1 + number)]} for number in range(20)]
    return ToolEnv(tasks=tasks, tools=[add], protocol="hermes", **options)


@contextmanager
def served(env: Any = None, **limits: Any) -> Iterator[str]:
    with serving_env(env or PigEnv(), EnvServerConfig(port=0, drain_s=1.0, **limits)) as url:
        yield url


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(opens_per_s=10_000) as address:
        yield address


def post(url: str, path: str, body: Any, **options: Any) -> httpx.Response:
    return httpx.post(f"{url}{path}", json=body, timeout=30, **options)


def test_a_served_episode_is_the_episode(url: str) -> None:
    here, there = PigEnv(), RemoteEnv(url)
    for seed in (1, 2):
        assert there.reset(seed=seed) == here.reset(seed=seed)
        for _ in range(2):
            assert there.step("roll") == here.step("roll")
        # The next episode follows from the generator of the last one, on both sides.
        assert there.reset() == here.reset()
        for action in ("roll", "?", "\ud800", "roll", "hold"):
            assert there.step(action) == here.step(action)
    with pytest.raises(EnvError, match=r"status 400: The game is over"):
        there.step("roll")
    there.close()


class TestContract(EnvContract):
    @pytest.fixture(autouse=True)
    def _address(self, url: str) -> None:
        self.url = url

    def make_env(self) -> Any:
        return gymnasium.make("at2po/Remote-v0", url=self.url)


def test_a_served_tool_environment_passes_the_checks() -> None:
    with served(sums(), opens_per_s=10_000) as url:
        check_env(RemoteEnv(url), process=False)


def test_many_remote_episodes_run_as_a_vector(url: str) -> None:
    many = gymnasium.make_vec("at2po/Remote-v0", num_envs=3, url=url)
    here = PigEnv()
    many.reset(seed=5)
    seen, *_ = many.step(["roll"] * 3)
    for number in range(3):
        here.reset(seed=5 + number)
        assert seen[number] == here.step("roll")[0]
    many.close()


def test_a_snapshot_of_the_server_fits_an_environment_of_this_process(url: str) -> None:
    there = RemoteEnv(url)
    there.reset(seed=3)
    there.step("roll")
    text = there.get_state()
    here = PigEnv()
    restore(here, Snapshot.from_json(text or ""))
    assert here.step("roll") == there.step("roll")
    assert here.step("roll") == there.step("roll")


def test_sessions_of_lost_forks_are_closed_by_the_next_request() -> None:
    with served() as url:
        env = RemoteEnv(url)
        env.reset(seed=1)
        twins = [fork(env) for _ in range(5)]
        assert httpx.get(f"{url}/health").json()["sessions"] == 6
        del twins
        env.step("roll")
        assert httpx.get(f"{url}/health").json()["sessions"] == 1
        env.close()
        assert httpx.get(f"{url}/health").json()["sessions"] == 0
        with pytest.raises(EnvError, match="before the first reset"):
            env.step("roll")


def test_an_idle_session_expires_and_says_so() -> None:
    with served(idle_s=1.0) as url:
        env = RemoteEnv(url)
        env.reset(seed=1)
        saved = snapshot(env)
        time.sleep(2.5)
        with pytest.raises(EnvError, match="status 404: there is no such session"):
            env.step("roll")
        restore(env, saved)
        assert env.step("roll")[0]


def test_the_number_and_the_rate_of_sessions_are_bounded() -> None:
    with served(max_sessions=3, opens_per_s=1000) as url:
        answers = [post(url, "/reset", {}) for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 503]
        assert post(url, "/close", {"sessions": [answers[0].json()["session"], "none"]}).json() == {
            "closed": 1
        }
        assert post(url, "/fork", {"session": answers[1].json()["session"]}).status_code == 200
        assert post(url, "/fork", {"session": answers[1].json()["session"]}).status_code == 503
        with pytest.raises(EnvError, match="all 3 sessions are in use"):
            RemoteEnv(url, timeout_s=2.0).reset()
    with served(opens_per_s=0.5) as url:
        statuses = [post(url, "/reset", {}).status_code for _ in range(20)]
        assert statuses[0] == 200
        assert statuses.count(429) >= 10


def test_a_client_waits_while_the_server_is_full() -> None:
    with served(max_sessions=1) as url:
        first = post(url, "/reset", {}).json()["session"]
        leaves = threading.Timer(0.5, post, (url, "/close", {"sessions": [first]}))
        leaves.start()
        assert RemoteEnv(url, timeout_s=20.0).reset(seed=1)[0]
        leaves.join()


def test_sessions_without_a_seed_differ() -> None:
    with served(sums()) as url:
        seen = {post(url, "/reset", {}).json()["observation"] for _ in range(12)}
        assert len(seen) > 1


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/step", b"{", 422),
        ("/step", b"[1]", 422),
        ("/step", b"[" * 60_000, 422),
        ("/step", b'{"session": "x"}', 422),
        ("/step", b'{"session": "x", "action": 7}', 422),
        ("/step", b'{"session": "none", "action": "a"}', 404),
        ("/reset", b'{"seed": -1}', 422),
        ("/reset", b'{"options": {"task_id": 1}, "more": 1}', 422),
        ("/restore", b'{"snapshot": {}}', 400),
        ("/restore", b'{"snapshot": {"version": 1, "env_id": "os:system", "state": 1, "wrappers": []}}', 400),
        ("/close", b'{"sessions": "x"}', 422),
        ("/nothing", b"{}", 404),
        ("/reset", b" " * 70_000, 413),
    ],
)
def test_a_request_that_does_not_fit_is_refused_and_leaves_no_session(
    path: str, body: bytes, status: int
) -> None:
    with TestClient(create_env_app(PigEnv(), EnvServerConfig(max_body_bytes=65_536))) as client:
        answer = client.post(path, content=body)
        assert answer.status_code == status
        assert path == "/nothing" or answer.json()["detail"]
        assert client.get("/health").json()["sessions"] == 0


@pytest.fixture
def lets_go() -> Iterator[None]:
    """Lets the calls that a test has hung return when it ends."""
    Odd.released.clear()
    yield
    Odd.released.set()


class Odd(PigEnv):
    """Misbehaves on command."""

    released = threading.Event()

    def step(self, action: str) -> Any:
        if action == "fail":
            raise RuntimeError("a bug")
        if action == "exit":
            raise SystemExit(3)
        if action == "nan":
            return "", float("nan"), False, False, {}
        if action == "hang":
            self.released.wait(60)
        return super().step(action)


@pytest.mark.usefixtures("lets_go")
def test_a_failing_environment_costs_its_session_at_most() -> None:
    with served(Odd(), timeout_s=2.0) as url:
        other = RemoteEnv(url)
        other.reset(seed=1)
        for action, message in (
            ("fail", "RuntimeError: a bug"),
            ("exit", "SystemExit: 3"),
            ("nan", "its reward is nan"),
            ("hang", "timed out"),
        ):
            env = RemoteEnv(url)
            env.reset(seed=1)
            with pytest.raises(EnvError, match=message):
                env.step(action)
            assert other.step("roll")[0]
        with pytest.raises(EnvError, match="no such session"):
            env.step("roll")


@pytest.mark.parametrize(("workers", "patience_s", "status"), [(2, 60.0, 200), (1, 0.5, 500)])
def test_as_many_environments_play_at_the_same_time_as_there_are_workers(
    workers: int, patience_s: float, status: int
) -> None:
    meeting = threading.Barrier(2)

    class Meeting(PigEnv):
        def step(self, action: str) -> Any:
            meeting.wait(patience_s)  # for the other session's step; raises where it does not come
            return super().step(action)

    with served(Meeting(), workers=workers) as url, ThreadPoolExecutor(2) as pool:
        sessions = [post(url, "/reset", {"seed": 1}).json()["session"] for _ in range(2)]
        bodies = [{"session": session, "action": "roll"} for session in sessions]
        answers = list(pool.map(lambda body: post(url, "/step", body), bodies))
        assert [answer.status_code for answer in answers] == [status, status]


@pytest.mark.usefixtures("lets_go")
def test_a_busy_session_refuses_a_second_request() -> None:
    closed: list[bool] = []

    class Watched(Odd):
        def close(self) -> None:
            closed.append(True)

    with served(Watched(), timeout_s=3.0) as url:
        closed.clear()
        session = post(url, "/reset", {"seed": 1}).json()["session"]
        body = {"session": session, "action": "hang"}
        late = threading.Thread(target=post, args=(url, "/step", body))
        late.start()
        time.sleep(0.5)
        assert post(url, "/step", {"session": session, "action": "roll"}).status_code == 409
        assert post(url, "/close", {"sessions": [session]}).json() == {"closed": 1}
        assert not closed  # not under the hands of the call that is at work
        late.join()


def test_a_token_is_asked_for_on_every_path() -> None:
    with served(token="right") as url:
        for path in ("/reset", "/step", "/", "/anything"):
            assert post(url, path, {}).status_code == 401
        with pytest.raises(EnvError, match="status 401"):
            RemoteEnv(url, token="wrong").reset()
        assert RemoteEnv(url, token="right").reset(seed=1)[0]
    app = create_env_app(PigEnv(), EnvServerConfig(token="right"))  # type: ignore[arg-type]
    with TestClient(app) as client, pytest.raises(WebSocketDisconnect), client.websocket_connect("/ws"):
        pytest.fail("a connection without the token was taken")


def test_beyond_loopback_a_token_is_needed() -> None:
    with pytest.raises(ConfigError, match="AT2PO_ENV_TOKEN"), served(host="0.0.0.0"):
        pass


def test_a_lying_server_is_one_clear_error() -> None:
    for body in (
        b"",
        b"[]",
        b'{"session": 7}',
        b'{"session": "s", "observation": 1, "info": {}}',
        b"[" * 9999,
    ):
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def lie(listener: socket.socket = listener, body: bytes = body) -> None:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
                    connection.sendall(head.encode() + body)

            thread = threading.Thread(target=lie)
            thread.start()
            with pytest.raises(EnvError, match=r"127\.0\.0\.1"):
                RemoteEnv(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout_s=5).reset(seed=1)
            thread.join()
    with pytest.raises(EnvError, match="/reset: "):
        RemoteEnv("http://127.0.0.1:9", timeout_s=1).reset()
    with pytest.raises(ConfigError, match="no address"):
        RemoteEnv("nonsense")


def test_a_snapshot_from_elsewhere_is_refused(url: str) -> None:
    env = RemoteEnv(url)
    env.reset(seed=1)
    wrong = json.loads(snapshot(env).to_json())
    wrong["state"]["episode"]["env_id"] = "other/Env-v0"
    restore(env, Snapshot.from_json(json.dumps(wrong)))
    with pytest.raises(SnapshotError, match="other/Env-v0"):
        env.step("roll")


def test_metrics_and_the_description_are_shown(url: str) -> None:
    assert httpx.get(url).json()["env_id"].endswith("PigEnv")
    assert not hasattr(RemoteEnv(url), "tasks")  # Pig has none
    with served(sums()) as other:
        assert len(RemoteEnv(other).tasks) == 20
    page = httpx.get(f"{url}/metrics").text
    assert "at2po_env_sessions" in page
    assert 'at2po_env_requests_total{path="/reset",status="200"}' in page


def test_openenv_messages_play_an_episode() -> None:
    here = PigEnv()
    app = create_env_app(PigEnv())
    with TestClient(app) as client:
        with client.websocket_connect("/ws") as socket_:

            def ask(kind: str, **data: Any) -> Any:
                socket_.send_text(json.dumps({"type": kind, "data": data}))
                return json.loads(socket_.receive_text())

            assert ask("step", action="roll")["data"]["code"] == "SESSION_ERROR"
            begun = ask("reset", seed=1)
            assert begun["type"] == "observation"
            assert begun["data"]["observation"]["text"] == here.reset(seed=1)[0]
            for action in ("roll", "hold"):
                text, reward, terminated, truncated, info = here.step(action)
                assert ask("step", action=action)["data"] == {
                    "observation": {
                        "text": text,
                        "info": info,
                        "terminated": terminated,
                        "truncated": truncated,
                    },
                    "reward": reward,
                    "done": terminated or truncated,
                }
            assert ask("state")["data"]["step_count"] == 2
            assert ask("step", action="roll")["data"]["code"] == "EXECUTION_ERROR"
            assert ask("step", action=7)["data"]["code"] == "VALIDATION_ERROR"
            assert ask("reset", seed="x")["data"]["code"] == "VALIDATION_ERROR"
            assert ask("mcp")["data"]["code"] == "UNKNOWN_TYPE"
            socket_.send_text("{")
            assert json.loads(socket_.receive_text())["data"]["code"] == "UNKNOWN_TYPE"
            assert client.get("/health").json()["sessions"] == 1
        until = time.monotonic() + 10  # the server learns a little later that the connection has ended
        while client.get("/health").json()["sessions"] and time.monotonic() < until:
            time.sleep(0.02)
        assert client.get("/health").json()["sessions"] == 0


def test_sessions_of_lost_connections_are_closed() -> None:
    with TestClient(create_env_app(PigEnv())) as client:
        for _ in range(25):
            with client.websocket_connect("/ws") as lost:
                lost.send_text('{"type": "reset"}')
                lost.receive_text()
        until = time.monotonic() + 10
        while client.get("/health").json()["sessions"] and time.monotonic() < until:
            time.sleep(0.02)
        assert client.get("/health").json()["sessions"] == 0


def test_a_connection_that_says_nothing_is_closed() -> None:
    app = create_env_app(PigEnv(), EnvServerConfig(receive_s=0.2))
    with (
        TestClient(app) as client,
        client.websocket_connect("/ws") as silent,
        pytest.raises(WebSocketDisconnect),
    ):
        silent.receive_text()


def test_an_environment_that_cannot_be_served_is_one_clear_error() -> None:
    with pytest.raises(EnvError, match="cannot be made"):
        make_served_env("no/Such-v0")
    with pytest.raises(SnapshotError, match="cannot be forked"):
        create_env_app(gymnasium.make("CartPole-v1"))  # type: ignore[arg-type]
