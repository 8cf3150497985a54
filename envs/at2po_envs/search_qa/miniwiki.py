"""Makes the MiniWiki environment: each question is answered from the passages of its own world."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from at2po_env import SearchTool, ToolEnv
from at2po_env.data import Task
from at2po_env.data.miniwiki import MiniWikiTasks, Split, make_world
from at2po_env.errors import ConfigError
from at2po_env.retrieval import Bm25Retriever, Retriever


class WorldSearchTool(SearchTool):
    """Searches the passages of the world that the episode's question is about."""

    def __init__(self, tasks: MiniWikiTasks, *, topk: int) -> None:
        super().__init__(world_retriever(tasks.world(tasks[0]).seed, tasks.split, tasks.namesakes), topk=topk)
        self._split = tasks.split
        self._namesakes = tasks.namesakes

    def retriever_for(self, task: Task) -> Retriever:
        """Return the index of the task's world, built when it is first searched."""
        return world_retriever(int(task.metadata["world"]), self._split, self._namesakes)


@lru_cache(maxsize=512)
def world_retriever(seed: int, split: Split, namesakes: float = 0.0) -> Retriever:
    """Return the index of one world, built once per process."""
    return Bm25Retriever.from_passages(make_world(seed, split, namesakes=namesakes).passages)


_tasks = lru_cache(maxsize=32)(MiniWikiTasks)  # immutable, so all environments of a process share them


def make_miniwiki(
    *,
    split: Split = "train",
    worlds: int = 20,
    first_world: int = 0,
    hops: Sequence[int | str] = (1, 2),
    seed: int = 0,
    namesakes: float = 0.0,
    topk: int = 1,
    answer_format: str = "boxed",
    dataset: None = None,
    corpus: None = None,
    **options: Any,
) -> ToolEnv:
    """Make an environment of procedural worlds, answered by searching the passages of the question's world.

    Args:
        split: "train" or "test": worlds without a name in common.
        worlds: Number of worlds.
        first_world: Number of the first world.
        hops: Kinds of questions in rotation: 1 to 6, or "comparison".
        seed: Draws the questions.
        namesakes: Share of the entities whose two words an entity of another kind bears in the other order.
        topk: Passages shown by a search; one, as there is one passage per entity. More show distractors too.
        answer_format: The reward, as for the other ids.
        dataset: Not used: MiniWiki makes its own questions.
        corpus: Not used: MiniWiki makes its own passages.
        **options: As for the other ids; the prompt is by default only the question.
    """
    if dataset is not None or corpus is not None:
        raise ConfigError("MiniWiki makes its own questions and passages. Fix: leave dataset and corpus out")
    tasks = _tasks(
        split, worlds=worlds, first_world=first_world, hops=tuple(hops), seed=seed, namesakes=namesakes
    )
    tool = WorldSearchTool(tasks, topk=topk)
    return ToolEnv(tasks=tasks, tools=[tool], reward=answer_format, **{"prompt": "short", **options})
