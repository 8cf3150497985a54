"""Shows a progress bar on standard error for work that takes longer than two seconds."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

Advance = Callable[[int], None]
PATIENCE_S = 2.0


class LateBar:
    """A bar that counts from the start and shows itself after `PATIENCE_S`.

    Args:
        description: A word or two, shown before the bar.
        total: The amount at which it is finished; `None` when unknown.
        unit: "bytes" (shown with speed) or any word.
    """

    def __init__(self, description: str, total: int | None, *, unit: str = "bytes") -> None:
        self._description, self._total, self._unit, self._done = description, total, unit, 0
        self._start = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> "LateBar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, amount: int) -> None:
        """Count `amount` more."""
        self.show(self._done + amount, self._total)

    def show(self, done: int, total: int | None) -> None:
        """Set the count and the amount at which it is finished."""
        self._done, self._total = done, total
        if self._bar is None:
            if time.monotonic() - self._start < PATIENCE_S:
                return
            self._bar = _bar(self._unit)
            self._bar.add_task(self._description)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done, total=total)


def _bar(unit: str) -> "Progress":
    # Imported here because rich costs more to import than most work under two seconds.
    from rich import progress
    from rich.console import Console

    amount: list[progress.ProgressColumn] = [progress.MofNCompleteColumn(), progress.TextColumn(unit)]
    if unit == "bytes":
        amount = [progress.DownloadColumn(), progress.TransferSpeedColumn()]
    text, bar, left = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TimeRemainingColumn(),
    )
    return progress.Progress(text, bar, *amount, left, console=Console(stderr=True), transient=True)


@contextmanager
def progress_bar(description: str, total: int | None, *, unit: str = "bytes") -> Iterator[Advance]:
    """Yield a function that takes the amount just done."""
    with LateBar(description, total, unit=unit) as bar:
        yield bar.advance
