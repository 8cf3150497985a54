"""Honest timing on a shared machine: cases take turns, and medians are reported with their spread.

A machine that slows down for a second would fall on one case if the cases ran one after the other. Here every
round runs every case once, garbage collection is off while a case runs, and what is reported is the median
over the rounds with the quartiles.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Case(NamedTuple):
    """Something to time.

    Attributes:
        run: Does the work `number` times; is called once per round.
        number: How many operations one call of `run` performs.
        prepare: Called before each `run`, untimed.
    """

    run: Callable[[], Any]
    number: int = 1
    prepare: Callable[[], Any] | None = None


class Timing(NamedTuple):
    """Seconds per operation over the rounds."""

    median: float
    low: float
    high: float
    best: float
    rounds: int

    @property
    def spread(self) -> float:
        """Distance of the quartiles, relative to the median."""
        return (self.high - self.low) / self.median if self.median else 0.0


def measure(
    cases: Mapping[str, Case],
    *,
    rounds: int = 15,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time all cases in turns.

    Args:
        cases: Name -> case.
        rounds: How often each case is run.
        warmup: Further runs before, which do not count.
        clock: Seconds, by the wall clock; `time.thread_time` for work that stays in one thread.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    was_enabled = gc.isenabled()
    try:
        for number in range(warmup + rounds):
            for name, case in cases.items():
                if case.prepare is not None:
                    case.prepare()
                gc.collect()
                gc.disable()
                began = clock()
                case.run()
                passed = clock() - began
                gc.enable()
                if number >= warmup:
                    seconds[name].append(passed / case.number)
    finally:
        (gc.enable if was_enabled else gc.disable)()
    return {name: summarise(values) for name, values in seconds.items()}


def summarise(values: Sequence[float]) -> Timing:
    """Median, quartiles and minimum of some timings."""
    if len(values) < 2:
        return Timing(values[0], values[0], values[0], values[0], len(values))
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, low, high, min(values), len(values))


def repeat(operation: Callable[[], Any], number: int) -> Case:
    """A case that calls one operation many times; the cost of the loop itself (30 ns) is included."""

    def run() -> None:
        for _ in range(number):
            operation()

    return Case(run, number)


def peak_kb() -> int:
    """The peak resident set of this process so far.

    Linux hands `ru_maxrss` down to new processes, so a child of a large process would not see itself grow.
    """
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def command_line(description: str | None, *, rounds: int | None = None) -> argparse.ArgumentParser:
    """A parser of the options that all benchmarks share: --json, and --rounds with its default."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help=f"rounds per case (default {rounds})")
    return parser


def report(result: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Print a result as JSON where `--json` was given, else as aligned lines."""
    if options.json:
        json.dump(result, sys.stdout, indent=2)
        print()
        return
    width = max(len(key) for key in result)
    for key, value in result.items():
        shown = f"{value:,.3f}" if isinstance(value, float) else value
        print(f"{key:<{width}}  {shown}")
