"""Question files in FlashRAG form: JSON lines `{id, question, golden_answers: [str], metadata}`.

Opening a file checks every line and keeps ids and positions; the questions themselves are read when they
are asked for.
"""

import os
import threading
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, overload

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StringConstraints

from at2po_env.data.jsonl import bad_line, open_lines, parse_line, read_lines, require_regular
from at2po_env.data.progress import ProgressBar
from at2po_env.data.tasks import Task, TaskList, TaskSource
from at2po_env.errors import DataError

CACHED_TASKS = 1 << 14
_FORM = '{"id": "...", "question": "...", "golden_answers": ["..."], "metadata": {}}'

_Text = Annotated[str, StringConstraints(strict=True, min_length=1, pattern=r"\S")]


class QaRow(BaseModel):
    """One line of a question file; keys beyond the four are kept as metadata."""

    model_config = ConfigDict(extra="allow", title=_FORM)

    id: _Text | StrictInt
    question: _Text
    golden_answers: Annotated[list[_Text], Field(min_length=1)]
    metadata: dict[str, Any] | None = None

    def task(self) -> Task:
        """Return the row as a task."""
        metadata = {**(self.model_extra or {}), **(self.metadata or {})}
        return Task(
            id=str(self.id),
            question=self.question,
            golden_answers=tuple(self.golden_answers),
            metadata=metadata,
        )


class QaFile(Sequence[Task]):
    """The questions of one file, in file order; immutable and thread safe."""

    def __init__(self, path: str | Path) -> None:
        """Read and check the whole file once; memory grows with the number of rows, not their size.

        Raises:
            DataError: unreadable or empty file, bad line, or an id that occurs twice.
        """
        self.path = Path(path)
        self._starts = array("Q", [0])
        self._index: dict[str, int] = {}
        with ProgressBar(f"Reading {self.path.name}", open_lines(self.path, kind="question file")) as advance:
            for number, line in read_lines(self.path, kind="question file"):
                row = parse_line(QaRow, line, self.path, number)
                first = self._index.setdefault(str(row.id), number - 1)
                if first != number - 1:
                    what = f"the id {row.id!r} occurs already in line {first + 1}"
                    raise bad_line(self.path, number, what, "give every question its own id")
                self._starts.append(self._starts[-1] + len(line))
                advance(len(line))
        self._fd = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._fd)
        self._tasks: dict[int, Task] = {}

    def __len__(self) -> int:
        return len(self._index)

    def __iter__(self) -> Iterator[Task]:
        return (self[index] for index in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Task: ...

    @overload
    def __getitem__(self, index: slice) -> "Sequence[Task]": ...

    def __getitem__(self, index: int | slice) -> "Task | Sequence[Task]":
        """Return the task in row `index` (negative: from the end), or the tasks of a slice."""
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        row = index + len(self) if index < 0 else index
        if not 0 <= row < len(self):
            raise IndexError(f"{self.path} has {len(self)} questions, there is no number {index}")
        task = self._tasks.get(row)
        if task is None:
            start, end = self._starts[row], self._starts[row + 1]
            # A positioned read is safe in threads.
            task = parse_line(QaRow, os.pread(self._fd, end - start, start), self.path, row + 1).task()
            if len(self._tasks) >= CACHED_TASKS:
                self._tasks.clear()
            self._tasks[row] = task
        return task

    def by_id(self, task_id: str) -> Task:
        """Return the task with this id.

        Raises:
            DataError: the file has no such question.
        """
        if task_id not in self._index:
            known = ", ".join(map(repr, list(self._index)[:3]))
            raise DataError(
                f"{self.path}: no question has the id {task_id!r}. Its {len(self)} ids are {known}, ..."
            )
        return self[self._index[task_id]]


_open_files: dict[tuple[str, int, int], QaFile] = {}
_open_lock = threading.Lock()


def load_qa(path: str | Path) -> QaFile:
    """Open a FlashRAG question file; a file that has not changed is read once per process and shared.

    Args:
        path: JSON lines of `{"id", "question", "golden_answers", "metadata"}`.

    Returns:
        The questions as a sequence of tasks with `by_id`.

    Raises:
        DataError: names the file, the line and the fix.
    """
    path = Path(path)
    try:
        require_regular(path, kind="question file")
        stat = path.stat()
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}. Fix: give the path of a FlashRAG question file (.jsonl)."
        ) from error
    key = (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    with _open_lock:
        if key not in _open_files:
            _open_files[key] = QaFile(path)
        return _open_files[key]


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
    found = []
    for position, value in enumerate(tasks):
        if isinstance(value, Task):
            found.append(value)
            continue
        if not isinstance(value, Mapping):
            raise DataError(f"task {position}: expected a Task or a dict, got {type(value).__name__}")
        unknown = [key for key in value if key not in _KEYS]
        if unknown:
            raise DataError(f"task {position}: unknown key {unknown[0]!r}. Expected {', '.join(_KEYS)}")
        question, golds = value.get("question"), value.get("golden_answers", ())
        if not isinstance(question, str):
            raise DataError(f"task {position}: expected a question (str), got {question!r}")
        golds = (golds,) if isinstance(golds, str | int | float) else golds
        answers, metadata = tuple(str(gold) for gold in golds), value.get("metadata") or {}
        found.append(Task(str(value.get("id", position)), question, answers, metadata))
    return TaskList(found)
