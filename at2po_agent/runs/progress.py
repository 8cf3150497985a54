"""Reports the progress of long jobs: a listener that says nothing, and the clock of a step.

The trainer, the evaluation and the cold start know only `Progress`; `at2po_agent.report` draws bars.
"""

import time
from collections.abc import Mapping


class Progress:
    """Listens to a long job, and says nothing: a listener subclasses it and overrides what it shows.

    Phases do not nest, except that evaluation may run inside training.
    """

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

    def close(self) -> None:
        """Leave the terminal as it was."""


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
