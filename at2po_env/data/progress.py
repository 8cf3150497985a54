"""A progress bar on standard error for work that turns out to take longer than two seconds."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

Advance = Callable[[int], None]
PATIENCE_S = 2.0


class _LateBar:
    """Counts at once, shows itself only after `PATIENCE_S`."""

    def __init__(self, description: str, total: int | None, *, unit: str, done: int = 0) -> None:
        self._description, self._total, self._unit, self._done = description, total, unit, done
        self._start = time.monotonic()
        self._bar: Progress | None = None

    def advance(self, amount: int) -> None:
        self._done += amount
        if self._bar is None:
            if time.monotonic() - self._start < PATIENCE_S:
                return
            self._bar = _bar(self._unit)
            self._bar.add_task(self._description, total=self._total)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=self._done)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _bar(unit: str) -> "Progress":
    # Imported here because rich costs more to import than most work under two seconds.
    from rich import progress
    from rich.console import Console

    amount: list[progress.ProgressColumn] = [progress.MofNCompleteColumn(), progress.TextColumn(unit)]
    if unit == "bytes":
        amount = [progress.DownloadColumn(), progress.TransferSpeedColumn()]
    left = progress.TimeRemainingColumn()
    text = progress.TextColumn("{task.description}")
    return progress.Progress(
        text, progress.BarColumn(), *amount, left, console=Console(stderr=True), transient=True
    )


@contextmanager
def progress_bar(
    description: str, total: int | None, *, unit: str = "bytes", done: int = 0
) -> Iterator[Advance]:
    """Yield a function that takes the amount just done.

    Args:
        description: What is going on, shown before the bar.
        total: The amount at which it is finished; `None` when unknown.
        unit: "bytes" (shown with speed) or any word.
        done: What was done before this call.
    """
    bar = _LateBar(description, total, unit=unit, done=done)
    try:
        yield bar.advance
    finally:
        bar.close()
