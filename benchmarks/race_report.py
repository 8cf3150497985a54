"""Turns the race's result files into CSV files, tables and a plot."""

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.race import METHODS

COLUMNS = (
    *("method", "seed", "sampled_tokens", "em", "sampled_em", "start_sampled_em", "mean_sampled_em"),
    *("tokens_to_grpo", "turn_kl_entropy", "clip_fraction", "token_kl", "steps", "leaves", "rate", "seconds"),
)
TUNING_COLUMNS = (
    "method",
    "rate",
    "seed",
    "sampled_tokens",
    "em",
    "sampled_em",
    "mean_sampled_em",
    "clip_fraction",
)
STUDY_COLUMNS = (
    *("study", "rules", "method", "budget", "rate", "seed", "sampled_tokens", "start_sampled_em"),
    *("sampled_em", "em", "mean_sampled_em", "clip_fraction", "turn_kl_entropy", "steps"),
)
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5% quantiles of Student's t for 1, 2, ... degrees of freedom."""


class Estimate(NamedTuple):
    """A mean over seeds with the half width of its 95% interval; nan for one seed."""

    mean: float
    half: float
    seeds: int

    def __str__(self) -> str:
        if self.seeds == 0:
            return "-"
        return f"{self.mean:.3f}" if math.isnan(self.half) else f"{self.mean:.3f} ± {self.half:.3f}"


def estimate(values: Iterable[float | None]) -> Estimate:
    """Mean and Student's t interval over the values that exist."""
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    if not known.size:
        return Estimate(math.nan, math.nan, 0)
    if known.size == 1:
        return Estimate(float(known[0]), math.nan, 1)
    quantile = _STUDENT[min(known.size - 2, len(_STUDENT) - 1)]
    return Estimate(
        float(known.mean()), float(quantile * known.std(ddof=1) / math.sqrt(known.size)), known.size
    )


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Finished runs, in the order of the methods."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    order = list(METHODS)
    return sorted(found, key=lambda result: (order.index(result["method"]), result["seed"], result["rate"]))


def tokens_to_reach(curve: Sequence[Mapping[str, float]], level: float) -> float | None:
    """Sampled tokens at which a curve first reaches a level, interpolated; None where it never does."""
    for before, after in pairwise(curve):
        low, high = before["sampled_em"], after["sampled_em"]
        if low < level <= high:
            share = (level - low) / (high - low)
            return before["sampled_tokens"] + share * (after["sampled_tokens"] - before["sampled_tokens"])
    return 0.0 if curve and curve[0]["sampled_em"] >= level else None


def write_report(results: Path, report: Path, *, tuning: Path | None = None) -> None:
    """Write `algorithms.csv`, `algorithms_curve.csv`, `algorithms.md` and `algorithms.png` into a folder.

    Args:
        results: Folder of the finished runs.
        report: The folder for the report.
        tuning: Folder of the tuning runs, which go to `tuning.csv`.
    """
    runs = read_results(results)
    report.mkdir(parents=True, exist_ok=True)
    grpo = estimate(run["sampled_em"] for run in runs if run["method"] == "grpo")
    for run in runs:
        reached = tokens_to_reach(run["curve"], grpo.mean) if grpo.seeds else None
        run["tokens_to_grpo"] = None if reached is None else round(reached)
    _write_csv(report / "algorithms.csv", COLUMNS, runs)
    points = [{**run, **point} for run in runs for point in run["curve"]]
    _write_csv(report / "algorithms_curve.csv", ("method", "seed", "sampled_tokens", "sampled_em"), points)
    if tuning is not None and (tuned := read_results(tuning)):
        _write_csv(report / "tuning.csv", TUNING_COLUMNS, tuned)
    (report / "algorithms.md").write_text(table(runs), encoding="utf-8")
    draw(runs, report / "algorithms.png")


