"""Shows the progress of long jobs: bars on a terminal, one plain line every few seconds anywhere else.

Where the output is no terminal (CI, a file) nothing is redrawn, so that logs stay readable.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from at2po_agent.runs.progress import Progress

LINE_EVERY_S = 5.0
SHOWN = {"em": "EM", "metrics/success": "success", "reward": "reward", "entropy": "entropy", "loss": "loss"}


class LiveBars(Progress):
    """One bar per phase, for a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Bars(
            TextColumn("{task.description:<18}"),
            BarColumn(bar_width=28),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("[dim]{task.fields[figures]}"),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._open: dict[str, None] = {}

    def start(self, phase: str, total: int) -> None:
        """Show a bar; a phase that comes again gets its old place."""
        self._bars.start()
        if phase in self._tasks:
            self._bars.reset(self._tasks[phase], total=total, visible=True, figures="")
        else:
            self._tasks[phase] = self._bars.add_task(phase, total=total, figures="")
        self._open[phase] = None

    def advance(self, phase: str, amount: int = 1, **values: float) -> None:
        """Move a bar."""
        if phase not in self._tasks:
            return
        self._bars.advance(self._tasks[phase], amount)
        if values:
            self._bars.update(self._tasks[phase], figures=figures(values))

    def finish(self, phase: str) -> None:
        """Leave a bar as it is, or hide it while another phase is around it."""
        self._open.pop(phase, None)
        if phase in self._tasks:
            self._bars.stop_task(self._tasks[phase])
            self._bars.update(self._tasks[phase], visible=not self._open)

    def step(self, record: Mapping[str, object]) -> None:
        """Show a step's figures beside the outermost bar that is under way."""
        for phase in list(self._open)[:1]:
            self._bars.update(self._tasks[phase], figures=figures(record))

    def message(self, text: str) -> None:
        """Print a line above the bars."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Stop redrawing; the bars stay."""
        self._bars.stop()


class PlainLines(Progress):
    """A line when a phase starts and ends, and one every few seconds in between."""

    def __init__(
        self,
        write: Callable[[str], None],
        *,
        every_s: float = LINE_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write = write
        self._every_s = every_s
        self._clock = clock
        self._done: dict[str, int] = {}
        self._totals: dict[str, int] = {}
        self._started: dict[str, float] = {}
        self._figures: dict[str, str] = {}
        self._last_line = clock()

    def start(self, phase: str, total: int) -> None:
        """Say that a phase begins, unless it is part of another."""
        if not self._started:
            self._line(f"{phase}: 0/{total}")
        self._done[phase], self._totals[phase], self._started[phase] = 0, total, self._clock()

    def advance(self, phase: str, amount: int = 1, **values: float) -> None:
        """Say how far a phase is, if nothing was said for a while."""
        self._done[phase] = self._done.get(phase, 0) + amount
        if values:
            self._figures[phase] = figures(values)
        complete = self._done[phase] >= self._totals.get(phase, 0)  # `finish` will say so
        if not complete and self._clock() - self._last_line >= self._every_s:
            self._line(", ".join(self._status(name) for name in self._started) or self._status(phase))

    def finish(self, phase: str) -> None:
        """Say that a phase is over and how long it took, unless it was a short part of another."""
        took = self._clock() - self._started.pop(phase, self._clock())
        if not self._started or took >= self._every_s:
            self._line(f"{self._status(phase)}  in {duration(took)}")
        self._figures.pop(phase, None)

    def step(self, record: Mapping[str, object]) -> None:
        """Keep a step's figures for the next line of the outermost phase."""
        for phase in list(self._started)[:1]:
            self._figures[phase] = figures(record)

    def message(self, text: str) -> None:
        """Print a line."""
        self._line(text)

    def _status(self, phase: str) -> str:
        status = f"{phase}: {self._done.get(phase, 0)}/{self._totals.get(phase, 0)}"
        return f"{status}  {self._figures[phase]}" if self._figures.get(phase) else status

    def _line(self, text: str) -> None:
        self._last_line = self._clock()
        self._write(text)


def make_listener(console: Console) -> Progress:
    """Choose bars where the console is a terminal, plain lines elsewhere."""
    if console.is_terminal:
        return LiveBars(console)
    return PlainLines(lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True))


def figures(record: Mapping[str, object]) -> str:
    """Write the figures of a record that are worth a glance: EM, reward, entropy, loss."""
    known = ((name, record.get(key)) for key, name in SHOWN.items())
    return "  ".join(f"{name} {value:.3f}" for name, value in known if isinstance(value, float | int))


def duration(seconds: float) -> str:
    """Write seconds as "4.2 s", "3 min 16 s", "2 h 05 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
