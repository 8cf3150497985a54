"""Races the main methods and our own at equal effort, over tasks, independent starts and seeds.

    python -m benchmarks.fair --out FOLDER --tune
    python -m benchmarks.fair --out FOLDER --report docs/results

What differs between the methods is how trees grow, what a turn's credit is, and whose ratio is clipped.
All else is the same: tokens sampled, tokens in a step, updates in a step, mean over tokens, no KL. The
comparisons are fixed before the runs (`COMPARISONS`).

The first command tunes learning rate and clip share on a start and on seeds that are not reported, with the
same effort for each method: every setting of `RATES` x `SHARES` on two seeds, then the best three on four
more. The second trains every method at its best setting, from every start with every seed, and writes
`fair.md`, `fair.csv`, `fair_tuning.csv` and `fair.png`. A run is evaluated by 8 samples of each of 300
questions of worlds that no run trains on.

Both train the runs that FOLDER does not have yet and write one JSON file per finished run, so they can be
stopped at any time. `--ablations` adds the parts of our method one by one, `--updates 1 4 16` other numbers
of updates in a step.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks._runs import make_runs, sampled_em, temporary_trainer, write_figures
from benchmarks.race import next_step_fits

BASE = Path(__file__).with_name("race.yaml")
RATES = (2e-4, 4e-4, 8e-4, 1.6e-3)
SHARES = (0.02, 0.05, 0.15)
TUNING_START = 100
TUNING_SEEDS = (100, 101, 102, 103, 104, 105)
FIRST_ROUND, FINALISTS = 2, 3
COLD_STARTS = (400, 600, 900)
"""Steps of the cold start: the first that leads to `LEAST_EM` is taken; from a start that finds no reward no
method learns, and nothing is compared."""
LEAST_EM = 0.08
QUESTIONS, SAMPLES = 300, 8
POINTS = 4
"""Evaluations on the way, of a third of the questions and one sample."""

_CHAINS = ("rollout.forks=0", "rollout.rounds=0")
_WANDER = tuple(f"cold_start.expert.{fault}=0" for fault in ("early_stop", "half_query", "page_title"))
TASKS: Mapping[str, tuple[str, ...]] = {
    "stops": (),
    "strays": ("env.kwargs.hops=[5,6]", *_WANDER, "cold_start.expert.wrong_hop=0.3"),
}
"""`stops`: 2 and 3 hops, faults of the expert end an episode at once. `strays`: 5 and 6 hops, and a wrong hop
goes on to a wrong answer."""


class Row(NamedTuple):
    """What differs between the rows of the race.

    Attributes:
        questions: Of a step; with the leaves of a question they make 192 leaves, or 256 with `_SMALL_TREE`.
        settings: `key=value` texts.
    """

    questions: int
    settings: tuple[str, ...]


_AT2PO = ("algorithm=at2po", "rollout.chains=6", "rollout.forks=3", "rollout.rounds=2")
_FEW, _MANY = ("rollout.chains=6", *_CHAINS), ("rollout.chains=12", *_CHAINS)
_SMALL_TREE = ("rollout.expansion=random", "rollout.chains=4", "rollout.forks=2", "rollout.rounds=1")
METHODS: Mapping[str, Row] = {
    "at2po": Row(16, _AT2PO),
    "grpo": Row(16, ("algorithm=grpo", *_MANY)),
    "tree_grpo": Row(16, ("algorithm=tree_grpo",)),
    "aepo": Row(16, ("algorithm=aepo",)),
    "surpo": Row(32, ("algorithm=surpo", *_FEW)),
}
ABLATIONS: Mapping[str, Row] = {
    "grpo, 6 leaves": Row(32, ("algorithm=grpo", *_FEW)),
    "surpo, 12 leaves": Row(16, ("algorithm=surpo", *_MANY)),
    "surpo, random forks": Row(32, ("algorithm=surpo", *_SMALL_TREE)),
    "surpo, no cap": Row(32, ("algorithm=surpo", *_FEW, "algorithm.credit_options.cap=null")),
    "at2po, random": Row(16, (*_AT2PO, "rollout.expansion=random")),
}
"""Rows that take the setting of the method that they are named after."""
PARTS = (
    ("grpo, 6 leaves", "grpo"),
    ("surpo, 12 leaves", "grpo"),
    ("surpo, no cap", "grpo, 6 leaves"),
    ("surpo", "surpo, 12 leaves"),
    ("surpo", "surpo, no cap"),
    ("surpo", "surpo, random forks"),
    ("at2po", "at2po, random"),
)
"""What single parts are worth; not corrected, and not among the fixed comparisons."""
OWN = "surpo"
COMPARISONS = (
    *(("at2po", other) for other in ("grpo", "tree_grpo", "aepo")),
    *((OWN, other) for other in ("at2po", "grpo", "tree_grpo", "aepo")),
)
"""First minus second; Holm's correction is over these."""


