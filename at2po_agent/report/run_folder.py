"""Reads the folder of a run: configuration, metrics, summary, trees. Writes nothing.

A damaged file is one `DataError` that names file, line and fix. The only tolerated damage is a last line of
`metrics.jsonl` without its end: the run was killed while it wrote.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from at2po_agent.tree import Tree
from at2po_agent.types import FloatArray
from at2po_env.errors import DataError

METRICS, SUMMARY, CONFIG = "metrics.jsonl", "summary.json", "config.yaml"
TREES, CHECKPOINTS = "trees", "checkpoints"


class NothingYetError(DataError):
    """The run is sound, but what was asked for has not been recorded."""


@dataclass(frozen=True)
class TreeRecord:
    """A kept tree, with what the file says beside it.

    Attributes:
        tree: The tree.
        question: The question, "" when the file does not say.
        golden_answers: The right answers, empty when the file does not say.
        step: Training step, None when the file does not say.
        rounds: Expansion round that created each node, None when the file does not say.
        values: float[N] values that training gave the nodes, None when the file does not say.
        advantages: Advantages that training gave the nodes, the branches, or each node of each branch (see
            `credit`); None when the file does not say.
    """

    tree: Tree
    question: str = ""
    golden_answers: tuple[str, ...] = ()
    step: int | None = None
    rounds: tuple[int, ...] | None = None
    values: FloatArray | None = None
    advantages: FloatArray | None = None


def asked_questions(figures: Mapping[str, Any], questions: str = "questions", seen: str = "seen") -> str:
    """Say which questions an evaluation asked: held-out ones, or how many of them are trained on, too.

    Args:
        figures: A record of an evaluation, or a summary.
        questions: The key of their number.
        seen: The key of how many are trained on, too; absent in files of older releases.
    """
    both, count = figures.get(seen), figures.get(questions)
    if both is None:
        return "questions not known to be held out"
    if not both:
        return "held-out questions"
    return f"{count} questions, {'all' if both == count else both} of them trained on"


def is_right(outcome: Mapping[str, Any]) -> bool:
    """Whether an episode succeeded, or its answer matches a golden answer exactly."""
    success = (outcome.get("metrics") or {}).get("success")
    return bool((outcome.get("em") if success is None else success) == 1)


def check_run_folder(path: Path) -> Path:
    """Return `path` if a run wrote it.

    Raises:
        DataError: There is no such folder, or nothing of a run in it.
    """
    if not path.is_dir():
        raise DataError(f"{path}: no such folder. Fix: give the folder of a run (runs/...).")
    if not any((path / name).exists() for name in (CONFIG, METRICS, SUMMARY, TREES)):
        raise DataError(f"{path}: not a run's folder (no {CONFIG}, {METRICS}, {SUMMARY} or {TREES}/ in it).")
    return path


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read all records of a run's `metrics.jsonl`, in the order of the file; empty when there is none yet."""
    path = run / METRICS
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(_content(path).splitlines(keepends=True), start=1):
        try:
            records.append(_json_object(line, path, number))
        except DataError:
            if line.endswith(b"\n"):
                raise
    return records


def read_config(run: Path) -> dict[str, Any]:
    """Read a run's `config.yaml`; empty when there is none.

    It is read as plain YAML, so that a run whose parts were registered by a program can be looked at without
    that program.
    """
    path = run / CONFIG
    try:
        config = (yaml.safe_load(_content(path)) or {}) if path.exists() else {}
    except (yaml.YAMLError, RecursionError) as error:
        raise DataError(f"{path}: not a configuration ({error}).") from error
    if not isinstance(config, dict):
        raise DataError(f"{path}: not a configuration (expected sections, got {type(config).__name__}).")
    return config


def read_rollout_config(run: Path) -> dict[str, Any]:
    """Read the section `rollout` of a run's `config.yaml`; empty when there is none."""
    section = read_config(run).get("rollout")
    return section if isinstance(section, dict) else {}


def read_summary(run: Path) -> dict[str, Any]:
    """Read a run's `summary.json`; empty while the run is not finished."""
    path = run / SUMMARY
    return _json_object(_content(path), path, None) if path.exists() else {}


