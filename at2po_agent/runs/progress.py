"""What a long job tells whoever watches it: a protocol of five calls, and a listener that does nothing.

The trainer, the evaluation and the cold start know only this protocol. Drawing bars and tables is the
business of `at2po_agent.report` and the command line.
"""

from collections.abc import Mapping
from typing import Protocol


class Progress(Protocol):
    """Listener of a long job; phases do not nest, except that evaluation may run inside training."""

    def start(self, phase: str, total: int) -> None:
        """A phase begins: `phase` is "cold start", "evaluate", "train" ...; `total` counts its units."""

    def advance(self, phase: str, amount: int = 1, **values: float) -> None:
        """`amount` units of `phase` are done; `values` are the numbers worth showing beside the bar."""

    def finish(self, phase: str) -> None:
        """The phase is over."""

    def step(self, record: Mapping[str, object]) -> None:
        """One training step ended; `record` is the line that went to metrics.jsonl."""

    def message(self, text: str) -> None:
        """One line that a person should read."""


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
