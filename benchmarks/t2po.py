"""Trains GiGPO and T2PO's two interventions on T2PO's worlds, and reports how stably they learn.

    python -m benchmarks.t2po --out FOLDER --seeds 0 1 2 3 4 --report docs/results

In each world (`household`: small generated rooms; `webshop`: the shipped sample, or the shop in `--webshop`)
one cold start on the world's expert is shared by all runs. A run takes `--steps` training steps and is then
evaluated by sampling. FOLDER keeps one JSON file per finished run, and what it has is not run again, so the
command can be stopped at any time. `t2po.md` and `t2po.csv` hold, per world and method, the mean over seeds
and its standard error of

- success and reward after training (of the evaluation), and success before it;
- the share of attempts at a turn that were discarded, and of turns whose thinking was ended;
- sampled tokens per success in the last third of the steps;
- entropy of a turn, and its spread between the turns of an episode, in the first and the last third;
- collapsed runs: those that succeed less often at the end than after the cold start, by more than two
  standard errors of the evaluation.
"""

import argparse
import csv
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks._runs import make_runs, table_row, temporary_trainer, write_figures, write_tables

BASE = Path(__file__).with_name("t2po.yaml")
METHODS = ("gigpo", "gigpo+tti", "gigpo+tds", "t2po")
WORLDS: Mapping[str, tuple[str, ...]] = {
    "household": (
        "env.id=at2po/Household-v0",
        "env.kwargs={size: small, max_turns: 12, families: [pick_and_place_simple, look_at_obj_in_light]}",
        "eval.kwargs={split: eval}",
    ),
    "webshop": ("env.id=at2po/WebShop-v0", "env.kwargs={split: all, max_turns: 8, nouns: rule}"),
}
COLUMNS = {
    "start": "success before",
    "success": "success",
    "reward": "reward",
    "discarded": "discarded",
    "ended": "thinking ended",
    "tokens_per_success": "tokens a success",
    "entropy_first": "entropy, first third",
    "entropy_last": "last third",
    "spread_first": "between turns, first third",
    "spread_last": "last third",
}


def overrides(world: str, webshop: str | None) -> list[str]:
    """Return the settings of a world."""
    given = list(WORLDS[world])
    if world == "webshop" and webshop:
        given = [given[0], f"env.kwargs={{dataset: {webshop}, split: all, max_turns: 8, nouns: rule}}"]
    return given


def prepare(out: Path, world: str, webshop: str | None) -> Path:
    """Make the cold start of a world, unless it is there; returns its checkpoint."""
    from at2po_agent.config.loading import load_config
    from at2po_agent.run import run_training

    folder = out / world / "cold_start"
    checkpoint = folder / "checkpoints" / "step_000000"
    if not (checkpoint / "state.json").exists():
        run_training(load_config(BASE, [*overrides(world, webshop), f"run.dir={folder}", "train.steps=0"]))
    return checkpoint