class Setting(NamedTuple):
    """What is tuned: a learning rate and the share of the tokens that the loss is to clip."""

    rate: float
    share: float


class Job(NamedTuple):
    """One run.

    Attributes:
        task: Key of `TASKS`.
        method: Key of `METHODS` or `ABLATIONS`.
        start: Number of the cold start; it seeds the weights and the demonstrations.
        seed: Of questions, samples and minibatches.
        setting: Learning rate and clip share.
        budget: Sampled tokens of training.
        updates: Updates in a step.
        checkpoint: Of the cold start.
        result: The file for its figures.
    """

    task: str
    method: str
    start: int
    seed: int
    setting: Setting
    budget: int
    updates: int
    checkpoint: str
    result: str

    @property
    def overrides(self) -> list[str]:
        """Return the overrides of `race.yaml`; a step's questions are cut into `updates` minibatches."""
        questions, settings = {**METHODS, **ABLATIONS}[self.method]
        return [
            *settings,
            *TASKS[self.task],
            "algorithm.kl_weight=0",
            "algorithm.loss_options.aggregation=token",
            f"algorithm.clip_share={self.setting.share}",
            f"optimizer.lr={self.setting.rate}",
            f"train.questions={questions}",
            f"train.minibatch_questions={max(1, questions // self.updates)}",
            f"model.path={self.checkpoint}",
            f"run.seed={self.seed}",
            "cold_start.steps=0",
            f"eval.questions={QUESTIONS}",
        ]


def prepare(out: Path, task: str, start: int) -> Path:
    """Train the cold start of a task, unless it is there; returns its checkpoint.

    Raises:
        SystemExit: No number of steps in `COLD_STARTS` leads to `LEAST_EM`.
    """
    from at2po_agent.config.loading import load_config
    from at2po_agent.run import run_training

    for steps in COLD_STARTS:
        folder = out / task / f"start_{start}_{steps}"
        checkpoint, verdict = folder / "checkpoints" / "step_000000", folder / "summary.json"
        if not verdict.exists():
            own = [f"run.dir={folder}", f"run.seed={start}", f"cold_start.steps={steps}"]
            shutil.rmtree(folder, ignore_errors=True)
            run_training(load_config(BASE, [*TASKS[task], *own, "train.steps=0", "eval.questions=200"]))
        if json.loads(verdict.read_text(encoding="utf-8"))["sampled_em_before"] >= LEAST_EM:
            return checkpoint
    raise SystemExit(f"{task}: start {start} does not reach {LEAST_EM} sampled EM in {COLD_STARTS[-1]} steps")


