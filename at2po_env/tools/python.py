"""Runs Python code in a child process with limits.

On POSIX the program has a process group of its own, killed as a whole on time-out and at the end of every
call; limits on CPU time, memory, file size and open files, set before the code starts and not raisable by an
ordinary user; an empty environment; and a temporary working directory that is removed. Of its output only the
beginning and the end are kept while it is read, so that a flood never fills our memory.

This is **no** security boundary. The code runs as the same user, sees the file system and
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
from typing import IO, ClassVar

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
_END_CHARS = 400
MAX_READ = 16 << 20


class PythonArguments(BaseModel):
    """Arguments of a run."""

    model_config = ConfigDict(extra="forbid")

    code: str = Field(description="a complete program; what it prints is shown")


class PythonTool(Tool):
    """Runs a Python program and shows what it prints; every call starts a fresh process.

    A program that fails (exception, limit, time-out, flood of output) is a failed call; its text has the end
    of the output, where a traceback says why.

    Args:
        timeout_s: Seconds of wall-clock time; the process group is killed then.
        memory_mb: Limit of the address space.
        max_output: Characters of output that are shown.

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
        """Run the program in a process group of its own, which is gone when this returns."""
        del context
        failure = ""
        with tempfile.TemporaryDirectory(prefix="at2po-python-", ignore_cleanup_errors=True) as folder:
            path = Path(folder) / "code.py"
            path.write_bytes(textwrap.dedent(arguments.code).encode("utf-8", "replace"))
            limits = [str(int(self.run_timeout_s) + 1), str(self.memory_mb << 20)]
            with subprocess.Popen(
                [sys.executable, "-P", "-s", "-S", "-c", _CHILD, *limits, str(path)],
                cwd=folder,
                env={"LANG": "C.UTF-8", "HOME": folder, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            ) as process:
                try:
                    assert process.stdout is not None
                    deadline = time.monotonic() + self.run_timeout_s
                    keep = self.max_output * 4 + 1  # a character has at most four bytes
                    head, end, size = _read(process, process.stdout, keep=keep, deadline=deadline)
                    if size >= MAX_READ:
                        failure = f"stopped after {MAX_READ >> 20} MiB of output"
                    else:  # it may have closed its output and gone on
                        process.wait(max(deadline - time.monotonic(), 0.0))
                except subprocess.TimeoutExpired:
                    failure = f"timed out after {self.run_timeout_s:g} s"
                finally:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.killpg(process.pid, signal.SIGKILL)
                status = process.wait()
        output = head.decode("utf-8", "replace")
        if len(output) > self.max_output:
            output = output[: self.max_output].rstrip() + "\n[output cut]"
        output = output.rstrip()
        if failure:
            raise ToolError(f"{failure}\n{output}"[:_END_CHARS].rstrip())
        if status != 0:
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            ending = end.decode("utf-8", "replace").rstrip()[-_END_CHARS:]
            raise ToolError(f"{how}\n{ending}".rstrip())
        return output or "[no output]"


def _read(
    process: subprocess.Popen[bytes], stream: IO[bytes], *, keep: int, deadline: float
) -> tuple[bytes, bytes, int]:
    """Read until the end, `MAX_READ`, the deadline, or until the program is gone and nothing is left.

    Returns:
        The first `keep` bytes, the last bytes, and how many were read.
    """
    head, end, size = bytearray(), b"", 0
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while size < MAX_READ and time.monotonic() < deadline:
            gone = process.poll() is not None
            if not selector.select(0.0 if gone else min(_POLL_S, max(deadline - time.monotonic(), 0.0))):
                if gone:  # a process it left behind holds the pipe open
                    break
                continue
            part = os.read(stream.fileno(), 65536)
            if not part:
                break
            head += part[: keep - len(head)]
            end = (end + part)[-4 * _END_CHARS :]
            size += len(part)
    return bytes(head), end, size
