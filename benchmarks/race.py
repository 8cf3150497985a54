"""Runs of the race: the methods, the shared cold start, one run, and the runs that are missing.

`benchmarks.algorithms` is the command, `benchmarks.race_report` makes tables of the results.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks._runs import sampled_em, temporary_trainer, write_figures

BASE = Path(__file__).with_name("race.yaml")
TUNING_SEED = 100
TUNING_RATES = (2e-4, 4e-4, 8e-4)
QUESTIONS_ON_THE_WAY = 100
DEFAULT_RATE = 4e-4
_TREE = ("algorithm=at2po",)
_GROUP = ("algorithm.credit=group", "algorithm.credit_options={}")
_GRPO_LOSS = ("algorithm.loss=grpo", "algorithm.loss_options={}")
_ALGORITHMS = ("at2po", "grpo", "gspo", "dapo", "arpo", "aepo", "tree_grpo", "gigpo", "t2po")
_MODES = {
    "value": ("child_mean", "child_linear", "leaf_mean"),
    "advantage": ("diff_parent", "diff_global", "diff_localglobal"),
}

METHODS: Mapping[str, tuple[str, ...]] = {
    **{name: (f"algorithm={name}",) for name in _ALGORITHMS},
    "random tree + GRPO loss": (*_TREE, "rollout.expansion=random", *_GROUP, *_GRPO_LOSS),
    "random tree + turn loss": (*_TREE, "rollout.expansion=random", *_GROUP),
    "entropy tree + turn loss": (*_TREE, *_GROUP),
    **{
        f"{part} {mode}": (*_TREE, f"algorithm.credit_options.{part}_mode={mode}")
        for part, modes in _MODES.items()
        for mode in modes
    },
}
"""Nine algorithms; three steps of AT2PO's ablation (at2po is the fourth); value and advantage modes."""
TUNED = tuple(name for name in METHODS if not name.startswith(("value ", "advantage ")))
"""The rows that are tuned; the modes differ from `at2po` in its credit alone and take its rate."""


class Job(NamedTuple):
    """One run.

    Attributes:
        method: Key of `METHODS`.
        seed: Of the run; it decides questions, samples and minibatches, never the weights it starts from.
        rate: Learning rate.
        budget: Sampled tokens.
        start: The checkpoint of the shared cold start.
        result: The file for its figures.
        extra: Further `key=value` texts.
    """

    method: str
    seed: int
    rate: float
    budget: int
    start: str
    result: str
    extra: tuple[str, ...] = ()

    @property
    def overrides(self) -> list[str]:
        """Return the overrides of `race.yaml`."""
        own = [f"model.path={self.start}", f"run.seed={self.seed}", f"optimizer.lr={self.rate}"]
        return [*METHODS[self.method], *own, "cold_start.steps=0", *self.extra]


def prepare(out: Path, overrides: Sequence[str] = ()) -> Path:
    """The shared cold start: trained once, then reused; returns its checkpoint.

    Raises:
        SystemExit: The folder's runs were started with other settings.
    """
    from at2po_agent.config.loading import load_config
    from at2po_agent.run import run_training

    out.mkdir(parents=True, exist_ok=True)
    kept, text = out / "task.json", json.dumps(list(overrides))
    if kept.exists() and kept.read_text(encoding="utf-8") != text:
        raise SystemExit(
            f"{out} holds runs with --task {kept.read_text(encoding='utf-8')}: choose another --out"
        )
    kept.write_text(text, encoding="utf-8")
    folder = out / "cold_start"
    checkpoint = folder / "checkpoints" / "step_000000"
    if not (checkpoint / "state.json").exists():
        run_training(load_config(BASE, [f"run.dir={folder}", "train.steps=0", *overrides]))
    return checkpoint


