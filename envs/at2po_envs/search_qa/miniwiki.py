"""Makes the MiniWiki environment: each question is answered from the passages of its own world."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

from at2po_env import SearchTool, ToolEnv
from at2po_env.data import Task
from at2po_env.data.miniwiki import MiniWikiTasks, Split, make_world
from at2po_env.episodes.actions import ActionProtocol
from at2po_env.episodes.prompts import Prompt
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


@lru_cache(maxsize=32)
def _tasks(
    split: Split, worlds: int, first_world: int, hops: tuple[int | str, ...], seed: int, namesakes: float
) -> MiniWikiTasks:
    """Make the tasks; they are immutable, so all environments of a process share them."""
    return MiniWikiTasks(
        split, worlds=worlds, first_world=first_world, hops=hops, seed=seed, namesakes=namesakes
    )


def make_miniwiki(  # noqa: PLR0913 - the keyword arguments of gymnasium.make
    *,
    split: Split = "train",
    worlds: int = 20,
    first_world: int = 0,
    hops: Sequence[int | str] = (1, 2),
    seed: int = 0,
    namesakes: float = 0.0,
    topk: int = 1,
    max_turns: int = 7,
    protocol: str | ActionProtocol = "tagged",
    answer_format: str = "boxed",
    on_malformed: Literal["end", "notice"] = "end",
    prompt: Prompt = "short",
    render_mode: str | None = None,
    dataset: None = None,
    corpus: None = None,
) -> ToolEnv:
    """Questions about procedural worlds, answered by searching the passages of the question's world.

    Args:
        split: "train" or "test": worlds without a name in common.
        worlds: Number of worlds.
        first_world: Number of the first world.
        hops: Kinds of questions in rotation: 1 to 4, or "comparison".
        seed: Draws the questions.
        namesakes: Share of the entities whose two words an entity of another kind bears in the other order.
        topk: Passages shown by a search; one, as there is one passage per entity. More show distractors too.
        max_turns: Turns of an episode; the last has to answer.
        protocol: As for the other ids.
        answer_format: As for the other ids.
        on_malformed: As for the other ids.
        prompt: As for the other ids; by default only the question.
        render_mode: "ansi" for transcripts.
        dataset: Not used: MiniWiki makes its own questions.
        corpus: Not used: MiniWiki makes its own passages.
    """
    if dataset is not None or corpus is not None:
        raise ConfigError("MiniWiki makes its own questions and passages. Fix: leave dataset and corpus out")
    tasks = _tasks(split, worlds, first_world, tuple(hops), seed, namesakes)
    return ToolEnv(
        tasks=tasks,
        tools=[WorldSearchTool(tasks, topk=topk)],
        reward=answer_format,
        protocol=protocol,
        prompt=prompt,
        max_turns=max_turns,
        on_malformed=on_malformed,
        render_mode=render_mode,
    )
