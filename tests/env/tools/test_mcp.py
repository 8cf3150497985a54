"""MCP servers as tools: real servers over pipes and HTTP, forks by replay, and servers that misbehave."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mcp", reason="needs the extra mcp")

import uvicorn
from helpers import mcp_hostile, mcp_server

from at2po_env import ToolEnv, fork, restore, snapshot
from at2po_env.contract.testing import EnvContract
from at2po_env.data.tasks import Task
from at2po_env.errors import ConfigError, ToolError
from at2po_env.forking.snapshots import Snapshot
from at2po_env.retrieval.counters import counted
from at2po_env.tools import ToolContext, ToolResult, call_tool
from at2po_env.tools.mcp import McpServer

COMMAND = [sys.executable, mcp_server.__file__]
TASKS = [{"question": "How much?", "golden_answers": ["3"]}]


def call(server: McpServer, name: str, state: Any = None, **arguments: Any) -> ToolResult:
    (found,) = server.tools([name])
    result = call_tool(found, arguments, ToolContext(Task("t", "q", ("a",)), state))
    return result


def env_of(server: McpServer, **options: Any) -> ToolEnv:
    tools = server.tools(["add", "total", "fail", "clock"])
    return ToolEnv(tasks=TASKS, tools=tools, protocol="hermes", max_turns=20, **options)


def act(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def is_gone(pid: int, within_s: float = 5.0) -> bool:
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        with suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.02)
    return False


def children() -> set[int]:
    found = set()
    for tasks in Path("/proc/self/task").iterdir():
        with suppress(OSError):
            found |= {int(pid) for pid in (tasks / "children").read_text().split()}
    return found


@contextmanager
def served_over_http() -> Iterator[str]:
    app = mcp_server.make_server().streamable_http_app()
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/mcp"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served_over_http() as address:
        yield address


@pytest.fixture(scope="module")
def over_http(url: str) -> Iterator[McpServer]:
    with McpServer(url=url) as server:
        yield server


@pytest.fixture(scope="module")
def over_pipes() -> Iterator[McpServer]:
    with McpServer(COMMAND, start_s=60) as server:
        yield server


@pytest.fixture
def hostile() -> Iterator[Callable[..., McpServer]]:
    made: list[McpServer] = []

    def make(mode: str, **options: Any) -> McpServer:
        server = McpServer([sys.executable, "-S", mcp_hostile.__file__, mode], **options)
        made.append(server)
        return server

    yield make
    for server in made:
        server.close()


def test_a_tool_keeps_the_servers_schema_in_our_form(over_http: McpServer) -> None:
    env = env_of(over_http)
    add = next(schema["function"] for schema in env.tool_schemas if schema["function"]["name"] == "add")
    assert add["description"] == "Add to the total."
    assert add["parameters"]["properties"] == {"amount": {"type": "integer"}}
    assert add["parameters"]["required"] == ["amount"]
    wrong = call(over_http, "add", total=1)
    assert (wrong.text, wrong.ok) == (
        "wrong arguments for add: amount: Field required; total: Extra inputs are not permitted",
        False,
    )


@pytest.mark.parametrize("how", ["over_http", "over_pipes"])
def test_forks_of_an_episode_have_sessions_of_their_own(how: str, request: pytest.FixtureRequest) -> None:
    env = env_of(request.getfixturevalue(how))
    env.reset(seed=1)
    assert "total 3" in env.step(act("add", amount="3"))[0]
    child = fork(env)
    assert "total 5" in env.step(act("add", amount=2))[0]
    assert "total 10" in child.step(act("add", amount=7))[0]
    assert "total 5" in env.step(act("total"))[0]
    assert "total 10" in child.step(act("total"))[0]


def test_read_only_calls_and_failed_ones_leave_the_right_record(over_http: McpServer) -> None:
    env = env_of(over_http)
    env.reset(seed=1)
    env.step(act("total"))
    assert env.get_state().tool_states == {}  # type: ignore[union-attr]
    observation, _, _, _, info = env.step(act("fail"))
    assert "this never works" in observation or info["outcome"] == "tool_error"
    record = env.get_state().tool_states["mcp"]  # type: ignore[union-attr]
    assert [entry[:2] for entry in record] == [("fail", "{}")]
    env.step(act("add", amount="many"))
    assert env.get_state().tool_states["mcp"] == record  # type: ignore[union-attr]


def test_a_snapshot_continues_in_a_process_that_never_saw_the_session(url: str) -> None:
    with McpServer(url=url) as first, McpServer(url=url) as second:
        env, other = env_of(first), env_of(second)
        env.reset(seed=1)
        env.step(act("add", amount=3))
        restore(other, Snapshot.from_json(snapshot(env).to_json()))
        assert "total 4" in other.step(act("add", amount=1))[0]
        assert "total 4" in env.step(act("add", amount=1))[0]
        assert snapshot(env).digest == snapshot(other).digest


def test_a_replay_with_another_result_is_said(over_http: McpServer) -> None:
    env = env_of(over_http)
    env.reset(seed=1)
    env.step(act("clock"))
    child = fork(env)
    assert "total 1" in env.step(act("add", amount=1))[0]
    observation, _, terminated, _, info = child.step(act("add", amount=1))
    assert info["outcome"] == "tool_error"
    assert "call 1 of 1 (clock) gave another result" in observation
    assert not terminated


def test_a_stateless_server_is_called_again_without_replay(url: str) -> None:
    with McpServer(url=url, stateless=True) as server:
        env = env_of(server)
        env.reset(seed=1)
        env.step(act("clock"))
        child = fork(env)
        # One session answers both, as declared: the negative of the test above.
        assert "total 1" in env.step(act("add", amount=1))[0]
        assert "total 2" in child.step(act("add", amount=1))[0]
        assert env.get_state().tool_states == {}  # type: ignore[union-attr]


def test_annotations_can_be_distrusted(url: str) -> None:
    with McpServer(url=url, stateless=False) as server:
        assert len(call(server, "total").state) == 1


def test_other_content_than_text_is_named(over_http: McpServer) -> None:
    assert call(over_http, "picture").text == "a dot\n[image: image/png, 6 bytes]"


def test_more_forks_than_sessions_replay_in_turn(url: str) -> None:
    with McpServer(url=url, max_sessions=2) as server:
        env = env_of(server)
        env.reset(seed=1)
        env.step(act("add", amount=1))
        twins = [fork(env) for _ in range(5)]
        for round_ in range(2):
            for number, twin in enumerate(twins):
                seen = twin.step(act("add", amount=number))[0]
                assert f"total {1 + number * (round_ + 1)}" in seen


def test_calls_from_many_threads_do_not_mix(url: str) -> None:
    with McpServer(url=url, max_sessions=3) as server:
        seen: dict[int, str] = {}

        def play(number: int) -> None:
            state = None
            for _ in range(4):
                result = call(server, "add", state, amount=number)
                state = result.state
            seen[number] = result.text

        threads = [threading.Thread(target=play, args=(number,)) for number in range(1, 9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == {number: f"total {4 * number}" for number in range(1, 9)}


class TestContract(EnvContract):
    actions = (act("add", amount=3), act("total"), act("fail"), "<answer>3</answer>")

    @pytest.fixture(autouse=True)
    def _address(self, url: str) -> Iterator[None]:
        self.server = McpServer(url=url)
        yield
        self.server.close()

    def make_env(self) -> ToolEnv:
        return env_of(self.server)


def test_a_late_answer_ends_the_call_and_the_next_one_replays(url: str) -> None:
    with McpServer(url=url, timeout_s=2.0) as server:
        state = call(server, "add", amount=2).state
        start = time.monotonic()
        late = call(server, "sleep", state, seconds=60)
        assert time.monotonic() - start < 10
        assert not late.ok
        assert "did not answer within 2 s" in late.text
        assert call(server, "add", state, amount=1).text == "total 3"


def test_a_server_that_dies_is_a_failed_call_and_starts_again(over_pipes: McpServer) -> None:
    before = counted().get("tool_failures", 0)
    died = call(over_pipes, "die")
    assert not died.ok
    assert counted()["tool_failures"] == before + 1  # as a service, for `health`
    assert "I am dying" in died.text
    assert call(over_pipes, "add", amount=1).text == "total 1"


def test_a_server_process_that_was_killed_and_comes_back_is_replayed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    @contextmanager
    def running() -> Iterator[None]:
        with subprocess.Popen([*COMMAND, str(port)], stderr=subprocess.DEVNULL) as process:
            until = time.monotonic() + 60
            while time.monotonic() < until:
                with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.05)
            yield
            process.kill()

    with McpServer(url=f"http://127.0.0.1:{port}/mcp", timeout_s=5, start_s=10) as server:
        with running():
            (add,) = server.tools(["add"])
            context = ToolContext(Task("t", "q", ("a",)))
            state = call_tool(add, {"amount": 3}, context).state
        context = ToolContext(Task("t", "q", ("a",)), state)
        assert not call_tool(add, {"amount": 1}, context).ok
        with running():
            assert call_tool(add, {"amount": 1}, context).text == "total 4"


def test_the_process_ends_with_the_last_environment(over_pipes: McpServer) -> None:
    env = env_of(over_pipes)
    pid = int(call(over_pipes, "pid").text)
    child = fork(env)
    env.close()
    assert not is_gone(pid, within_s=0.3)  # the fork may still call it
    child.close()
    assert is_gone(pid)
    # Closing is not the end of the server: it starts again when it is needed
    assert call(over_pipes, "add", amount=1).text == "total 1"


@pytest.mark.parametrize("mode", ["hang", "flood_line", "flood_messages", "flood_errors"])
def test_hangs_and_floods_end_at_the_deadline_or_before(mode: str, hostile: Any) -> None:
    server = hostile(mode, timeout_s=2.0, max_bytes=2 << 20)
    (echo,) = server.tools()
    start = time.monotonic()
    result = call(server, "echo", text="a")
    assert time.monotonic() - start < 10
    assert not result.ok
    assert ("did not answer" if mode == "hang" else "too much") in result.text
    assert echo.name == "echo"


def test_a_flood_over_http_is_cut_off_and_the_session_replaced(url: str) -> None:
    with McpServer(url=url, max_bytes=1 << 20, timeout_s=20) as server:
        state = call(server, "add", amount=2).state
        start = time.monotonic()
        flooded = call(server, "flood", state, megabytes=8)
        assert time.monotonic() - start < 10
        assert not flooded.ok
        assert "sent too much" in flooded.text
        assert call(server, "add", state, amount=1).text == "total 3"


@pytest.mark.parametrize("mode", ["content_is_text", "unknown_block", "no_object"])
def test_results_of_a_wrong_type_are_failed_calls(mode: str, hostile: Any) -> None:
    result = call(hostile(mode, timeout_s=5), "echo", text="a")
    assert not result.ok
    assert "the MCP server" in result.text


def test_a_refusal_of_arguments_is_a_failed_call_in_the_servers_words(hostile: Any) -> None:
    result = call(hostile("refusal"), "echo", text="a")
    assert (result.text, result.ok) == ("not these arguments", False)


@pytest.mark.parametrize("mode", ["garbage", "odd_schema", "normal", "modern"])
def test_stray_lines_odd_schemas_and_new_handshakes_do_no_harm(mode: str, hostile: Any) -> None:
    server = hostile(mode)
    more = {"undeclared": 1} if mode == "odd_schema" else {"text": "a"}
    ToolEnv(tasks=TASKS, tools=server.tools())
    assert call(server, "echo", **more).ok


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("silent", "did not start within 1 s"),
        ("endless_list", "more than 512 tools"),
        ("schema_is_text", "inputSchema: Input should be"),
        ("schema_of_array", "inputSchema.type: Input should be 'object'"),
        ("properties_are_text", "inputSchema.properties: Input should be"),
        ("huge_schema", "more than 65,536 characters"),
    ],
)
def test_a_server_that_cannot_be_used_is_one_clear_error(mode: str, message: str, hostile: Any) -> None:
    with pytest.raises(ToolError, match=message):
        hostile(mode, start_s=1.0 if mode == "silent" else 20).tools()


def test_what_a_server_leaves_behind_is_killed(hostile: Any) -> None:
    before = children()
    server = hostile("stubborn")
    server.tools()
    (pid,) = children() - before
    group = [int(line) for line in subprocess.check_output(["pgrep", "-g", str(pid)]).split()]
    assert len(group) == 2
    server.close()
    assert all(is_gone(member) for member in group)


def test_no_process_outlives_the_interpreter() -> None:
    program = f"""
