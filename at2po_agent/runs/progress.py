"""Reports the progress of long jobs: the protocol of a listener, a silent listener, and the clock of a step.

The trainer, the evaluation and the cold start know only this protocol; `at2po_agent.report` draws bars.
"""

import time
from collections.abc import Mapping
from typing import Protocol


class Progress(Protocol):
    """Listener of a long job; phases do not nest, except that evaluation may run inside training."""

    def start(self, phase: str, total: int) -> None:
        """Hear that a phase begins: "cold start", "evaluate", "train" ...; `total` counts its units."""

    def advance(self, phase: str, amount: int = 1, **values: float) -> None:
        """Hear that `amount` units are done; `values` are the numbers worth showing beside the bar."""

    def finish(self, phase: str) -> None:
        """Hear that the phase is over."""

    def step(self, record: Mapping[str, object]) -> None:
        """Hear that a training step ended; `record` is its line of metrics.jsonl."""

    def message(self, text: str) -> None:
        """Hear a line that a person should read."""


class NoProgress:
    """Listens and says nothing."""

    def start(self, phase: str, total: int) -> None:
        """Ignore the beginning of a phase."""

    def advance(self, phase: str, amount: int = 1, **values: float) -> None:
        """Ignore progress within a phase."""

    def finish(self, phase: str) -> None:
        """Ignore the end of a phase."""

    def step(self, record: Mapping[str, object]) -> None:
        """Ignore a step's record."""

    def message(self, text: str) -> None:
        """Ignore a message."""


class Clock:
    """Measures the seconds of each phase of a step."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Add the time since the last lap to `phase`."""
        now = time.perf_counter()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self._last
        self._last = now
