"""Entry points of the search-QA ids: from keyword arguments to an environment.

Nothing here reaches the network: data comes from the paths given, else from the cache that `at2po data get`
fills, else from the sample that ships with the package, with a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from at2po_env import SearchTool, TextVectorEnv, ToolEnv, vector
from at2po_env.data import load_qa, resolve_corpus, resolve_dataset
from at2po_env.episodes.actions import ActionProtocol
from at2po_env.episodes.prompts import Prompt
from at2po_env.retrieval import Retriever, open_retriever
from at2po_envs.search_qa.miniwiki import make_miniwiki
from at2po_envs.search_qa.questions import Questions


def make(*, name: str, **options: Any) -> ToolEnv:
    """Build the environment of one id; see `make_qa` and `make_miniwiki` for the options."""
    return make_miniwiki(**options) if name == "MiniWiki" else make_qa(name, **options)


def make_vector(**options: Any) -> TextVectorEnv:
    """Build many of one id, stepped concurrently; they share data and index."""
    return vector.make_vector(make, **options)


def make_qa(  # noqa: PLR0913 - the keyword arguments of gymnasium.make
    name: str,
    *,
    dataset: str | Path | None = None,
    corpus: str | Path | None = None,
    split: str | None = None,
    retriever: str | Retriever = "bm25",
    retriever_options: Mapping[str, Any] | None = None,
    topk: int = 3,
    max_turns: int = 7,
    protocol: str | ActionProtocol = "tagged",
    answer_format: str = "boxed",
    on_malformed: Literal["end", "notice"] = "end",
    prompt: Prompt | None = None,
    tool_timeout_s: float | None = None,
    tool_retries: int = 0,
    render_mode: str | None = None,
) -> ToolEnv:
    r"""Questions of a data set, answered by searching a corpus.

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
        max_turns: Turns of an episode; the last has to answer.
        protocol: "tagged" (AT²PO), "search_r1" (results in `<information>`) or "hermes" (JSON tool calls).
        answer_format: The reward: "boxed" (AT²PO: -1 for a wrong format, else the EM of `\boxed{}`), "tag"
            (Search-R1: the EM of `<answer>`) or "structured" (Tree-GRPO).
        on_malformed: "end" (AT²PO) or "notice" (Search-R1): what a turn without call and answer leads to.
        prompt: Another prompt: a template, a name, or a function of the task.
        tool_timeout_s: Seconds a search may take. Default: no limit, for retrievers within the process.
        tool_retries: Further attempts of a failed search.
        render_mode: "ansi" for transcripts.
    """
    tasks = Questions(load_qa(resolve_dataset(name, split, dataset)))
    if isinstance(retriever, str):
        path = None if _is_remote(retriever) else resolve_corpus(name, corpus)
        retriever = open_retriever(retriever, path, **(retriever_options or {}))
    tool = SearchTool(retriever, topk=topk, timeout_s=tool_timeout_s, retries=tool_retries)
    return ToolEnv(
        tasks=tasks,
        tools=[tool],
        reward=answer_format,
        protocol=protocol,
        prompt=prompt,
        max_turns=max_turns,
        on_malformed=on_malformed,
        render_mode=render_mode,
    )


def _is_remote(retriever: str) -> bool:
    return retriever == "http" or retriever.startswith(("http://", "https://"))