def run(job: Mapping[str, Any]) -> str:
    """Train and evaluate one run; writes its figures, and returns a line about it."""
    from at2po_agent.config.loading import load_config

    started = time.perf_counter()
    own = [f"model.path={job['start']}", f"run.seed={job['seed']}", "cold_start.steps=0"]
    config = load_config(BASE, [*overrides(job["world"], job["webshop"]), f"algorithm={job['method']}", *own])
    with temporary_trainer(config) as trainer:
        before = trainer.evaluate("sampled")
        records = [trainer.step() for _ in range(job["steps"])]
        after = trainer.evaluate("sampled")
    third = max(1, len(records) // 3)
    first, last = records[:third], records[-third:]
    successes = sum(record["metrics/success"] * record["leaves"] for record in last)
    tokens = sum(record["step_tokens"] for record in last)
    figures = {
        **{name: job[name] for name in ("world", "method", "seed", "steps")},
        "start": before.metrics.get("success", 0.0),
        "success": after.metrics.get("success", 0.0),
        "reward": after.reward,
        "discarded": _mean(records, "resampling/share"),
        "ended": _mean(records, "thinking/share"),
        "tokens_per_success": tokens / successes if successes else math.inf,
        "entropy_first": _mean(first, "entropy"),
        "entropy_last": _mean(last, "entropy"),
        "spread_first": _mean(first, "entropy_between_turns"),
        "spread_last": _mean(last, "entropy_between_turns"),
        "curve": [record["metrics/success"] for record in records],
        "questions": after.questions,
        "sampled_tokens": trainer.state.sampled_tokens,
        "seconds": time.perf_counter() - started,
    }
    write_figures(Path(job["result"]), figures)
    return f"{job['world']}, {job['method']}, seed {job['seed']}: success {figures['success']:.2f}"


def _mean(records: Sequence[Mapping[str, Any]], name: str) -> float:
    """The mean over the steps; 0 where an intervention is off."""
    return statistics.fmean(float(record.get(name, 0.0)) for record in records)


def collapsed(figures: Mapping[str, Any]) -> bool:
    """Whether a run succeeds less often than it did before training, beyond the noise of the evaluation."""
    before, after, count = figures["start"], figures["success"], figures["questions"]
    error = math.sqrt((before * (1 - before) + after * (1 - after)) / count)
    return bool(before - after > 2 * error)


def write_report(runs: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write the table of all runs, and one row for each world and method."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ["world", "method", "seed", "steps", *COLUMNS, "sampled_tokens", "seconds"]
    with (folder / "t2po.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(runs)
    lines = []
    for world in WORLDS:
        lines += [f"### {world}", "", table_row(["method", "runs", *COLUMNS.values(), "collapsed"])]
        lines.append(table_row(["---"] * (len(COLUMNS) + 3)))
        for method in METHODS:
            chosen = [one for one in runs if (one["world"], one["method"]) == (world, method)]
            if chosen:
                cells = [_cell([float(one[name]) for one in chosen]) for name in COLUMNS]
                fell = sum(map(collapsed, chosen))
                lines.append(table_row([f"`{method}`", str(len(chosen)), *cells, str(fell)]))
        lines.append("")
    write_tables(folder / "t2po.md", "T2PO on its worlds", "benchmarks/t2po.py", "\n".join(lines))


def _cell(values: Sequence[float]) -> str:
    if any(math.isinf(value) for value in values):
        return "no success in some runs"
    shown = ".0f" if statistics.fmean(values) >= 10 else ".2f"
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.fmean(values):{shown}}" + ("" if math.isnan(error) else f" ({error:{shown}})")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("runs/t2po"), help="folder of cold starts and results"
    )
    parser.add_argument("--worlds", nargs="+", default=list(WORLDS), choices=list(WORLDS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=15, help="training steps of a run")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each; 0 only reports")
    parser.add_argument("--webshop", help="folder of a shop in the original's format")
    parser.add_argument("--report", type=Path, help="write t2po.md and t2po.csv there")
    parser.add_argument("--json", action="store_true", help="print the figures of all runs as JSON")
    options = parser.parse_args(arguments)
    # Seeds in the outer loop: an interrupted command has whole comparisons.
    wanted = [
        (world, method, seed)
        for seed in options.seeds
        for world in options.worlds
        for method in options.methods
    ]
    files = {key: options.out / key[0] / f"{key[1]}-{key[2]}-{options.steps}.json" for key in wanted}
    missing = [key for key in wanted if not files[key].exists()]
    if options.jobs and missing:
        starts = {world: prepare(options.out, world, options.webshop) for world, _, _ in missing}
        jobs = [
            {
                "world": world,
                "method": method,
                "seed": seed,
                "steps": options.steps,
                "start": str(starts[world]),
                "webshop": options.webshop,
                "result": str(files[world, method, seed]),
            }
            for world, method, seed in missing
        ]
        make_runs(run, jobs, options.jobs)
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in files.values() if file.exists()]
    if options.report:
        write_report(runs, options.report)
    if options.json:
        print(json.dumps(runs))


if __name__ == "__main__":
    main()