def run(job: Job) -> dict[str, Any]:
    """Train until the budget is spent; returns the run's figures."""
    from at2po_agent.config.loading import load_config

    started = time.perf_counter()
    config, tuning = load_config(BASE, job.overrides), job.seed in TUNING_SEEDS
    with temporary_trainer(config) as trainer:
        points = [(0, sampled_em(trainer, QUESTIONS // 3))]
        records: list[dict[str, Any]] = []
        while next_step_fits(records, job.budget):
            records.append(trainer.step())
            due = trainer.state.sampled_tokens >= len(points) * job.budget / (POINTS + 1)
            if due and len(points) <= POINTS and not tuning:
                points.append((trainer.state.sampled_tokens, sampled_em(trainer, QUESTIONS // 3)))
        training = time.perf_counter() - started
        asked = (QUESTIONS // 3, SAMPLES // 2) if tuning else (QUESTIONS, SAMPLES)
        final = sampled_em(trainer, *asked)
        greedy = None if tuning else trainer.evaluate("greedy").em
    figures = {
        name: statistics.fmean(record[name] for record in records if name in record)
        for name in ("clip_fraction", "entropy", "turn_kl_entropy", "leaves")
        if any(name in record for record in records)
    }
    return {
        "task": job.task,
        "method": job.method,
        "start": job.start,
        "seed": job.seed,
        "rate": job.setting.rate,
        "share": job.setting.share,
        "budget": job.budget,
        "updates_per_step": job.updates,
        "sampled_em": final,
        "em": greedy,
        "start_em": points[0][1],
        "way_em": statistics.fmean(em for _, em in points[1:]) if len(points) > 1 else final,
        "sampled_tokens": trainer.state.sampled_tokens,
        "steps": len(records),
        "updates": sum(record["updates"] for record in records),
        "tool_calls": sum(record["nodes"] - record["leaves"] for record in records),
        "training_seconds": training,
        "seconds": time.perf_counter() - started,
        "curve": [*points, (trainer.state.sampled_tokens, final)],
        **figures,
    }


def work(job: Job) -> str:
    """Do a run and write its figures."""
    figures = run(job)
    path = Path(job.result)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_figures(path, figures)
    return f"{path.stem}: sampled EM {figures['sampled_em']:.3f} in {figures['seconds']:.0f} s"


def do(jobs: Sequence[Job], processes: int) -> None:
    """Do the runs that have no file yet, several at a time."""
    missing = [job for job in jobs if not Path(job.result).exists()]
    print(f"{len(missing)} of {len(jobs)} runs to do", flush=True)
    make_runs(work, missing, processes)


def read(folder: Path) -> list[dict[str, Any]]:
    """Read the finished runs below a folder."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.json"))]


def best_settings(runs: Sequence[Mapping[str, Any]], count: int) -> list[Setting]:
    """The best settings of one method on one task, by mean sampled EM at the end.

    Settings with fewer runs than any other finalist are compared on what they have: all have the first seeds.
    """
    scores: dict[Setting, list[float]] = {}
    for one in runs:
        scores.setdefault(Setting(one["rate"], one["share"]), []).append(one["sampled_em"])
    most = max((len(found) for found in scores.values()), default=0)
    # After the second round only its settings count: they alone were tried on all seeds.
    finalists = [setting for setting, found in scores.items() if len(found) == most]
    return sorted(finalists, key=lambda setting: statistics.fmean(scores[setting]), reverse=True)[:count]


def jobs_of(
    options: argparse.Namespace, method: str, task: str, settings: Sequence[Setting], seeds: Sequence[int]
) -> list[Job]:
    """The runs of a method with some settings; from all starts, or from the start of tuning."""
    jobs = []
    for start in [TUNING_START] if options.tune else range(options.starts):
        checkpoint = prepare(options.out, task, start)
        folder = options.out / task / ("tuning" if options.tune else "runs")
        for updates in [4] if options.tune else options.updates:
            for setting in settings:
                for seed in seeds:
                    name = method.replace(",", "").replace(" ", "_")
                    stem = f"{name}-u{updates}-lr{setting.rate:g}-c{setting.share:g}-{start}-{seed}"
                    result = str(folder / f"{stem}.json")
                    budget = options.budget
                    jobs.append(
                        Job(task, method, start, seed, setting, budget, updates, str(checkpoint), result)
                    )
    return jobs


def tune(options: argparse.Namespace) -> None:
    """Try all settings on a few seeds, then the best on more; every method gets the same."""
    every = [Setting(rate, share) for rate in RATES for share in SHARES]
    first, more = TUNING_SEEDS[:FIRST_ROUND], TUNING_SEEDS[FIRST_ROUND : options.tuning_seeds]
    pairs = [(method, task) for task in options.tasks for method in METHODS]
    do([job for method, task in pairs for job in jobs_of(options, method, task, every, first)], options.jobs)
    finals = []
    for method, task in pairs:
        tried = [one for one in read(options.out / task / "tuning") if one["method"] == method]
        scores = [one for one in tried if one["seed"] in first]
        finals += jobs_of(options, method, task, best_settings(scores, FINALISTS), more)
    do(finals, options.jobs)


def race(options: argparse.Namespace) -> None:
    """Train every method at its tuned setting, seed by seed, so that a stopped race is balanced."""
    rows = {method: method for method in METHODS}
    if options.ablations:
        rows |= {name: next(method for method in METHODS if name.startswith(method)) for name in ABLATIONS}
    jobs = []
    for seed in range(options.seeds):
        for task in options.tasks:
            tuned = read(options.out / task / "tuning")
            for row, method in rows.items():
                if options.methods and row not in options.methods:
                    continue
                best = best_settings([one for one in tuned if one["method"] == method], 1)
                if not best:
                    raise SystemExit(f"{method} has no tuning runs on {task}: run with --tune first")
                jobs += jobs_of(options, row, task, best, [seed])
    do(jobs, options.jobs)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/fair"), help="folder of starts and results")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", metavar="ROW", help="only these rows (default: all)")
    parser.add_argument("--tune", action="store_true", help="tune learning rates and clip shares")
    parser.add_argument("--tuning-seeds", type=int, default=6, help="seeds of the best settings in tuning")
    parser.add_argument("--starts", type=int, default=4, help="independent cold starts")
    parser.add_argument("--seeds", type=int, default=6, help="seeds from each start")
    parser.add_argument("--updates", nargs="+", type=int, default=[4], help="updates in a step")
    parser.add_argument("--budget", type=int, default=60_000, help="sampled tokens of a run")
    parser.add_argument("--ablations", action="store_true", help="also the rows of ABLATIONS")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each; 0 only reports")
    parser.add_argument("--report", type=Path, help="write the report there")
    parser.add_argument("--json", action="store_true", help="print the comparisons as JSON")
    options = parser.parse_args(arguments)
    if options.jobs:
        (tune if options.tune else race)(options)
    if options.report or options.json:
        from benchmarks.fair_report import compare, write_report

        runs = [one for task in options.tasks for one in read(options.out / task / "runs")]
        tuning = [one for task in options.tasks for one in read(options.out / task / "tuning")]
        if options.report:
            write_report(runs, tuning, options.report)
        if options.json:
            print(json.dumps([found._asdict() for found in compare(runs)]))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