def write_studies(folders: Sequence[Path], report: Path) -> None:
    """Write `studies.csv` (a row per run) and `studies.md` (means per study, settings and method).

    Args:
        folders: Folders of races; their `study-*` runs are taken.
        report: The folder for the report.
    """
    report.mkdir(parents=True, exist_ok=True)
    runs = [
        {"study": path.name.removeprefix("study-"), "rules": " ".join(run["settings"]), **run}
        for folder in folders
        for path in sorted(folder.glob("study-*"))
        for run in read_results(path)
    ]
    _write_csv(report / "studies.csv", STUDY_COLUMNS, runs)
    lines = [
        "| study | settings | method | budget | rate | seeds | at the start | sampled EM | on the way | "
        "greedy EM | clip fraction |",
        "|" + "---|" * 11,
    ]
    place = ("study", "rules", "method", "budget", "rate")
    for key in dict.fromkeys(tuple(run[name] for name in place) for run in runs):
        own = [run for run in runs if tuple(run[name] for name in place) == key]
        names = ("start_sampled_em", "sampled_em", "mean_sampled_em", "em", "clip_fraction")
        cells = [str(estimate(run[name] for run in own)) for name in names]
        study, rules, method, budget, rate = key
        shown = " ".join(f"`{rule}`" for rule in rules.split())
        lines.append(
            f"| {study} | {shown} | {method} | {budget} | {rate:g} | {len(own)} | " + " | ".join(cells) + " |"
        )
    (report / "studies.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row per method, means over seeds with 95% intervals; differences to GRPO seed by seed."""
    lines = [
        "| method | rate | seeds | sampled EM | against GRPO | greedy EM | mean sampled EM on the way | "
        "against GRPO | tokens to GRPO's EM | turn-KL entropy | clip fraction |",
        "|" + "---|" * 11,
    ]
    grpo = {run["seed"]: run for run in runs if run["method"] == "grpo"}
    for method in METHODS:
        own = [run for run in runs if run["method"] == method]
        if not own:
            continue
        reached = [run["tokens_to_grpo"] for run in own if run["tokens_to_grpo"] is not None]
        cells = [
            str(estimate(run["sampled_em"] for run in own)),
            _difference(own, grpo, "sampled_em"),
            str(estimate(run["em"] for run in own)),
            str(estimate(run["mean_sampled_em"] for run in own)),
            _difference(own, grpo, "mean_sampled_em"),
        ]
        cells.append(f"{np.mean(reached) / 1000:.0f}k ({len(reached)} of {len(own)})" if reached else "never")
        cells += [str(estimate(run[name] for run in own)) for name in ("turn_kl_entropy", "clip_fraction")]
        rates = ", ".join(f"{rate:g}" for rate in sorted({run["rate"] for run in own}))
        lines.append(f"| {method} | {rates} | {len(own)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _difference(runs: Sequence[Mapping[str, Any]], others: Mapping[int, Mapping[str, Any]], name: str) -> str:
    """Mean difference to the run of the same seed, which was asked the same questions."""
    pairs = [(run, others[run["seed"]]) for run in runs if run["seed"] in others]
    found = estimate(run[name] - other[name] for run, other in pairs if run is not other)
    return str(found) if found.mean < 0 or not found.seeds else f"+{found}"


def draw(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Curves of the nine algorithms with their intervals, and the final sampled EM of every row."""
    figure = Figure(figsize=(12.0, 5.4), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for number, method in enumerate([name for name in METHODS if " " not in name]):
        curves = [run["curve"] for run in runs if run["method"] == method]
        if not curves:
            continue
        grid = np.linspace(0, min(curve[-1]["sampled_tokens"] for curve in curves), 21)
        rows = np.array(
            [
                np.interp(grid, [p["sampled_tokens"] for p in curve], [p["sampled_em"] for p in curve])
                for curve in curves
            ]
        )
        estimates = [estimate(column) for column in rows.T]
        mean = np.array([value.mean for value in estimates])
        half = np.nan_to_num(np.array([value.half for value in estimates]))
        colour = f"C{number}"
        left.plot(grid / 1000, mean, color=colour, label=f"{method} ({len(curves)})")
        left.fill_between(grid / 1000, mean - half, mean + half, color=colour, alpha=0.12, linewidth=0)
    left.set(xlabel="sampled tokens (thousands)", ylabel="sampled exact match, held-out worlds")
    left.legend(fontsize=8, title="method (seeds)")
    finals = [
        (name, estimate(run["sampled_em"] for run in runs if run["method"] == name)) for name in METHODS
    ]
    shown = [(name, value) for name, value in finals if value.seeds][::-1]
    places = np.arange(len(shown))
    half = np.nan_to_num([value.half for _, value in shown])
    right.errorbar([value.mean for _, value in shown], places, xerr=half, fmt="o", capsize=3, color="#0072B2")
    right.set_yticks(places, [f"{name} ({value.seeds})" for name, value in shown], fontsize=8)
    right.set_xlabel("sampled exact match at the end (mean, 95% interval)")
    right.grid(axis="x", alpha=0.3)
    figure.savefig(path)


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            rounded = {name: _short(row[name]) for name in columns}
            writer.writerow(rounded)


def _short(value: Any) -> Any:
    return round(value, 5) if isinstance(value, float) else value
