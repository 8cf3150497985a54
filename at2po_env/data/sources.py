"""Tasks from whatever a user has: a source, a list, dicts, a FlashRAG file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from at2po_env.data.qa import load_qa
from at2po_env.data.tasks import Task, TaskList, TaskSource
from at2po_env.errors import DataError

Tasks = TaskSource | Iterable[Task | Mapping[str, Any]] | str | Path | Callable[[], TaskSource]

_KEYS = ("id", "question", "golden_answers", "metadata")


def as_tasks(tasks: Tasks) -> TaskSource:
    """Make a source of tasks.

    Args:
        tasks: A `TaskSource`, which is returned as it is; the path of a FlashRAG file; a function that
            returns a source; or tasks and dicts `{"question", "golden_answers", "id", "metadata"}`, of
            which only the question is required (ids default to the position, a single answer may be a
            string).

    Raises:
        DataError: No tasks, or one that is none, with its position.
    """
    if isinstance(tasks, str | Path):
        return load_qa(tasks)
    if isinstance(tasks, TaskSource) and not isinstance(tasks, type):
        return tasks
    if callable(tasks):
        return as_tasks(tasks())
    return TaskList([_task(value, position) for position, value in enumerate(tasks)])


def _task(value: object, position: int) -> Task:
    if isinstance(value, Task):
        return value
    if not isinstance(value, Mapping):
        raise DataError(f"task {position}: expected a Task or a dict, got {type(value).__name__}")
    unknown = [key for key in value if key not in _KEYS]
    if unknown:
        raise DataError(f"task {position}: unknown key {unknown[0]!r}. Expected {', '.join(_KEYS)}")
    question, golds = value.get("question"), value.get("golden_answers", ())
    if not isinstance(question, str):
        raise DataError(f"task {position}: expected a question (str), got {question!r}")
    if isinstance(golds, str | int | float):
        golds = (golds,)
    return Task(
        id=str(value.get("id", position)),
        question=question,
        golden_answers=tuple(str(gold) for gold in golds),
        metadata=value.get("metadata") or {},
    )
