"""Runs a benchmark as its command."""

import json
import subprocess
import sys
from typing import Any

from helpers.paths import ROOT


def run_benchmark(name: str, *arguments: str) -> Any:
    """Run `python -m benchmarks.NAME --json` with further arguments, and return what it prints."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