import sys
from at2po_env.tools.mcp import McpServer
server = McpServer([sys.executable, "-S", {mcp_hostile.__file__!r}, "stubborn"])
server.tools()
from pathlib import Path
print(*[(task / "children").read_text().strip() for task in Path("/proc/self/task").iterdir()])
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (pid,) = done.stdout.split()
    assert is_gone(int(pid))


def test_a_command_that_does_not_exist_is_one_clear_error() -> None:
    with McpServer(["no-such-program-at2po"]) as server, pytest.raises(ToolError, match="cannot be started"):
        server.tools()
    with McpServer(url="http://127.0.0.1:9/mcp") as server, pytest.raises(ToolError, match="the MCP server"):
        server.tools()


def test_wrong_arguments_of_the_server_are_refused(over_http: McpServer) -> None:
    for options in ({}, {"command": "text"}, {"command": []}, {"url": "http://a", "timeout_s": 0}):
        with pytest.raises(ConfigError):
            McpServer(**options)  # type: ignore[arg-type]
    with pytest.raises(ToolError, match="has no tool nothing; its tools: add"):
        over_http.tools(["nothing"])
    with McpServer(url="http://x") as other:
        other.tools = lambda: over_http.tools(prefix="b_")  # type: ignore[method-assign,assignment]
        twice = [*over_http.tools(), *other.tools()]
        ToolEnv(tasks=TASKS, tools=twice)  # two prefixes of one server are one backend


@pytest.mark.parametrize("state", ["text", [["a"]], [["a", "{}", 1]], [["a", "[]", "x"]], 7])
def test_a_damaged_record_is_a_failed_call(state: Any, over_http: McpServer) -> None:
    result = call(over_http, "total", state)
    assert not result.ok
    assert "record of MCP calls is damaged" in result.text


def test_a_server_gets_the_folder_the_variables_and_the_headers_that_were_given(
    url: str, tmp_path: Path
) -> None:
    def surroundings(word: str, **options: Any) -> Any:
        with McpServer(start_s=60, **options) as server:
            return json.loads(call(server, "surroundings", word=word).text)

    given = surroundings("AT2PO_WORD", command=COMMAND, env={"AT2PO_WORD": "swordfish"}, cwd=tmp_path)
    assert given == {"folder": str(tmp_path), "variable": "swordfish", "header": None}
    plain = surroundings("AT2PO_WORD", command=COMMAND)
    assert plain == {"folder": os.getcwd(), "variable": None, "header": None}
    assert surroundings("x-word", url=url, headers={"x-word": "swordfish"})["header"] == "swordfish"
    assert surroundings("x-word", url=url)["header"] is None
