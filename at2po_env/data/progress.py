"""Shows a progress bar on standard error for work that takes longer than two seconds."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress

Advance = Callable[[int], None]
PATIENCE_S = 2.0


class ProgressBar:
    """A bar that counts from the start and shows itself after `PATIENCE_S`; it is called with what was done.

    Args:
        description: A word or two, shown before the bar.
        total: The amount at which it is finished; `None` when unknown.
        unit: "bytes" (shown with speed) or any word.
    """

    def __init__(self, description: str, total: int | None, *, unit: str = "bytes") -> None:
        self._description, self._total, self._unit, self._done = description, total, unit, 0
        self._start = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, amount: int) -> None:
        """Count `amount` more."""
        self.show(self._done + amount, self._total)

    def show(self, done: int, total: int | None) -> None:
        """Set the count and the amount at which it is finished."""
        self._done, self._total = done, total
        if self._bar is None:
            if time.monotonic() - self._start < PATIENCE_S:
                return
            # Imported here because rich costs more to import than most work under two seconds.
            from rich import progress
            from rich.console import Console

            columns: list[progress.ProgressColumn] = [progress.MofNCompleteColumn()]
            columns.append(progress.TextColumn(self._unit))
            if self._unit == "bytes":
                columns = [progress.DownloadColumn(), progress.TransferSpeedColumn()]
            columns = [progress.TextColumn("{task.description}"), progress.BarColumn(), *columns]
            columns.append(progress.TimeRemainingColumn())
            self._bar = progress.Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.add_task(self._description)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done, total=total)
