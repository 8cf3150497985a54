"""Runs Python programs and shell commands in a sandbox, with files that last as long as the episode.

Both tools work in one folder. A call that comes to its end keeps its files, whatever its exit status, and the
next call finds them. A call that was stopped (out of time, of memory, a flood of output) changes nothing; nor
does one whose files are too many or too large, which is an error that says so. Processes never outlive their
call.

See `sandbox.py` for what is a boundary and what is not.
"""

from __future__ import annotations

import textwrap
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from at2po_env.errors import ConfigError, ToolError
from at2po_env.tools.base import UNCHANGED, Backend, Tool, ToolContext, ToolResult
from at2po_env.tools.sandbox import END_CHARS, Choice, Finished, Limits, Sandbox


class PythonArguments(BaseModel):
    """Arguments of a Python program."""

    model_config = ConfigDict(extra="forbid")

    code: str = Field(description="a complete program; what it prints is shown")


class ShellArguments(BaseModel):
    """Arguments of a shell command."""

    model_config = ConfigDict(extra="forbid")

    command: str = Field(description="a command or a script; what it prints is shown")


class Folder(Backend):
    """The folder that the tools of an episode share; it lives in the episode's state and nowhere else."""

    key = "files"

    def attach(self, user: object) -> None:
        """Do nothing: there is nothing to hold."""

    def detach(self, user: object) -> None:
        """Do nothing: there is nothing to release."""


class ProgramTool(Tool):
    """The part that both tools share: options, state, and how a finished call is shown.

    Args:
        sandbox: "bubblewrap": a boundary, or an error where it does not work. "none": a plain subprocess, no
            boundary. "auto": bubblewrap where it works, else none with a warning.
        timeout_s: Seconds of wall-clock time; everything is killed then.
        memory_mb: Limit of a process's address space; in bubblewrap also of all processes' memory together.
        max_output: Characters of output that are shown.
        max_files: Files and folders that the next call finds.
        max_bytes: Bytes of these files in all, and of one file at any time.

    Raises:
        ConfigError: Limits out of range, a sandbox that does not work, or a system without process groups
            (Windows).
    """

    failures: ClassVar[tuple[type[Exception], ...]] = (ToolError, OSError)
    backend = Folder()

    def __init__(
        self,
        *,
        sandbox: Choice = "auto",
        timeout_s: float = 5.0,
        memory_mb: int = 512,
        max_output: int = 4000,
        max_files: int = 64,
        max_bytes: int = 1 << 20,
    ) -> None:
        if timeout_s <= 0 or memory_mb < 64 or max_output < 1:
            raise ConfigError(
                f"{self.name} tool: timeout_s > 0, memory_mb >= 64 and max_output >= 1, "
                f"got {timeout_s}, {memory_mb} and {max_output}"
            )
        if not 0 <= max_files <= 500 or not 0 <= max_bytes <= 16 << 20:
            raise ConfigError(
                f"{self.name} tool: max_files from 0 to 500 and max_bytes from 0 to {16 << 20:,}, "
                f"got {max_files} and {max_bytes}"
            )
        # Not `Tool.timeout_s`: the processes are killed at the deadline, no thread is needed.
        self.sandbox = Sandbox(sandbox, Limits(timeout_s, memory_mb, max_output, max_files, max_bytes))
        self.info = self.sandbox.info

    def show(self, done: Finished, before: Any) -> ToolResult:
        """Return the result of a call: the output with the new files, or why it failed.

        Args:
            done: The call.
            before: The files before it.
        """
        if done.stopped:
            raise ToolError(f"{done.stopped}\n{done.output}"[:END_CHARS].rstrip())
        if done.refusal:
            kept = f"{done.refusal}: this call's files are not kept"
            raise ToolError(f"{kept}\n{done.ending}".rstrip())
        files = UNCHANGED if done.files == (before or {}) else done.files
        if done.status != 0:
            how = f"signal {-done.status}" if done.status < 0 else f"exit status {done.status}"
            return ToolResult(f"{self.name} failed: {how}\n{done.ending}".rstrip(), files, ok=False)
        return ToolResult(done.output or "[no output]", files)


class PythonTool(ProgramTool):
    """Runs a Python program and shows what it prints; every call starts a fresh process.

    The program has the standard library, and imports modules that earlier calls wrote. One that fails is a
    failed call; its text has the end of the output, where a traceback says why. Options: see `ProgramTool`.
    """

    name = "python"
    description = "Run a Python program (standard library) and get what it prints."
    Arguments = PythonArguments

    def run(self, arguments: PythonArguments, context: ToolContext) -> ToolResult:
        """Run the program over the episode's files."""
        return self.show(self.sandbox.run(textwrap.dedent(arguments.code), context.state), context.state)


class ShellTool(ProgramTool):
    """Runs a shell command (bash, else sh) and shows what it prints; every call starts a fresh shell.

    The folder's files last as long as the episode; variables and background processes last one call. An exit
    status other than 0 makes a failed call. Options: see `ProgramTool`.
    """

    name = "shell"
    description = "Run a shell command and get what it prints; files in the folder are kept."
    Arguments = ShellArguments

    def run(self, arguments: ShellArguments, context: ToolContext) -> ToolResult:
        """Run the command over the episode's files."""
        return self.show(self.sandbox.run(arguments.command, context.state, shell=True), context.state)
