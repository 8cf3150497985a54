"""Stops a run on Ctrl-C and SIGTERM at the next safe place; a second signal stops it at once."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from at2po_agent.runs.folder import RunFolder
from at2po_agent.runs.progress import Progress

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingInterrupted(KeyboardInterrupt):
    """The run stopped on a signal; the message says what was saved and how to go on.

    Attributes:
        folder: The run's folder.
        resume_command: The command that goes on with it.
    """

    def __init__(self, message: str, folder: RunFolder) -> None:
        super().__init__(message)
        self.folder = folder.path
        self.resume_command = folder.resume_command


class StopRequested(Exception):
    """Raised where work can be given up without loss."""


class Interrupts:
    """While open, signals set `requested`; outside the main thread signals stay as they are.

    Args:
        folder: The folder of the run that is to stop.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.requested = False
        self._folder = folder
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def check(self) -> None:
        """Give up here if a stop was requested.

        Raises:
            StopRequested: It was.
        """
        if self.requested:
            raise StopRequested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self.requested:
            raise TrainingInterrupted(
                "stopped at once; the checkpoint before this step is the newest. "
                f"Go on with: {self._folder.resume_command}",
                self._folder,
            )
        self.requested = True


class InterruptibleProgress(Progress):
    """Passes all reports on, and stops after progress when a stop was requested.

    Args:
        progress: The listener.
        interrupts: Know whether a stop was requested.
        may_stop: Tells whether this is a moment to stop at; None takes any.
    """

    def __init__(
        self, progress: Progress, interrupts: Interrupts, may_stop: Callable[[], bool] | None = None
    ) -> None:
        self._progress = progress
        self._interrupts = interrupts
        self._may_stop = may_stop
        for name in ("start", "finish", "step", "message"):
            setattr(self, name, getattr(progress, name))

    def advance(self, phase: str, amount: int = 1, **values: float) -> None:
        """Pass on progress, then stop if that was requested."""
        self._progress.advance(phase, amount, **values)
        if self._may_stop is None or self._may_stop():
            self._interrupts.check()
