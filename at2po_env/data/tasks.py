"""Tasks, which are what episodes are about, and their sources."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, overload, runtime_checkable

from at2po_env.errors import DataError
from at2po_env.forking.frozen import EMPTY


class Task(NamedTuple):
    """One question with the answers that count as right.

    `metadata` is shared by every episode about this task: treat it as read-only.
    """

    id: str
    question: str
    golden_answers: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = EMPTY


@runtime_checkable
class TaskSource(Protocol):
    """Anything with a length that hands out tasks by index and by id; may be procedural."""

    def __len__(self) -> int:
        """Number of tasks."""
        ...

    def __getitem__(self, index: int, /) -> Task:
        """The task at `index`, 0 <= index < len."""
        ...

    def by_id(self, task_id: str) -> Task:
        """The task with that id; a `DataError` when there is none."""
        ...


class TaskList(Sequence[Task]):
    """Tasks in memory, found by index or by id.

    Args:
        tasks: The tasks, in order; ids must be unique and at least one must be given.
        name: What to call the list in error messages, usually the path of the file.

    Raises:
        DataError: If the list is empty or an id occurs twice.

    Example:
        >>> tasks = TaskList([Task("q1", "Who?", ("Ada",))])
        >>> len(tasks), tasks.by_id("q1").golden_answers
        (1, ('Ada',))
    """

    def __init__(self, tasks: Iterable[Task], *, name: str = "tasks") -> None:
        self.name = name
        self._tasks = tuple(tasks)
        if not self._tasks:
            raise DataError(f"{name}: no tasks. Expected at least one")
        self._index: dict[str, int] = {}
        for position, task in enumerate(self._tasks):
            if self._index.setdefault(task.id, position) != position:
                raise DataError(f"{name}: task id {task.id!r} occurs twice. Expected unique ids")

    @overload
    def __getitem__(self, index: int, /) -> Task: ...

    @overload
    def __getitem__(self, index: slice, /) -> tuple[Task, ...]: ...

    def __getitem__(self, index: int | slice, /) -> Task | tuple[Task, ...]:
        return self._tasks[index]

    def __len__(self) -> int:
        return len(self._tasks)

    def by_id(self, task_id: str) -> Task:
        """Return the task with that id, or raise a `DataError` that shows what ids look like here."""
        position = self._index.get(task_id)
        if position is None:
            known = ", ".join(repr(task.id) for task in self._tasks[:3])
            raise DataError(
                f"{self.name}: no task with id {task_id!r}. It has {len(self)} tasks: {known}, ..."
            )
        return self._tasks[position]

    def __repr__(self) -> str:
        return f"TaskList({self.name!r}, {len(self)} tasks)"
