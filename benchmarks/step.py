"""Takes the time of a whole training step apart.

    python -m benchmarks.step --json

Real training steps of the quickstart, from a short cold start so that episodes have their shape, on packed
trees and on rows; and of a random model with 100 M parameters, one question a step. Seconds are medians over
the steps after the first: *sampling* is the policy, *environment* the rest of the rollout, *learner* old
log-probs and updates, *rest* the whole step less everything named: keeping trees, metrics, TensorBoard, the
loop itself. `rest_share` is rest / whole; the goal is below 0.05.

All leaves of a random model earn the same reward, so under the real rewards there would be nothing to learn
and the learner would skip every branch. Its step is therefore given AT2PO's credit for rewards 0 and 1 in
turn (`mixed_credit`): then every branch is trained, as many as in a step that learns at full cost.
`trained_share` is the share of the leaves whose branches the learner computed. Such a model writes no call of
a tool either: its episodes are one turn of `rollout.max_turn_tokens`, and the environment has little to do.

One thread, as the quickstart sets it: about two minutes in all.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from at2po_agent.agents.agent import build_agent
from at2po_agent.config.loading import load_config
from at2po_agent.credit import Credit, credit_rules, register_credit
from at2po_agent.run import run_training
from at2po_agent.runs.progress import Progress
from at2po_agent.tree import Tree
from benchmarks._timing import command_line, report

QUIET = ("eval.questions=0", "train.save_every=0", "cold_start.steps=0")
COLD_START = ("eval.questions=0", "cold_start.steps=150", "cold_start.demonstrations=2400", "train.steps=0")
LARGE = (
    *QUIET,
    "algorithm.credit=benchmark_mixed",
    "train.questions=1",
    "train.minibatch_questions=1",
    "rollout.max_turn_tokens=32",
    "model.hidden_size=768",
    "model.layers=16",
    "model.heads=12",
    "model.kv_heads=4",
    "model.head_dim=64",
    "model.ffn_size=2048",
    "model.vocab_size=560",
)
PARTS: Mapping[str, Sequence[str]] = {
    "sampling": ("sampling",),
    "environment": ("rollout",),
    "credit": ("credit",),
    "packing": ("packing",),
    "learner": ("old_log_probs", "reference", "update"),
}


class Stopwatch(Progress):
    """Notes when each step was complete."""

    def __init__(self) -> None:
        self.records: list[Mapping[str, Any]] = []
        self.moments: list[float] = []

    def step(self, record: Mapping[str, Any]) -> None:
        """A step is complete."""
        self.records.append(record)
        self.moments.append(time.perf_counter())


def mixed_credit(tree: Tree) -> Credit:
    """AT2PO's credit of a tree as if its leaves had earned 0 and 1 in turn."""
    rewards = np.arange(len(tree.leaves())) % 2
    return credit_rules()["tree"](tree.with_leaf_rewards(rewards))


register_credit("benchmark_mixed", mixed_credit)


def cold_start(folder: Path) -> Path:
    """The quickstart's model after a short cold start: the folder of a checkpoint."""
    run_training(load_config("quickstart", [*COLD_START, f"run.dir={folder}"]))
    return folder / "checkpoints" / "step_000000"


def run_case(overrides: Sequence[str], steps: int) -> dict[str, float]:
    """Train for some steps and take their time apart."""
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            "quickstart", [*overrides, f"train.steps={steps + 1}", f"run.dir={Path(folder) / 'run'}"]
        )
        agent = build_agent(config)
        run_training(config, progress=watch, agent=agent)
    whole = [later - earlier for earlier, later in pairwise(watch.moments)]
    parts = {
        f"{part}_s": [
            sum(record.get(f"seconds/{name}", 0.0) for name in names) for record in watch.records[1:]
        ]
        for part, names in PARTS.items()
    }
    parts["rest_s"] = [total - sum(values) for total, *values in zip(whole, *parts.values(), strict=True)]
    medians = {part: statistics.median(values) for part, values in parts.items()}
    step = statistics.median(whole)
    counts = {
        name: statistics.median(float(record[name]) for record in watch.records[1:])
        for name in ("step_tokens", "leaves", "groups_without_signal")
    }
    return {
        "step_s": step,
        **medians,
        "rest_share": medians["rest_s"] / step,
        "sampled_tokens": counts["step_tokens"],
        "leaves": counts["leaves"],
        "trained_share": 1.0
        if config.algorithm.credit == "benchmark_mixed"
        else 1.0 - counts["groups_without_signal"],
        "parameters": sum(parameter.numel() for parameter in agent.model.parameters()),
    }


def main() -> None:
    """Command line."""
    options = command_line("Where the time of a training step goes", rounds=6).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start = cold_start(Path(folder) / "start")
        quick = (*QUIET, f"model.path={start}")
        result: dict[str, Any] = {
            "quickstart": run_case(quick, options.rounds),
            "quickstart, rows": run_case((*quick, "train.packing=rows"), options.rounds),
            "100 M parameters": run_case(LARGE, 2),
        }
    report(result | {"threads": torch.get_num_threads(), "load": os.getloadavg()[0]}, options)


if __name__ == "__main__":
    main()
