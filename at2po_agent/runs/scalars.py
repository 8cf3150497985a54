"""Writes scalars for TensorBoard: every number of every record, under its kind.

Events are written by the thread that trains, so that a full disk is an error here and not in some other
thread.
"""

import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from at2po_env.errors import require

_NOT_A_FIGURE = ("kind", "mode", "step")
_FILE_VERSION = "brain.Event:2"


class Scalars:
    """A writer of one event file; close it at the end.

    Args:
        folder: Where the file goes.
        purge_step: Scalars of this step and later, left by an earlier part of the run, are hidden.

    Raises:
        OSError: From any call, when the disk refuses.
        MissingExtraError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, *, purge_step: int) -> None:
        self._events = require("tensorboard.compat.proto.event_pb2", "agent")
        records = require("tensorboard.summary.writer.record_writer", "agent")
        folder.mkdir(parents=True, exist_ok=True)
        stamp = f"{time.time():.6f}.{socket.gethostname()}"
        self._file = (folder / f"events.out.tfevents.{stamp}").open("wb", buffering=0)
        self._records = records.RecordWriter(self._file)
        self._write(file_version=_FILE_VERSION)
        start = self._events.SessionLog(status=self._events.SessionLog.START)
        self._write(step=purge_step, session_log=start)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def add(self, record: Mapping[str, Any]) -> None:
        """Write the numbers of a record of metrics.jsonl."""
        group = "/".join(str(record[key]) for key in ("kind", "mode") if key in record)
        event = self._events.Event(wall_time=time.time(), step=record["step"])
        for name, value in record.items():
            if name not in _NOT_A_FIGURE and isinstance(value, int | float):
                event.summary.value.add(tag=f"{group}/{name}", simple_value=value)
        self._records.write(event.SerializeToString())

    def _write(self, **fields: Any) -> None:
        self._records.write(self._events.Event(wall_time=time.time(), **fields).SerializeToString())
