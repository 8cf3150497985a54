"""Python code in a child process with limits.

What holds, on POSIX: own process group, killed as a whole on time-out and at the end of every call; limits on
CPU time, memory, file size and open files, set before the code starts and not raisable by an ordinary user;
an empty environment and a temporary working directory that is removed; output cut while it is read, so that a
flood never fills our memory.

What does **not** hold: this is no security boundary. The code runs as the same user, sees the file system and
can reach the network wherever the machine can; run as root it can raise its limits, and a process that leaves
the group (`setsid`) outlives it. For code of unknown origin put the whole program into a container without
network.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import IO, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from at2po_env.errors import ConfigError, ToolError
from at2po_env.tools.base import Tool, ToolContext

# The limits are set by the child itself before it runs the code: `preexec_fn` is not safe in a process with
# threads.
_CHILD = """
import resource, sys
cpu, memory, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
for name, value in (("CPU", cpu), ("AS", memory), ("FSIZE", 1 << 20), ("NOFILE", 64), ("CORE", 0)):
    limit = getattr(resource, "RLIMIT_" + name)
    hard = resource.getrlimit(limit)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    try:
        resource.setrlimit(limit, (value, value))
    except (ValueError, OSError):  # macOS refuses RLIMIT_AS
        pass
with open(path, "rb") as file:
    code = file.read()
sys.argv = ["code.py"]
exec(compile(code, "code.py", "exec"), {"__name__": "__main__"})
"""

_POLL_S = 0.05


class PythonArguments(BaseModel):
    """Arguments of a run."""

    model_config = ConfigDict(extra="forbid")

    code: str = Field(description="a complete program; what it prints is shown")


class Run(NamedTuple):
    """What a program did: its output (stdout and stderr together), whether that was cut, and how it ended."""

    output: str
    cut: bool
    timed_out: bool
    status: int


class PythonTool(Tool):
    """Runs a Python program and shows what it prints; every call starts a fresh process.

    A program that fails (exception, limit, time-out) is a failed call whose text holds the end of its output.

    Args:
        timeout_s: Seconds of wall-clock time; the process group is killed then.
        memory_mb: Limit of the address space.
        max_output: Characters of output that are kept.

    Raises:
        ConfigError: Limits out of range, or a system without process groups (Windows).
    """

    failures: ClassVar[tuple[type[Exception], ...]] = (ToolError, OSError)

    name = "python"
    description = "Run a Python program (standard library) and get what it prints."
    Arguments = PythonArguments

    def __init__(self, *, timeout_s: float = 5.0, memory_mb: int = 512, max_output: int = 4000) -> None:
        if os.name != "posix":
            raise ConfigError("the python tool needs process groups and resource limits: a POSIX system")
        if timeout_s <= 0 or memory_mb < 64 or max_output < 1:
            raise ConfigError(
                f"python tool: timeout_s > 0, memory_mb >= 64 and max_output >= 1, "
                f"got {timeout_s}, {memory_mb} and {max_output}"
            )
        self.run_timeout_s = timeout_s  # not `timeout_s`: the process is killed here, no thread is needed
        self.memory_mb = memory_mb
        self.max_output = max_output

    def run(self, arguments: PythonArguments, context: ToolContext) -> str:
        """Run the program to its end or its limits."""
        del context
        done = run_python(
            arguments.code, timeout_s=self.run_timeout_s, memory_mb=self.memory_mb, max_output=self.max_output
        )
        output = done.output.rstrip() + ("\n[output cut]" if done.cut else "")
        if done.timed_out:
            raise ToolError(f"timed out after {self.run_timeout_s:g} s\n{output}"[:400].rstrip())
        if done.status != 0 and not done.cut:
            how = f"signal {-done.status}" if done.status < 0 else f"exit status {done.status}"
            raise ToolError(f"{how}\n{output[-400:]}".rstrip())
        return output or "[no output]"


def run_python(code: str, *, timeout_s: float, memory_mb: int, max_output: int) -> Run:
    """Run a program in a process group of its own, which is gone when this returns."""
    with tempfile.TemporaryDirectory(prefix="at2po-python-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "code.py"
        path.write_bytes(textwrap.dedent(code).encode("utf-8", "replace"))
        command = [sys.executable, "-P", "-s", "-S", "-c", _CHILD]
        with subprocess.Popen(
            [*command, str(int(timeout_s) + 1), str(memory_mb << 20), str(path)],
            cwd=folder,
            env={"LANG": "C.UTF-8", "HOME": folder, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process:
            try:
                assert process.stdout is not None
                deadline = time.monotonic() + timeout_s
                raw = _read(process, process.stdout, limit=max_output * 4 + 1, deadline=deadline)
                flooded = len(raw) > max_output * 4
                timed_out = not flooded and not _exits(process, deadline)
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
    text = raw.decode("utf-8", "replace")
    return Run(text[:max_output], len(text) > max_output, timed_out, status)


def _read(process: subprocess.Popen[bytes], stream: IO[bytes], *, limit: int, deadline: float) -> bytes:
    """Read until the end, the limit, the deadline, or until the program is gone and nothing is left."""
    parts: list[bytes] = []
    size = 0
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while size < limit and time.monotonic() < deadline:
            gone = process.poll() is not None
            if not selector.select(0.0 if gone else min(_POLL_S, max(deadline - time.monotonic(), 0.0))):
                if gone:  # a process it left behind holds the pipe open
                    break
                continue
            part = os.read(stream.fileno(), min(65536, limit - size))
            if not part:
                break
            parts.append(part)
            size += len(part)
    return b"".join(parts)


def _exits(process: subprocess.Popen[bytes], deadline: float) -> bool:
    """Whether the program ends in time; it may have closed its output and gone on."""
    try:
        process.wait(max(deadline - time.monotonic(), 0.0))
    except subprocess.TimeoutExpired:
        return False
    return True
