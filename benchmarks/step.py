"""Where the time of a whole training step goes.

    python -m benchmarks.step --json

Real training steps of the quickstart, after a short cold start so that episodes have their shape, on packed
trees and on rows; and of a random model with 100 M parameters. Seconds are medians over the steps after the
first: *sampling* is the policy, *environment* the rest of the rollout, *learner* old log-probs and updates,
*rest* the whole step less everything named: keeping trees, metrics, TensorBoard, the loop itself.
`rest_share` is rest / whole; the goal is below 0.05.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from at2po_agent.config import load_config
from at2po_agent.progress import NoProgress
from at2po_agent.run import run_training
from benchmarks._timing import arguments, report

QUIET = ("eval.questions=0", "train.save_every=0", "cold_start.steps=150")
LARGE = (
    "eval.questions=0",
    "train.save_every=0",
    "cold_start.steps=0",
    "train.questions=2",
    "train.minibatch_questions=1",
    "rollout.max_turn_tokens=48",
    "model.hidden_size=768",
    "model.layers=16",
    "model.heads=12",
    "model.kv_heads=4",
    "model.head_dim=64",
    "model.ffn_size=2048",
)
CASES: Mapping[str, Sequence[str]] = {
    "quickstart": QUIET,
    "quickstart, rows": (*QUIET, "train.packing=rows"),
    "100 M parameters": LARGE,
}
PARTS: Mapping[str, Sequence[str]] = {
    "sampling": ("sampling",),
    "environment": ("rollout",),
    "credit": ("credit",),
    "packing": ("packing",),
    "learner": ("old_log_probs", "reference", "update"),
}


class Stopwatch(NoProgress):
    """Notes when each step was complete."""

    def __init__(self) -> None:
        self.records: list[Mapping[str, Any]] = []
        self.moments: list[float] = []

    def step(self, record: Mapping[str, Any]) -> None:
        """A step is complete."""
        self.records.append(record)
        self.moments.append(time.perf_counter())


def run_case(overrides: Sequence[str], steps: int) -> dict[str, float]:
    """Train for some steps and take their time apart."""
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            "quickstart", [*overrides, f"train.steps={steps + 1}", f"run.dir={Path(folder) / 'run'}"]
        )
        run_training(config, progress=watch)
    whole = [later - earlier for earlier, later in zip(watch.moments, watch.moments[1:], strict=False)]
    parts = {
        f"{part}_s": [
            sum(record.get(f"seconds/{name}", 0.0) for name in names) for record in watch.records[1:]
        ]
        for part, names in PARTS.items()
    }
    parts["rest_s"] = [total - sum(values) for total, *values in zip(whole, *parts.values(), strict=True)]
    medians = {part: statistics.median(values) for part, values in parts.items()}
    tokens = statistics.median(float(record["step_tokens"]) for record in watch.records[1:])
    step = statistics.median(whole)
    return {"step_s": step, **medians, "rest_share": medians["rest_s"] / step, "sampled_tokens": tokens}


def main() -> None:
    """Command line."""
    options = arguments("Where the time of a training step goes", rounds=6)
    result: dict[str, Any] = {
        name: run_case(case, options.rounds if "quick" in name else 2) for name, case in CASES.items()
    }
    result |= {"threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    report(result, as_json=options.json)


if __name__ == "__main__":
    main()
