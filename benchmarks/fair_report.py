"""Turns the runs of `benchmarks.fair` into comparisons, tables and a plot.

A difference between two methods is taken run by run: same start, same seed, same questions. Runs from one
cold start are not independent, so they are first averaged: the standard error and the p-value come from the
means of the starts (Student's t, starts - 1 degrees of freedom). Holm's correction is over all fixed
comparisons on all tasks.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from scipy import stats

from benchmarks._runs import table_row, write_tables
from benchmarks.fair import COMPARISONS, METHODS, PARTS, TASKS

Run = Mapping[str, Any]
COLUMNS = (
    *("task", "method", "start", "seed", "rate", "share", "budget", "updates_per_step", "start_em"),
    *("sampled_em", "em", "way_em", "sampled_tokens", "tool_calls", "updates", "steps", "leaves"),
    *("clip_fraction", "entropy", "turn_kl_entropy", "training_seconds", "seconds"),
)


class Comparison(NamedTuple):
    """One fixed comparison on one task.

    Attributes:
        task: The task.
        first: A method.
        second: The method whose EM is subtracted.
        difference: Mean difference of sampled EM at the end.
        error: Its standard error, clustered by start; nan for one start.
        p: Two-sided p-value; nan for one start.
        adjusted: p after Holm's correction over all comparisons.
        starts: How many cold starts.
        runs: How many pairs of runs.
    """

    task: str
    first: str
    second: str
    difference: float
    error: float
    p: float
    adjusted: float
    starts: int
    runs: int


def clustered(pairs: Iterable[tuple[int, float]]) -> tuple[float, float, float, int]:
    """Mean of numbers that come in clusters: (mean of cluster means, standard error, p-value, clusters).

    Args:
        pairs: Cluster and number.
    """
    clusters: dict[int, list[float]] = {}
    for cluster, value in pairs:
        clusters.setdefault(cluster, []).append(value)
    means = [statistics.fmean(values) for values in clusters.values()]
    mean = statistics.fmean(means)
    if len(means) < 2:
        return mean, math.nan, math.nan, len(means)
    error = statistics.stdev(means) / math.sqrt(len(means))
    if error == 0:
        return mean, 0.0, 1.0 if mean == 0 else 0.0, len(means)
    return mean, error, float(2 * stats.t.sf(abs(mean) / error, len(means) - 1)), len(means)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction; nan stays nan and does not count.

    The k-th smallest of m is multiplied by m - k + 1, and never falls below the one before it.
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    adjusted = [math.nan] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[place] = largest
    return adjusted


def compare(runs: Sequence[Run], pairs: Sequence[tuple[str, str]] = COMPARISONS) -> list[Comparison]:
    """All fixed comparisons that have runs of the same starts and seeds, with 4 updates in a step."""
    found: list[Comparison] = []
    for task in TASKS:
        own = [one for one in runs if one["task"] == task and one["updates_per_step"] == 4]
        ends = {(one["method"], one["start"], one["seed"]): one["sampled_em"] for one in own}
        for first, second in pairs:
            differences = [
                (start, em - ends[second, start, seed])
                for (method, start, seed), em in ends.items()
                if method == first and (second, start, seed) in ends
            ]
            if differences:
                mean, error, p, starts = clustered(differences)
                found.append(Comparison(task, first, second, mean, error, p, p, starts, len(differences)))
    adjusted = holm([one.p for one in found])
    return [one._replace(adjusted=p) for one, p in zip(found, adjusted, strict=True)]


def tokens_to_reach(curve: Sequence[Sequence[float]], level: float) -> float | None:
    """Sampled tokens at which a curve of (tokens, EM) first reaches a level; None where it never does."""
    before = curve[0]
    if before[1] >= level:
        return before[0]
    for point in curve[1:]:
        if point[1] >= level:
            return before[0] + (level - before[1]) / (point[1] - before[1]) * (point[0] - before[0])
        before = point
    return None


def mean_curve(runs: Sequence[Run], points: int = 25) -> list[tuple[float, float]]:
    """Mean EM of several runs over a common grid of tokens, interpolated between their points."""
    last = min(one["curve"][-1][0] for one in runs)
    grid = [last * place / (points - 1) for place in range(points)]
    return [(tokens, statistics.fmean(_at(one["curve"], tokens) for one in runs)) for tokens in grid]


def _at(curve: Sequence[Sequence[float]], tokens: float) -> float:
    for before, after in pairwise(curve):
        if tokens <= after[0]:
            share = (tokens - before[0]) / max(after[0] - before[0], 1e-9)
            return float(before[1] + share * (after[1] - before[1]))
    return float(curve[-1][1])


def write_report(runs: Sequence[Run], tuning: Sequence[Run], folder: Path) -> None:
    """Write `fair.csv`, `fair_tuning.csv`, `fair_curve.csv`, `fair.png`, and the tables of `fair.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("fair.csv", runs), ("fair_tuning.csv", tuning)):
        _write_csv(folder / name, COLUMNS, rows)
    points = [{**one, "tokens": tokens, "point_em": em} for one in runs for tokens, em in one["curve"]]
    place = ("task", "method", "start", "seed", "updates_per_step", "tokens", "point_em")
    _write_csv(folder / "fair_curve.csv", place, points)
    tables = f"{table(runs)}\n{comparison_table(compare(runs))}"
    if parts := [one._replace(adjusted=math.nan) for one in compare(runs, PARTS)]:
        tables += f"\nSingle parts, without correction:\n\n{comparison_table(parts)}"
    write_tables(folder / "fair.md", "The race", "benchmarks/fair.py", tables)
    if runs:
        draw(runs, folder / "fair.png")


def table(runs: Sequence[Run]) -> str:
    """Markdown: a row per task, number of updates and method; standard errors are clustered by start."""
    titles = (
        *("task", "updates a step", "method", "rate, clip share", "starts x seeds", "before", "sampled EM"),
        *("greedy EM", "on the way", "tokens to GRPO's EM", "tool calls", "updates", "clipped", "seconds"),
    )
    lines = [table_row(titles), table_row(["---"] * len(titles))]
    keys = dict.fromkeys((one["task"], one["updates_per_step"], one["method"]) for one in runs)
    for task, updates, method in sorted(keys):
        group = [one for one in runs if (one["task"], one["updates_per_step"]) == (task, updates)]
        own = [one for one in group if one["method"] == method]
        grpo = [one["sampled_em"] for one in group if one["method"] == "grpo"]
        reached = tokens_to_reach(mean_curve(own), statistics.fmean(grpo)) if grpo else None
        settings = sorted({(one["rate"], one["share"]) for one in own})
        starts = len({one["start"] for one in own})
        lines.append(
            table_row(
                [
                    task,
                    str(updates),
                    method,
                    "; ".join(f"{rate:g}, {share:g}" for rate, share in settings),
                    f"{starts} x {len(own) / starts:g}",
                    _mean(own, "start_em"),
                    _clustered(own, "sampled_em"),
                    _mean(own, "em"),
                    _clustered(own, "way_em"),
                    "never" if reached is None else f"{reached / 1000:.0f}k",
                    _mean(own, "tool_calls", ".0f"),
                    _mean(own, "updates", ".0f"),
                    _mean(own, "clip_fraction"),
                    _mean(own, "training_seconds", ".0f"),
                ]
            )
        )
    return "\n".join(lines) + "\n"


def comparison_table(found: Sequence[Comparison]) -> str:
    """Markdown: the fixed comparisons, with Holm's correction."""
    lines = [
        table_row(
            ["task", "comparison", "difference", "standard error", "p", "p, Holm", "starts", "pairs of runs"]
        ),
        table_row(["---"] * 8),
    ]
    lines += [
        table_row(
            [
                one.task,
                f"{one.first} - {one.second}",
                f"{one.difference:+.3f}",
                _number(one.error),
                _number(one.p),
                _number(one.adjusted),
                str(one.starts),
                str(one.runs),
            ]
        )
        for one in found
    ]
    return "\n".join(lines) + "\n"


def draw(runs: Sequence[Run], path: Path) -> None:
    """Curves of the methods on each task, with one standard error over starts at the end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = [task for task in TASKS if any(one["task"] == task for one in runs)]
    figure = Figure(figsize=(6.0 * len(tasks), 4.6), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        group = [one for one in runs if one["task"] == task and one["updates_per_step"] == 4]
        raced = {one["method"] for one in group}
        for number, method in enumerate(method for method in METHODS if method in raced):
            own = [one for one in group if one["method"] == method]
            curve = mean_curve(own)
            tokens, em = [point[0] / 1000 for point in curve], [point[1] for point in curve]
            mean, error, _, starts = clustered((one["start"], one["sampled_em"]) for one in own)
            label = f"{method} ({starts} starts, {len(own)} runs)"
            axes.plot(tokens, em, color=f"C{number}", label=label)
            axes.errorbar([tokens[-1]], [mean], yerr=[0.0 if math.isnan(error) else error], fmt="o",
                          color=f"C{number}", capsize=3)  # fmt: skip
        axes.set(
            xlabel="sampled tokens (thousands)", ylabel="sampled exact match, held-out worlds", title=task
        )
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path)


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Run]) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            values = [row.get(name) for name in columns]
            writer.writerow([round(value, 5) if isinstance(value, float) else value for value in values])


def _clustered(runs: Sequence[Run], name: str) -> str:
    mean, error, _, _ = clustered((one["start"], one[name]) for one in runs)
    return f"{mean:.3f}" + ("" if math.isnan(error) else f" ({error:.3f})")


def _mean(runs: Sequence[Run], name: str, shown: str = ".3f") -> str:
    values = [one[name] for one in runs if one.get(name) is not None]
    return f"{statistics.fmean(values):{shown}}" if values else "-"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
