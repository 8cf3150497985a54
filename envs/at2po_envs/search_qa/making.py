"""Makes the search-QA environments from the keyword arguments of `gymnasium.make`.

Nothing here reaches the network: data comes from the given paths, else from the cache that `at2po data get`
fills, else from the sample that ships with the package, with a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from at2po_env import SearchTool, TextVectorEnv, ToolEnv, vector
from at2po_env.data import Task, TaskSource, load_qa, resolve_corpus, resolve_dataset
from at2po_env.retrieval import Retriever, open_retriever
from at2po_envs.search_qa.miniwiki import make_miniwiki


def make(*, name: str, **options: Any) -> ToolEnv:
    """Build the environment of one id; see `make_qa` and `make_miniwiki` for the options."""
    return make_miniwiki(**options) if name == "MiniWiki" else make_qa(name, **options)


def make_vector(**options: Any) -> TextVectorEnv:
    """Build many of one id, stepped concurrently; they share data and index."""
    return vector.make_vector(make, **options)


def make_qa(
    name: str,
    *,
    dataset: str | Path | None = None,
    corpus: str | Path | None = None,
    split: str | None = None,
    retriever: str | Retriever = "bm25",
    retriever_options: Mapping[str, Any] | None = None,
    topk: int = 3,
    answer_format: str = "boxed",
    tool_timeout_s: float | None = None,
    tool_retries: int = 0,
    **options: Any,
) -> ToolEnv:
    r"""Make an environment of the questions of a data set, answered by searching a corpus.

    Args:
        name: The data set: HotpotQA, 2WikiMultihopQA, MuSiQue, Bamboogle, NaturalQuestions, TriviaQA or
            PopQA.
        dataset: A FlashRAG file, or a folder of them. Default: the cache, else the shipped sample.
        corpus: JSON lines in wiki-18 form. Default: the cache, else the shipped sample.
        split: "train", "dev" or "test"; by default train where there is one, else test.
        retriever: "bm25", "lucene", "dense", "hybrid", the address of a server ("http://HOST:PORT"), or a
            retriever. Only kinds within the process need a corpus.
        retriever_options: Keywords of the retriever.
        topk: Passages shown by a search, each cut at 1,000 characters.
        answer_format: The reward: "boxed" (AT²PO: -1 for a wrong format, else the EM of `\boxed{}`), "tag"
            (Search-R1: the EM of `<answer>`) or "structured" (Tree-GRPO).
        tool_timeout_s: Seconds a search may take. Default: no limit, for retrievers within the process.
        tool_retries: Further attempts of a failed search.
        **options: max_turns, protocol, on_malformed, prompt and render_mode of `ToolEnv`.
    """
    tasks = Questions(load_qa(resolve_dataset(name, split, dataset)))
    if isinstance(retriever, str):
        remote = retriever == "http" or retriever.startswith(("http://", "https://"))
        path = None if remote else resolve_corpus(name, corpus)
        retriever = open_retriever(retriever, path, **(retriever_options or {}))
    tool = SearchTool(retriever, topk=topk, timeout_s=tool_timeout_s, retries=tool_retries)
    return ToolEnv(tasks=tasks, tools=[tool], reward=answer_format, **options)


class Questions:
    """A source of tasks whose questions are as the benchmarks put them: stripped, with a question mark."""

    def __init__(self, source: TaskSource) -> None:
        self.source = source

    def __len__(self) -> int:
        """Return the number of tasks."""
        return len(self.source)

    def __getitem__(self, index: int) -> Task:
        """Return the task at `index`."""
        return _normalized(self.source[index])

    def by_id(self, task_id: str) -> Task:
        """Return the task with this id."""
        return _normalized(self.source.by_id(task_id))


def _normalized(task: Task) -> Task:
    question = normalize_question(task.question)
    return task if question == task.question else task._replace(question=question)


def normalize_question(question: str) -> str:
    """Strip, and append "?" if it is missing."""
    question = question.strip()
    return question if question.endswith("?") else question + "?"
