"""Tests the python and the shell tool, with a boundary where there is one and without."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from at2po_env import ToolEnv, check_env, fork, restore, snapshot
from at2po_env.data.tasks import Task
from at2po_env.errors import ConfigError
from at2po_env.forking import Snapshot, freeze
from at2po_env.tools import PythonTool, ShellTool, ToolContext, ToolResult, call_tool
from at2po_env.tools.programs import ProgramTool
from at2po_env.tools.sandbox import why_no_bubblewrap

WHY_NOT = why_no_bubblewrap()
BOTH = ["none", pytest.param("bubblewrap", marks=pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "-"))]


@pytest.fixture(params=BOTH)
def kind(request: pytest.FixtureRequest) -> Any:
    """Give the boundary: none, and bubblewrap where it works."""
    return request.param


def call(tool: ProgramTool, text: str, state: Any = None) -> ToolResult:
    argument = "command" if tool.name == "shell" else "code"
    return call_tool(tool, {argument: text}, ToolContext(Task("t", "q?", ("a",)), state))


def run(code: str, kind: Any, state: Any = None, **options: Any) -> ToolResult:
    return call(PythonTool(sandbox=kind, **{"timeout_s": 20.0, **options}), code, state)


def shell(command: str, state: Any = None, kind: Any = "none", **options: Any) -> ToolResult:
    return call(ShellTool(sandbox=kind, **{"timeout_s": 20.0, **options}), command, state)


def test_python_shows_what_a_program_prints(kind: Any) -> None:
    assert run("  import math\n  print(math.comb(5, 2))\n  print('é')", kind) == ToolResult("10\né")
    assert run("x = 1", kind).text == "[no output]"
    assert run("import sys; print(sys.argv, input() if 0 else '')", kind).text == "['code.py']"


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("raise SystemExit(3)", "exit status 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "signal 9"),
        ("x = bytearray(10 ** 9)", "MemoryError"),
        ("def", "SyntaxError"),
        ("\x00", "null bytes"),
        ("\ud800 = 1", "SyntaxError"),
        ("open('f', 'wb').write(b'x' * (2 << 20))", "File too large"),
    ],
)
def test_a_failing_program_is_a_failed_call(kind: Any, code: str, text: str) -> None:
    result = run(code, kind)
    assert not result.ok
    assert text in result.text


def test_a_flood_of_output_is_cut_and_stopped(kind: Any) -> None:
    start = time.monotonic()
    result = run("while True: print('x' * 1000)", kind, max_output=50)
    assert not result.ok
    shown = "x" * 50 + "\n[output cut]"
    assert result.text == f"python failed: stopped after 16 MiB of output\n{shown}"
    assert time.monotonic() - start < 20


def test_long_output_of_a_program_that_ends_well_is_cut(kind: Any) -> None:
    assert run("print('x' * 1000)", kind, max_output=50) == ToolResult("x" * 50 + "\n[output cut]")


@pytest.mark.parametrize(
    ("end", "reason"),
    [("1 / 0", "ZeroDivisionError: division by zero"), ("raise SystemExit(3)", "exit status 3")],
)
def test_a_failure_after_long_output_is_a_failed_call(kind: Any, end: str, reason: str) -> None:
    for size in (5_000, 500_000):
        result = run(f"print('x' * {size}, flush=True); {end}", kind)
        assert not result.ok
        assert reason in result.text
        assert result.text.startswith("python failed: exit status ")


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(600)",
        "import os, time; os.close(1); os.close(2); time.sleep(600)",
    ],
)
def test_a_program_out_of_time_is_killed(kind: Any, code: str) -> None:
    start = time.monotonic()
    result = run(code, kind, timeout_s=0.3)
    assert time.monotonic() - start < 10
    assert not result.ok
    assert "timed out after 0.3 s" in result.text


def test_what_a_program_leaves_behind_is_killed() -> None:
    child = "[sys.executable, '-c', 'import time; time.sleep(600)']"
    code = f"import subprocess, sys\nprint(subprocess.Popen({child}).pid)"
    pid = int(run(code, "none").text)  # in bubblewrap: see test_sandbox.py
    limit = time.monotonic() + 10
    while time.monotonic() < limit and _running(pid):
        time.sleep(0.02)
    assert not _running(pid)


def _running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_program_sees_neither_our_environment_nor_our_folder(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AT2PO_SECRET", "1")
    shown = run(
        "import os; print(os.environ.get('AT2PO_SECRET'), os.getcwd(), os.listdir())", kind
    ).text.split(" ", 2)
    assert shown[0] == "None"
    assert shown[1] != os.getcwd()
    assert shown[2] == "[]"
    assert not os.path.exists(shown[1])


def test_files_last_as_long_as_the_episode(kind: Any) -> None:
    first = shell(
        "printf 'é\\n' > text; printf '\\377' > bytes; mkdir -p a/b c; mkfifo pipe\n"
        "echo 'echo ran' > a/run; chmod +x a/run; ln -s ../text a/link",
        kind=kind,
    )
    assert first == ToolResult(
        "[no output]",
        freeze(
            {
                "a/b": {"folder": True},
                "a/link": {"link": "../text"},
                "a/run": {"text": "echo ran\n", "run": True},
                "bytes": {"base64": "/w=="},
                "c": {"folder": True},
                "text": {"text": "é\n"},
            }
        ),
    )
    again = shell("cat a/link; ./a/run; od -An -tx1 bytes; find . | sort | tr '\\n' ' '", first.state, kind)
    shown = "é\nran\n ff\n. ./a ./a/b ./a/link ./a/run ./bytes ./c ./text"
    assert again == ToolResult(shown)  # its state is UNCHANGED


def test_a_failed_call_keeps_its_files_and_a_stopped_one_does_not(kind: Any) -> None:
    failed = shell("echo 1 > a; exit 3", kind=kind)
    assert failed == ToolResult("shell failed: exit status 3", freeze({"a": {"text": "1\n"}}), ok=False)
    stopped = shell("echo 2 > a; sleep 600", failed.state, kind, timeout_s=1.0)
    assert not stopped.ok
    assert "timed out" in stopped.text
    assert shell("cat a", failed.state, kind) == ToolResult("1")


def test_programs_import_what_they_wrote(kind: Any) -> None:
    tool = PythonTool(sandbox=kind, timeout_s=20.0)
    state = call(tool, "open('mine.py', 'w').write('x = 7')").state
    assert call(tool, "import mine, __main__\nprint(mine.x, __main__.mine.x, __name__)", state) == ToolResult(
        "7 7 __main__"
    )


@pytest.mark.parametrize(
    "files",
    [
        {"../a": {"text": ""}},
        {"/a": {"text": ""}},
        {"a//b": {"text": ""}},
        {"a": {"link": "/tmp"}, "a/b": {"text": ""}},
        {"a": {"text": ""}, "a/b": {"text": ""}},
        {"a\0": {"text": ""}},
        {"a": {"text": "", "mode": 7}},
        {"a": {"text": 1}},
        {"a": {"base64": "?"}},
        {"a": {"text": "x" * (2 << 20)}},
        {"a": 1},
        {"/".join("a" * 99): {"folder": True}},
        {str(number): {"text": ""} for number in range(65)},
        {"\ud800": {"text": ""}},
        [1],
        "a",
    ],
)
def test_files_of_a_hostile_snapshot_are_refused(files: Any) -> None:
    result = shell("echo ran", freeze(files), kind="none")
    assert not result.ok
    assert "the files of the episode cannot be written" in result.text


def test_forks_of_an_episode_have_their_own_files(kind: Any) -> None:
    def make() -> ToolEnv:
        tools = [ShellTool(sandbox=kind, timeout_s=20.0)]
        return ToolEnv(tasks=[{"question": "q", "golden_answers": ["a"]}], tools=tools, max_turns=9)

    def step(env: ToolEnv, command: str) -> str:
        return env.step(f"<shell>{command}</shell>")[0]

    env = make()
    _, info = env.reset(seed=1)
    assert info["tools"]["shell"]["sandbox"] == kind
    step(env, "echo one > a")
    text = snapshot(env).to_json()
    child = fork(env)
    step(env, "echo two > a")
    assert "one" in step(child, "cat a")
    assert "two" in step(env, "cat a")
    other = make()
    restore(other, Snapshot.from_json(text))
    assert "one" in step(other, "cat a")
    digests = {snapshot(one).digest for one in (child, other)}
    assert len(digests) == 1


def test_both_tools_work_in_one_folder() -> None:
    tools = [ShellTool(sandbox="none", timeout_s=20.0), PythonTool(sandbox="none", timeout_s=20.0)]
    env = ToolEnv(tasks=[{"question": "q", "golden_answers": ["a"]}], tools=tools)
    env.reset(seed=1)
    env.step("<shell>echo one > a</shell>")
    assert "ONE" in env.step("<python>print(open('a').read().upper())</python>")[0]
    state = env.get_state()
    assert state is not None
    assert state.tool_states == {"files": {"a": {"text": "one\n"}}}


def test_an_environment_with_files_keeps_the_contract() -> None:
    kind: Any = "none" if WHY_NOT else "bubblewrap"
    env = ToolEnv(
        tasks=[{"question": "q", "golden_answers": ["a"]}],
        tools=[ShellTool(sandbox=kind, timeout_s=20.0)],
        max_turns=3,
    )
    write, read = "<shell>date +x >> a; wc -l a</shell>", "<answer>a</answer>"
    check_env(env, actions=[write, read])


def test_options_out_of_range_are_refused() -> None:
    wrong: Any
    for wrong in (
        {"sandbox": "docker"},
        {"timeout_s": 0},
        {"max_files": 501},
        {"max_bytes": -1},
        {"memory_mb": 1},
    ):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            ShellTool(**{"sandbox": "none", **wrong})


def test_bounds_of_files_follow_the_options() -> None:
    assert shell("echo > a; echo > b", kind="none", max_files=2).ok
    assert "more than 1 files" in shell("echo > a; echo > b", kind="none", max_files=1).text
    assert shell("printf 123 > a", kind="none", max_bytes=3).ok
    assert "more than 4 bytes" in shell("printf 123 > a; printf 45 > b", kind="none", max_bytes=4).text


def test_a_deep_folder_is_removed_without_a_boundary() -> None:
    before = set(os.listdir("/tmp"))
    code = "import os\nfor _ in range(1100):\n    os.mkdir('d'); os.chdir('d')"
    assert "more than 64" in call(PythonTool(sandbox="none", timeout_s=20.0), code).text
    left = [name for name in set(os.listdir("/tmp")) - before if name.startswith("at2po-sandbox-")]
    assert not left
