"""Tests that programs cannot leave their sandbox, and that their files are part of the episode."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from at2po_env.data.tasks import Task
from at2po_env.errors import ConfigError
from at2po_env.forking import freeze
from at2po_env.tools import PythonTool, ShellTool, ToolContext, ToolResult, call_tool, sandbox
from at2po_env.tools.programs import ProgramTool

TASK = Task("t", "q?", ("a",))
WHY_NOT = sandbox.why_no_bubblewrap()
bubblewrap = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "bubblewrap works")
BOTH = [pytest.param("none"), pytest.param("bubblewrap", marks=bubblewrap)]
REPOSITORY = Path(__file__).resolve().parents[3]


def call(tool: ProgramTool, text: str, state: Any = None) -> ToolResult:
    argument = "command" if tool.name == "shell" else "code"
    return call_tool(tool, {argument: text}, ToolContext(TASK, state))


def shell(command: str, state: Any = None, kind: Any = "bubblewrap", **options: Any) -> ToolResult:
    return call(ShellTool(sandbox=kind, **{"timeout_s": 20.0, **options}), command, state)


# Every attack in Python begins with this, and says ESCAPED only if it works. `{host}` is a secret file of the
# host, `{port}` a TCP listener, `{abstract}` and `{unix}` are Unix ones, `{pid}` is our process.
PRELUDE = """
import ctypes, os, platform, signal, socket, subprocess, sys, time
libc = ctypes.CDLL(None, use_errno=True)
arm = platform.machine() == "aarch64"
def attempt(attack, *arguments):
    try:
        found = attack(*arguments)
    except BaseException as error:
        print("held:", type(error).__name__, error)
    else:
        print("ESCAPED", found)
def syscall(x86, arm64, *arguments):
    if libc.syscall(arm64 if arm else x86, *arguments) == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
def write(path, text="1"):
    with open(path, "w") as file:
        file.write(text)
def reach(family, address, kind=socket.SOCK_STREAM):
    with socket.socket(family, kind) as end:
        end.settimeout(3)
        end.connect(address)
        end.send(b"x")
