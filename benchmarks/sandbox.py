"""Measures a call of the python and the shell tool, with and without bubblewrap.

    python -m benchmarks.sandbox --json

Milliseconds of wall-clock time for one call: `python_none`, `shell_none`; `python_bubblewrap`,
`shell_bubblewrap` and `files_bubblewrap` (64 files of 16 KB go in and come out) where bubblewrap works; and
`interpreter`, the start of Python alone, the part that a warm pool could save beside the sandbox's own start.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from typing import Any

from at2po_env.data.tasks import Task
from at2po_env.forking import freeze
from at2po_env.tools import PythonTool, ShellTool, ToolContext, call_tool
from at2po_env.tools.programs import ProgramTool
from at2po_env.tools.sandbox import why_no_bubblewrap
from benchmarks._timing import Case, command_line, measure, repeat, report


def call(tool: ProgramTool, arguments: dict[str, str], state: Any = None) -> None:
    """Call a tool once; a failure would make the figure wrong."""
    result = call_tool(tool, arguments, ToolContext(Task("t", "q", ("a",)), state))
    assert result.ok, result.text


def main() -> None:
    """Measure and print."""
    options = command_line(__doc__, rounds=15).parse_args()
    missing = why_no_bubblewrap()
    start = [sys.executable, "-P", "-s", "-S", "-c", "pass"]
    cases: dict[str, Case] = {"interpreter": repeat(lambda: subprocess.run(start, check=True), 5)}
    files = freeze({f"file{number}": {"text": "x" * 16_000} for number in range(64)})
    for kind in ("none",) if missing else ("none", "bubblewrap"):
        python = PythonTool(sandbox=kind, timeout_s=60.0, max_bytes=2 << 20)
        shell = ShellTool(sandbox=kind, timeout_s=60.0)
        cases[f"python_{kind}"] = repeat(functools.partial(call, python, {"code": "print(1)"}), 5)
        cases[f"shell_{kind}"] = repeat(functools.partial(call, shell, {"command": "echo 1"}), 5)
        cases[f"files_{kind}"] = repeat(functools.partial(call, python, {"code": "print(1)"}, files), 5)
    timings = measure(cases, rounds=options.rounds)
    result: dict[str, Any] = {f"{name}_ms": timing.median * 1e3 for name, timing in timings.items()}
    result["best_ms"] = {name: round(timing.best * 1e3, 1) for name, timing in timings.items()}
    result["bubblewrap"] = missing or "works"
    report(result, options)


if __name__ == "__main__":
    main()