def run(job: Job, *, evaluations: int = 5) -> dict[str, Any]:
    """Train until the budget is spent; sampled exact match on the way, both at the end.

    The points on the way are of the first `QUESTIONS_ON_THE_WAY` questions, the last one is of all of them.
    """
    from at2po_agent.config.loading import load_config

    started = time.perf_counter()
    config = load_config(BASE, job.overrides)
    with temporary_trainer(config) as trainer:
        curve = [_point(trainer)]
        records: list[dict[str, Any]] = []
        while next_step_fits(records, job.budget):
            records.append(trainer.step())
            if trainer.state.sampled_tokens >= len(curve) * job.budget / evaluations:
                curve.append(_point(trainer))
        if curve[-1]["sampled_tokens"] == trainer.state.sampled_tokens:
            curve.pop()
        curve.append(
            {"sampled_tokens": trainer.state.sampled_tokens, "sampled_em": trainer.evaluate("sampled").em}
        )
        greedy = trainer.evaluate("greedy")
    figures = {
        name: _mean(records, name) for name in ("turn_kl_entropy", "clip_fraction", "token_kl", "leaves")
    }
    return {
        "method": job.method,
        "seed": job.seed,
        "sampled_tokens": trainer.state.sampled_tokens,
        "em": greedy.em,
        "sampled_em": curve[-1]["sampled_em"],
        "start_sampled_em": curve[0]["sampled_em"],
        "mean_sampled_em": sum(point["sampled_em"] for point in curve[1:]) / max(len(curve) - 1, 1),
        "steps": len(records),
        "rate": job.rate,
        "budget": job.budget,
        "settings": list(job.extra),
        "seconds": time.perf_counter() - started,
        **figures,
        "curve": curve,
    }


def _point(trainer: Any) -> dict[str, Any]:
    return {
        "sampled_tokens": trainer.state.sampled_tokens,
        "sampled_em": sampled_em(trainer, QUESTIONS_ON_THE_WAY),
    }


def tuned_rates(folder: Path) -> dict[str, float]:
    """The best rate of each method by mean sampled EM over the tuning runs; rows without take `at2po`'s."""
    scores: dict[str, dict[float, list[float]]] = {}
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        scores.setdefault(run["method"], {}).setdefault(run["rate"], []).append(run["mean_sampled_em"])
    best = {
        method: max(rates, key=lambda rate: sum(rates[rate]) / len(rates[rate]))
        for method, rates in scores.items()
    }
    return {method: best.get(method, best.get("at2po", DEFAULT_RATE)) for method in METHODS}


def next_step_fits(records: Sequence[Mapping[str, Any]], budget: int) -> bool:
    """Return whether another step ends nearer to the budget than stopping here."""
    if not records:
        return True
    return bool(records[-1]["sampled_tokens"] + records[-1]["step_tokens"] / 2 <= budget)


def _mean(records: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [float(record[name]) for record in records if name in record]
    return sum(values) / len(values) if values else None


def work(job: Job) -> str:
    """Do a run and write its figures."""
    figures = run(job)
    write_figures(Path(job.result), figures)
    return (
        f"{job.method}, seed {job.seed}: sampled EM {figures['sampled_em']:.3f} in {figures['seconds']:.0f} s"
    )


def results_folder(arguments: argparse.Namespace) -> Path:
    """Return the folder for the figures of these runs; makes it if need be."""
    name = "tuning" if arguments.tune else "runs"
    folder: Path = arguments.out / (f"study-{arguments.study}" if arguments.study else name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def jobs_to_do(arguments: argparse.Namespace, start: Path) -> list[Job]:
    """All runs that are asked for and not done, seed by seed, so that a stopped race is balanced."""
    folder = results_folder(arguments)
    tuned = tuned_rates(arguments.out / "tuning")
    jobs = []
    for seed in arguments.seeds:
        for method in arguments.methods:
            if arguments.tune:
                rates: tuple[float, ...] = TUNING_RATES if method in TUNED else ()
            else:
                rates = (arguments.rate or tuned[method],)
            for rate in rates:
                number = TUNING_SEED + seed if arguments.tune else seed
                name = method.replace(" ", "_").replace("+", "and")
                result = folder / f"{name}.lr{rate:g}.seed{number}.json"
                if not result.exists():
                    extra = (*arguments.task, *arguments.set)
                    jobs.append(Job(method, number, rate, arguments.budget, str(start), str(result), extra))
    return jobs