"""

HELD = {
    # files
    "read the password file": ("attempt(lambda: open('/etc/shadow').read())", "No such file"),
    "read a file of the user": ("attempt(lambda: open('{host}').read())", "No such file"),
    "read the repository": ("attempt(os.listdir, '{repository}')", "No such file"),
    "import the project": ("attempt(__import__, 'at2po_env')", "ModuleNotFoundError"),
    "read installed packages": (
        "import sysconfig; packages = sysconfig.get_path('purelib')\n"
        "found = os.listdir(packages) if os.path.isdir(packages) else []\n"
        "print('ESCAPED' if found else 'held: nothing there')",
        "held",
    ),
    "climb out of the folder": ("attempt(lambda: open('../' * 20 + 'etc/shadow').read())", "No such file"),
    "follow a symbolic link": (
        "os.symlink('{host}', 'link'); attempt(lambda: open('link').read())",
        "No such file",
    ),
    "link a program into the folder": ("attempt(os.link, '/usr/bin/env', 'env')", "cross-device"),
    "look through another process's root": ("attempt(lambda: open('/proc/1/root{host}').read())", "held"),
    "write among the programs": ("attempt(write, '/usr/bin/ls')", "Read-only"),
    "write at the root": ("attempt(write, '/new')", "Read-only"),
    "write the list of users": ("attempt(write, '/etc/passwd', 'root::0:0:::')", "held"),
    "write through /proc/self/root": ("attempt(write, '/proc/self/root/usr/new')", "Read-only"),
    # the kernel's files and devices
    "write a setting of the kernel": (
        "attempt(write, '/proc/sys/kernel/core_pattern', '|/sandbox/x')",
        "held",
    ),
    "raise the limit of processes": ("attempt(write, '/proc/sys/kernel/pid_max', '99')", "held"),
    "press the magic key": ("attempt(write, '/proc/sysrq-trigger', 'b')", "held"),
    "write in /sys": ("attempt(write, '/sys/power/state', 'mem')", "No such file"),
    "read the kernel's memory": ("attempt(lambda: open('/proc/kcore', 'rb').read(1))", "held"),
    "open the memory device": ("attempt(lambda: open('/dev/mem', 'rb').read(1))", "No such file"),
    "make a block device": (
        "import stat; attempt(os.mknod, 'disk', 0o600 | stat.S_IFBLK, 0x800)",
        "Operation not permitted",
    ),
    "open the terminal": ("attempt(lambda: open('/dev/tty').fileno())", "No such file"),
    # rights
    "become root": ("attempt(os.setuid, 0)", "held"),
    "run a set-user-id program": (
        "os.system('cp /usr/bin/id own; chmod u+s own; ./own')\n"
        "line = [line for line in open('/proc/self/status') if line.startswith('NoNewPrivs')][0].split()\n"
        "print('held' if line[1] == '1' else 'ESCAPED')",
        "held",
    ),
    "keep capabilities": (
        "lines = [line.split() for line in open('/proc/self/status')]\n"
        "held = [int(line[1], 16) for line in lines if line[0] in ('CapEff:', 'CapPrm:')]\n"
        "print('held' if held == [0, 0] else 'ESCAPED')",
        "held",
    ),
    "raise a limit": (
        "import resource; attempt(resource.setrlimit, resource.RLIMIT_NPROC, (10**6, 10**6))",
        "held",
    ),
    "take a higher priority": ("attempt(os.nice, -10)", "held"),
    "set the clock": ("attempt(time.clock_settime, time.CLOCK_REALTIME, 0)", "Operation not permitted"),
    "set the host name": ("attempt(socket.sethostname, 'mine')", "Operation not permitted"),
    # system calls
    "mount": (
        "attempt(syscall, 165, 40, b'none', b'/sandbox', b'tmpfs', 0, None)",
        "Operation not permitted",
    ),
    "unmount": ("attempt(syscall, 166, 39, b'/usr/bin', 2)", "Operation not permitted"),
    "change the root": ("attempt(os.chroot, '/sandbox')", "Operation not permitted"),
    "pivot the root": ("attempt(syscall, 155, 41, b'/sandbox', b'/sandbox')", "Operation not permitted"),
    "make a user namespace": ("attempt(syscall, 272, 97, 0x10000000)", "Operation not permitted"),
    "clone into a user namespace": (
        "attempt(syscall, 56, 220, 0x10000011, 0, 0, 0, 0)",
        "Operation not permitted",
    ),
    "enter a namespace": (
        "space = os.open('/proc/self/ns/net', 0); attempt(syscall, 308, 268, space, 0)",
        "Operation not permitted",
    ),
    "trace process 1": ("attempt(syscall, 101, 117, 16, 1, 0, 0)", "Operation not permitted"),
    "write the memory of process 1": (
        "attempt(lambda: open('/proc/1/mem', 'r+b').seek(0))",
        "Permission denied",
    ),
    "read another process's memory": (
        "attempt(syscall, 310, 270, 1, None, 0, None, 0, 0)",
        "Operation not permitted",
    ),
    "load a BPF program": ("attempt(syscall, 321, 280, 0, None, 0)", "Operation not permitted"),
    "watch the processor's events": (
        "attempt(syscall, 298, 241, None, 0, -1, -1, 0)",
        "Operation not permitted",
    ),
    "set up io_uring": ("attempt(syscall, 425, 425, 1, None)", "Operation not permitted"),
    "handle page faults": ("attempt(syscall, 323, 282, 0)", "Operation not permitted"),
    "read the keyring": ("attempt(syscall, 250, 219, 0, -3, 1)", "Operation not permitted"),
    "load a module": ("attempt(syscall, 175, 105, None, 0, b'')", "Operation not permitted"),
    "reboot": ("attempt(syscall, 169, 142, 0, 0, 0, None)", "Operation not permitted"),
    # processes
    "kill process 1": ("os.kill(1, 9); os.kill(os.getppid(), 9); time.sleep(0.1); print('held')", "held"),
    "kill our process by its number": ("attempt(os.kill, {pid}, 0)", "No such process"),
    "see other processes": (
        "seen = [name for name in os.listdir('/proc') if name.isdigit()]\n"
        "print('held' if set(seen) <= {{'1', '2'}} else 'ESCAPED', seen)",
        "held",
    ),
    "read our environment": (
        "both = os.popen('cat /proc/self/environ; env').read() + str(dict(os.environ))\n"
        "print('ESCAPED' if 'AT2PO_SECRET' in both else 'held')",
        "held",
    ),
    "find open descriptors": (
        "found = os.listdir('/proc/self/fd'); print('held' if len(found) == 4 else 'ESCAPED', found)",
        "held",  # three and the one that lists
    ),
    # networks
    "reach a server of the host": ("attempt(reach, socket.AF_INET, ('127.0.0.1', {port}))", "refused"),
    "reach an address outside": ("attempt(reach, socket.AF_INET, ('192.0.2.1', 80))", "unreachable"),
    "reach an IPv6 address": ("attempt(reach, socket.AF_INET6, ('2001:db8::1', 80))", "held"),
    "send a datagram": (
        "attempt(reach, socket.AF_INET, ('192.0.2.1', 53), socket.SOCK_DGRAM)",
        "unreachable",
    ),
    "resolve a name": ("attempt(socket.getaddrinfo, 'example.com', 80)", "gaierror"),
    "open a raw socket": ("attempt(socket.socket, socket.AF_INET, socket.SOCK_RAW, 1)", "not permitted"),
    "open a packet socket": ("attempt(socket.socket, 17, socket.SOCK_RAW)", "Address family not supported"),
    "talk to the kernel by netlink": (
        "attempt(socket.socket, 16, socket.SOCK_RAW)",
        "Address family not supported",
    ),
    "reach the machine's host by vsock": ("attempt(socket.socket, 40, 1)", "Address family not supported"),
    "reach an abstract socket": ("attempt(reach, socket.AF_UNIX, '\\0{abstract}')", "refused"),
    "reach a socket in a folder": ("attempt(reach, socket.AF_UNIX, '{unix}')", "No such file"),
    # memory and disks that no process's limit counts
    "keep memory in a memfd": ("attempt(os.memfd_create, 'x')", "Operation not permitted"),
    "keep memory in System V segments": (
        "attempt(syscall, 29, 194, 0, 1 << 30, 0o1600)",
        "Operation not permitted",
    ),
    "make a huge sparse file": (
        "attempt(os.truncate, os.open('f', os.O_CREAT | os.O_WRONLY), 1 << 40)",
        "File too large",
    ),
    "fill the folder": (
        "attempt(lambda: [open(str(i), 'wb').write(bytes(1 << 20)) for i in range(99)])",
        "No space",
    ),
    "fill /tmp": (
        "attempt(lambda: [open(f'/tmp/{{i}}', 'wb').write(bytes(1 << 20)) for i in range(99)])",
        "No space",
    ),
    "fill /dev/shm": (
        "attempt(lambda: [open(f'/dev/shm/{{i}}', 'wb').write(bytes(1 << 20)) for i in range(99)])",
        "No space",
    ),
    "open many files": ("attempt(lambda: [os.open('/', 0) for _ in range(99)])", "Too many open files"),
    "take much memory": ("attempt(bytearray, 10 ** 9)", "MemoryError"),
    "start many processes": (
        "attempt(lambda: [subprocess.Popen(['sleep', '600']) for _ in range(200)])",
        "Resource temporarily unavailable",
    ),
    "start many threads": (
        "import threading\n"
        "start = lambda: threading.Thread(target=time.sleep, args=(1,), daemon=True).start()\n"
        "attempt(lambda: [start() for _ in range(200)])",
        "can't start new thread",
    ),
}
"""Attacks in Python that fail: name -> program, and a part of what it then prints."""

STOPPED = {
    "bomb of forks": ("b() { b | b & b; }; b; sleep 600", "timed out"),
    "bomb of forks that ignore signals": (
        "trap '' TERM HUP INT; for i in 1 2 3 4 5 6 7 8 9; do (while :; do :; done) & done; wait",
        "timed out",
    ),
    "sleep without end": ("sleep 600", "timed out"),
    "stop oneself": ("kill -STOP $$; sleep 600", "timed out"),
    "close the output and go on": ("exec >&- 2>&-; sleep 600", "timed out"),
    "flood of output": (
        "yes 'a long line of output that is never read by anyone at all'",
        "16 MiB of output",
    ),
    "flood of errors": ("yes flood >&2", "16 MiB of output"),
    "much memory in many processes": (
        "code='import time; x = b\"x\" * 50_000_000; time.sleep(600)'\n"
        'for i in 1 2 3 4 5 6 7 8 9; do python3 -c "$code" & done; wait',
        "held more than 256 MB",
    ),
}
"""Commands that would go on: name -> command, and a part of the reason for which they are stopped."""

LEFT = {
    "background process": "sleep 600 & echo started",
    "process in a session of its own": "setsid sleep 600 & echo started",
    "process that closed its output": "setsid sleep 600 >/dev/null 2>&1 </dev/null & echo started",
    "process that ignores signals": "nohup sh -c 'trap \"\" TERM HUP; sleep 600' >/dev/null & echo started",
    "daemon, forked twice": "(setsid sh -c 'sleep 600 & exit' &) ; echo started",
    "every process killed": "echo started; sleep 600 & kill -9 -1",
}
"""Commands that leave something behind or end everything they can."""

REFUSED = {
    "too many files": ("for i in $(seq 100); do echo > $i; done", "more than 64 files"),
    "a bomb of inodes": ("for i in $(seq 5000); do echo > $i; done", "more than 64 files"),
    "too many bytes": ("for i in 1 2 3; do head -c 500000 /dev/zero > $i; done", "more than 1,048,576 bytes"),
    "a deep folder": ("for i in $(seq 300); do mkdir d; cd d; done", "more than 64 files"),
    "a path beyond every bound": (
        "n=$(head -c 200 /dev/zero | tr '\\0' n); for i in $(seq 30); do mkdir $n; cd $n; done",
        "cannot be read (File name too long)",
    ),
    "a name that is not UTF-8": ("touch $(printf 'a\\377')", "is not UTF-8"),
    "a link to a name that is not UTF-8": ("ln -s $(printf 'a\\377') link", "is not UTF-8"),
    "a file nobody may read": ("echo > f; chmod 000 f", "cannot be read (Permission denied)"),
    "a folder nobody may read": ("mkdir d; chmod 000 d", "cannot be read (Permission denied)"),
}
"""Commands that leave files which are not kept: name -> command, and a part of the reason."""


def spaces() -> set[str]:
    """Return the process namespaces of all processes of this machine."""
    found = set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            found.add(os.readlink(f"/proc/{name}/ns/pid"))
        except OSError:
            continue
    return found


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fail if a test leaves a process in a namespace of its own; other runs' sandboxes end by themselves."""
    before = spaces()
    yield
    limit = time.monotonic() + 30
    while spaces() - before and time.monotonic() < limit:
        time.sleep(0.1)
    assert not spaces() - before


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Give the attacks something to reach on the host."""
    monkeypatch.setenv("AT2PO_SECRET", "1")
    secret, place, name = tmp_path / "secret", f"/tmp/at2po-{os.getpid()}.sock", f"at2po-{os.getpid()}"
    secret.write_text("golden answer")
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as unix,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        unix.bind(place)
        unix.listen()
        abstract.bind(f"\0{name}")
        abstract.listen()
        where = {"host": secret, "port": server.getsockname()[1], "abstract": name, "unix": place}
        yield {**where, "pid": os.getpid(), "repository": REPOSITORY}
        os.unlink(place)


@bubblewrap
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("name", HELD)
def test_no_attack_leaves_the_sandbox(name: str, host: dict[str, Any]) -> None:
    attack, how = HELD[name]
    result = call(PythonTool(sandbox="bubblewrap", timeout_s=30.0), PRELUDE + attack.format(**host))
    assert "ESCAPED" not in result.text
    assert "golden answer" not in result.text
    assert "held" in result.text
    assert how in result.text


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="the attacks are written for Linux")
@pytest.mark.parametrize(
    "name",
    [
        *("read a file of the user", "follow a symbolic link", "read the repository", "see other processes"),
        *("reach a server of the host", "reach an abstract socket", "reach a socket in a folder"),
        *("kill our process by its number", "start many processes", "keep memory in a memfd"),
    ],
)
def test_the_same_attacks_work_without_a_boundary(name: str, host: dict[str, Any]) -> None:
    result = call(PythonTool(sandbox="none", timeout_s=30.0), PRELUDE + HELD[name][0].format(**host))
    assert "ESCAPED" in result.text


@bubblewrap
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("name", STOPPED)
def test_bombs_are_stopped(name: str) -> None:
    command, how = STOPPED[name]
    start = time.monotonic()
    memory_mb = 256 if "MB" in how else 2048
    result = shell(command, timeout_s=1.0 if how == "timed out" else 20.0, memory_mb=memory_mb)
    assert not result.ok
    assert how in result.text
    assert time.monotonic() - start < 40


@bubblewrap
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("name", LEFT)
def test_nothing_outlives_its_call(name: str) -> None:
    start = time.monotonic()
    assert "started" in shell(LEFT[name]).text
    assert time.monotonic() - start < 20


@bubblewrap
@pytest.mark.parametrize("name", REFUSED)
def test_files_beyond_the_bounds_are_refused(name: str) -> None:
    command, why = REFUSED[name]
    before = shell("echo 1 > kept").state
    result = shell(command, before)
    assert not result.ok
    assert why in result.text
    assert call(ShellTool(sandbox="bubblewrap"), "cat kept", before) == ToolResult("1")


@bubblewrap
@pytest.mark.usefixtures("nothing_left")
def test_a_caller_that_is_killed_takes_its_sandbox_along() -> None:
    code = (
        "from at2po_env.tools.sandbox import Limits, Sandbox\n"
        "box = Sandbox('bubblewrap', Limits(600, 512, 100, 8, 100))\n"
        "print('ready', flush=True)\n"
        "box.run('sleep 600', shell=True)"
    )
    before = spaces()
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        limit = time.monotonic() + 20
        while not spaces() - before and time.monotonic() < limit:
            time.sleep(0.02)
        time.sleep(0.3)
        assert spaces() - before
        process.send_signal(signal.SIGKILL)


@bubblewrap
@pytest.mark.usefixtures("nothing_left")
def test_calls_in_many_threads_do_not_disturb_each_other() -> None:
    command = "for i in $(seq 30); do sleep 0.3 & done; echo {0} > f; cat f; wait"
    with ThreadPoolExecutor(8) as pool:  # 8 x 30 processes: each call has a limit of 64 of its own
        results = list(pool.map(lambda n: shell(command.format(n), timeout_s=60.0), range(16)))
    expected = [ToolResult(str(n), freeze({"f": {"text": f"{n}\n"}})) for n in range(16)]
    assert results == expected


@bubblewrap
def test_a_forged_report_is_no_file_outside() -> None:
    limits = sandbox.Limits(5.0, 512, 100, 8, 100)
    done = sandbox.Finished("", "", 0)
    assert sandbox._read_report(b"0 - 1 \nfile 1 1\nab", done, limits).files == {"a": {"text": "b"}}
    for report in (
        *(
            b"",
            b"\xff",
            b"0 - x \n",
            b"0 - 1 \nfile 9 1\nab",
            b"0 - 1 \nfile 1 -1\nab",
            b"0 - 9 \n" + b"file 1 0\na" * 9,
        ),
        *(b"0 - 1 \nfile 4 1\n../ab", b"0 - 1 \nfile 2 1\n/ab", b"0 - 1 \nfile 1 200\na" + b"b" * 200),
        b"0 - 2 \nlink 1 4\na/etcfile 3 1\na/bc",
    ):
        forged = sandbox._read_report(report, done, limits)
        assert forged.stopped
        assert forged.files is None


def test_without_bubblewrap_a_warning_says_that_there_is_no_boundary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "why_no_bubblewrap", lambda: "a reason")
    monkeypatch.setattr(sandbox, "_warned", set())
    with pytest.warns(UserWarning, match="no security boundary: a reason"):
        tool = PythonTool()
    assert tool.info == {"sandbox": "none", "seccomp": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PythonTool()  # once is enough
        PythonTool(sandbox="none")
    with pytest.raises(ConfigError, match="does not work here: a reason"):
        ShellTool(sandbox="bubblewrap")
