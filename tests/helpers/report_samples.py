"""A small tree and a small run, as training leaves them, for tests of what people look at."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from at2po_agent.tree import Tree
from at2po_agent.types import Turn

PROMPT = "Search, then answer.\nQuestion: Who founded Oak Marrow?"


def turn(action: str, *, observation: str = "", surprisal: float = 0.5) -> Turn:
    """One token per byte, all of the same surprisal."""
    ids = tuple(action.encode("utf-8", "surrogatepass"))
    log_probs = np.full(len(ids), -surprisal, dtype=np.float32)
    seen = tuple(observation.encode("utf-8", "surrogatepass"))
    return Turn(seen, ids, log_probs, None, observation, action, surprisal, "stop")


def search(query: str, **options: Any) -> Turn:
    return turn(f"<think> hm </think> <search> {query} </search>", **options)


def answer(text: str, **options: Any) -> Turn:
    return turn(f"<think> so </think> <answer> \\boxed{{ {text} }} </answer>", **options)


def outcome(em: float, text: str = "Ada") -> dict[str, Any]:
    return {"em": em, "f1": em, "answer": text, "reason": "answer", "terminated": True, "truncated": False}


def small_tree(task_id: str = "q1") -> Tree:
    """Two chains, then two rounds of one fork: leaves 2, 4, 5, 7 with rewards 1, 0, 1, 0.

    The chains are 0 -> 1 -> 2 (right) and 0 -> 3 -> 4 (wrong); round 1 adds 1 -> 5 (right), round 2 adds
    0 -> 6 -> 7 (wrong).
    """
    tree = Tree(tuple(PROMPT.encode()), PROMPT, task_id)
    first = tree.add(0, search("Oak Marrow", surprisal=0.9))
    tree.close(tree.add(first, answer("Ada", observation="<result> Doc 1 </result>")), 1.0, outcome(1.0))
    second = tree.add(0, search("Marrow"))
    tree.close(tree.add(second, answer("Bob", observation="<result> </result>")), 0.0, outcome(0.0, "Bob"))
    tree.close(tree.add(first, answer("Ada", observation="<result> Doc 1 </result>")), 1.0, outcome(1.0))
    third = tree.add(0, search("who?"))
    tree.close(tree.add(third, answer("Bob", observation="<result> </result>")), 0.0, outcome(0.0, "Bob"))
    return tree


def flat_tree(task_id: str = "q0") -> Tree:
    """One chain, wrong."""
    tree = Tree(tuple(PROMPT.encode()), PROMPT, task_id)
    tree.close(tree.add(0, answer("Bob")), 0.0, outcome(0.0, "Bob"))
    return tree


def metrics(steps: int) -> list[dict[str, Any]]:
    """Evaluations before and after, and a training line per step with sampled EM step/100."""
    lines: list[dict[str, Any]] = [{"kind": "eval", "mode": "greedy", "step": 0, "em": 0.25}]
    for step in range(1, steps + 1):
        lines.append({"kind": "train", "step": step, "em": step / 100, "sampled_tokens": 1000 * step})
    return [*lines, {"kind": "eval", "mode": "greedy", "step": steps, "em": 0.75}]


def write_run(folder: Path, *, steps: int = 20) -> Path:
    """A finished run's folder, without checkpoints."""
    (folder / "trees").mkdir(parents=True)
    (folder / "config.yaml").write_text("rollout: {chains: 2, forks: 1, rounds: 2}\n", encoding="utf-8")
    text = "".join(json.dumps(record) + "\n" for record in metrics(steps))
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    records = [
        {"step": steps, "question": "Who else?", "golden_answers": ["Eve"], "tree": flat_tree().to_json()},
        {
            "step": steps,
            "question": "Who founded it?",
            "golden_answers": ["Ada"],
            "tree": small_tree().to_json(),
        },
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "trees" / f"step_{steps:06d}.jsonl").write_text(lines, encoding="utf-8")
    (folder / "trees" / "step_000001.jsonl").write_text(json.dumps(records[0]) + "\n", encoding="utf-8")
    summary = {"em_before": 0.25, "em_after": 0.75, "wall_seconds": 196.0, "sampled_tokens": 20000}
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder
