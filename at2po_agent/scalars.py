"""Scalars for TensorBoard: every number of every record, under its kind."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from at2po_env.errors import require

_NOT_A_FIGURE = ("kind", "mode", "step")


class Scalars:
    """A writer of event files; open it in a `with`.

    Args:
        folder: Where the events go.
        purge_step: Scalars of this step and later, left by an earlier part of the run, are hidden.
    """

    def __init__(self, folder: Path, *, purge_step: int) -> None:
        module = require("torch.utils.tensorboard", "agent")
        self._writer = module.SummaryWriter(str(folder), purge_step=purge_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def add(self, record: Mapping[str, Any]) -> None:
        """Write the numbers of a record of metrics.jsonl."""
        group = "/".join(str(record[key]) for key in ("kind", "mode") if key in record)
        for name, value in record.items():
            if name not in _NOT_A_FIGURE and isinstance(value, int | float):
                self._writer.add_scalar(f"{group}/{name}", value, record["step"])