def read_trees(path: Path) -> list[TreeRecord]:
    """Read the trees of a file, of a folder `trees/` or of a run (its newest file).

    A file holds one tree, a list of trees, or one tree per line; a tree is what `Tree.to_json` wrote, or an
    object with it under `tree` and `question`, `golden_answers`, `step`, `rounds` beside it.

    Raises:
        DataError: Nothing there, or not trees.
    """
    file = tree_file(path)
    try:
        records = [_tree_record(entry, file, number) for number, entry in _entries(file)]
    except OSError as error:
        raise DataError(f"{file}: cannot read the trees ({error.strerror or error}).") from error
    if not records:
        raise DataError(f"{file}: no tree in it.")
    return records


def tree_file(path: Path) -> Path:
    """Find the file that `read_trees` reads."""
    return path if path.is_file() else tree_files(path)[-1]


def tree_files(path: Path) -> list[Path]:
    """Find all files of trees of a run or of a folder `trees/`, in the order of the steps.

    Raises:
        NothingYetError: There is none.
    """
    folder = path / TREES if (path / TREES).is_dir() else path
    files = sorted(folder.glob("[!.]*.json*")) if folder.is_dir() and folder.name == TREES else []
    if not files:
        raise NothingYetError(
            f"{path}: no trees there. Fix: give a file of trees, or a run with train.save_trees_every > 0."
        )
    return files


def most_telling(records: Iterable[TreeRecord]) -> TreeRecord:
    """Choose the tree worth a look: its leaves disagree most about the reward, then it has most leaves."""

    def key(record: TreeRecord) -> tuple[float, int]:
        rewards = record.tree.leaf_reward[record.tree.is_leaf]
        return (round(float(np.std(rewards)), 9), len(rewards)) if len(rewards) else (-1.0, 0)

    return max(records, key=key)


def pick(records: Sequence[TreeRecord], question: str | None) -> TreeRecord:
    """Find the tree of a question.

    Args:
        records: Where to look.
        question: Its id, or its number in the order of the file from 0; None takes the most telling.

    Raises:
        DataError: There is none.
    """
    if question is None:
        return most_telling(records)
    for record in records:
        if record.tree.task_id == question:
            return record
    if question.isdecimal() and int(question) < len(records):
        return records[int(question)]
    known = ", ".join(f"{number} ({record.tree.task_id})" for number, record in enumerate(records))
    raise DataError(f"no tree of question {question!r}. Fix: use one of {known}.")


def _entries(path: Path) -> Iterator[tuple[int | None, Any]]:
    """(line number, JSON value) of each tree of a file; no number where the file is one JSON value."""
    data = path.read_bytes()
    try:
        whole = json.loads(data)
    except (ValueError, RecursionError):
        for number, line in enumerate(data.splitlines(), start=1):
            yield number, _json_object(line, path, number)
        return
    if isinstance(whole, Mapping) and "trees" in whole:
        whole = whole["trees"]
    yield from ((None, entry) for entry in (whole if isinstance(whole, list) else [whole]))


def _tree_record(entry: Any, path: Path, number: int | None) -> TreeRecord:
    beside = entry if isinstance(entry, Mapping) and "tree" in entry else {"tree": entry}
    body = beside["tree"]

    def numbers(values: Any, *shapes: tuple[int, ...]) -> FloatArray | None:
        if values is None:
            return None
        array = np.asarray(values, dtype=np.float64)
        if array.shape not in shapes:
            raise ValueError(f"credit of shape {array.shape}, expected one of {sorted(shapes)}")
        return array

    try:
        tree = Tree.from_json(body if isinstance(body, str) else json.dumps(body))
        leaves = len(tree.leaves())
        step, rounds = beside.get("step"), beside.get("rounds")
        return TreeRecord(
            tree,
            str(beside.get("question") or ""),
            tuple(str(answer) for answer in beside.get("golden_answers") or ()),
            None if step is None else int(step),
            None if rounds is None or len(rounds) != len(tree) else tuple(int(r) for r in rounds),
            numbers(beside.get("values"), (len(tree),)),
            numbers(beside.get("advantages"), (len(tree),), (leaves,), (leaves, len(tree))),
        )
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{_at(path, number)}: not a tree ({error}).") from error


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}). Fix: restore or remove it."
        ) from error


def _json_object(data: bytes, path: Path, number: int | None) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{_at(path, number)}: not JSON ({error}). Fix: restore or remove it.") from error
    if not isinstance(value, dict):
        raise DataError(f"{_at(path, number)}: expected a JSON object, got {type(value).__name__}.")
    return value


def _at(path: Path, number: int | None) -> str:
    return str(path) if number is None else f"{path}, line {number}"
