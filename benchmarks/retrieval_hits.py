"""Counts how often the top passages of a search for a supporting title hold that title.

    python -m benchmarks.retrieval_hits --dataset QA.jsonl --corpus CORPUS.jsonl [--topk 3] [--json]

Plays every question through `gymnasium.make("at2po/HotpotQA-v0")`: searches each supporting title, then gives
the gold answer. Keys: `titles` and `titles_found`, their quotient
`hit_rate`, `questions_with_all_titles`, and `mean_reward`, which has to be 1.
"""

from __future__ import annotations

import time
from typing import Any

import gymnasium

import at2po_env
from at2po_env import Task
from benchmarks._timing import command_line, report


def supporting_titles(task: Task) -> list[str]:
    """The titles that a HotpotQA question names as its evidence, each once."""
    return list(dict.fromkeys(task.metadata["supporting_facts"]["title"]))


def measure(dataset: str, corpus: str, *, topk: int = 3) -> dict[str, Any]:
    """Play all questions; count what was found."""
    env = gymnasium.make("at2po/HotpotQA-v0", dataset=dataset, corpus=corpus, topk=topk)
    base = env.unwrapped
    assert isinstance(base, at2po_env.ToolEnv)
    asked = hits = complete = 0
    rewards = []
    start = time.perf_counter()
    for index in range(len(base.tasks)):
        task = base.tasks[index]
        env.reset(options={"index": index})
        found = [
            f"(Title: {title})" in env.step(f"<think>look it up</think><search>{title}</search>")[0]
            for title in supporting_titles(task)
        ]
        answer = task.golden_answers[0]
        rewards.append(env.step(rf"<think>known</think><answer>\boxed{{{answer}}}</answer>")[1])
        asked, hits, complete = asked + len(found), hits + sum(found), complete + all(found)
    return {
        "questions": len(rewards),
        "topk": topk,
        "titles": asked,
        "titles_found": hits,
        "hit_rate": hits / asked,
        "questions_with_all_titles": complete,
        "mean_reward": sum(map(float, rewards)) / len(rewards),
        "seconds": round(time.perf_counter() - start, 3),
    }


def main() -> None:
    """Parse the command line and print."""
    parser = command_line("How often BM25's top passages hold the title asked for.")
    parser.add_argument("--dataset", default="../shared/data/qa/hotpotqa/train.jsonl")
    parser.add_argument("--corpus", default="../shared/data/corpus/wiki_hotpotqa_musique.jsonl")
    parser.add_argument("--topk", type=int, default=3)
    options = parser.parse_args()
    report(measure(options.dataset, options.corpus, topk=options.topk), options)


if __name__ == "__main__":
    main()
