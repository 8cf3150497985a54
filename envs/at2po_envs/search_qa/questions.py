"""Questions as the benchmarks put them: stripped, with a question mark."""

from __future__ import annotations

from at2po_env.data import Task, TaskSource


def normalize_question(question: str) -> str:
    """Strip, and append "?" if it is missing."""
    question = question.strip()
    return question if question.endswith("?") else question + "?"


class Questions:
    """A source of tasks whose questions are normalised."""

    def __init__(self, source: TaskSource) -> None:
        self.source = source

    def __len__(self) -> int:
        """Number of tasks."""
        return len(self.source)

    def __getitem__(self, index: int) -> Task:
        """The task at `index`."""
        return _normalized(self.source[index])

    def by_id(self, task_id: str) -> Task:
        """The task with this id."""
        return _normalized(self.source.by_id(task_id))


def _normalized(task: Task) -> Task:
    question = task.question
    if question[-1:] == "?" and not question[0].isspace():
        return task
    return task._replace(question=normalize_question(question))
