"""Draws the learning curve of a run, and makes and saves figures for `plots`.

The pictures need no display and none of matplotlib's global state; they are readable at 800 pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from at2po_agent.report.run_folder import (
    METRICS,
    NothingYetError,
    asked_questions,
    check_run_folder,
    read_metrics,
)
from at2po_agent.types import FloatArray
from at2po_env.errors import DataError, require

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555")
SIZE, DPI = (8.0, 5.4), 160


class Series(NamedTuple):
    """One measured quantity over a run: float[n] of training steps, sampled tokens so far, values."""

    step: FloatArray
    tokens: FloatArray
    value: FloatArray


@dataclass(frozen=True)
class RunCurves:
    """The learning of a run, as its metrics tell it.

    Attributes:
        name: The run.
        training: Sampled exact match of each step's leaves, on training questions.
        greedy: Greedy exact match in evaluations.
        sampled: Sampled exact match in evaluations.
        score: "Success" where the environment reports it, else "Exact match" where it scores that, else
            "Reward": the curves show it.
        asked: The questions of the evaluations: "held-out questions", or what else they are.
    """

    name: str
    training: Series
    greedy: Series
    sampled: Series
    score: str = "Exact match"
    asked: str = "held-out questions"


def read_curves(run: Path) -> RunCurves:
    """Read the curves of a run.

    Raises:
        DataError: No run, or it has not measured anything yet.
    """
    records = read_metrics(check_run_folder(run))
    try:
        curves = RunCurves(
            run.resolve().name,
            _series(records, {"kind": "train"}),
            _series(records, {"kind": "eval", "mode": "greedy"}),
            _series(records, {"kind": "eval", "mode": "sampled"}),
            "Success"
            if any(_success(record) is not None for record in records)
            else "Exact match"
            if any(record.get("em") is not None for record in records)
            else "Reward",
            next((asked_questions(one) for one in records if one.get("kind") == "eval"), "evaluation"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{run / METRICS}: a record has no number as step, em or sampled_tokens ({error!r}). "
            "Fix: restore or remove the line."
        ) from error
    if not any(len(series.step) for series in (curves.training, curves.greedy, curves.sampled)):
        raise NothingYetError(
            f"{run}: nothing to plot yet, the run has not recorded a training step or an evaluation."
        )
    return curves


def smooth(values: FloatArray, window: int) -> tuple[FloatArray, FloatArray]:
    """Compute a centred moving mean and population standard deviation; windows are shorter at the ends.

    Args:
        values: float[n].
        window: Number of values, odd.

    Returns:
        float[n] mean, float[n] standard deviation.
    """
    half = window // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return np.array([part.mean() for part in parts]), np.array([part.std() for part in parts])


def smoothing_window(count: int) -> int:
    """Choose an odd window of about an eighth of a curve, at most 25 points."""
    return min(25, max(1, count // 8) // 2 * 2 + 1)


def draw_run(run: Path, path: Path) -> Path:
    """Write a run's `learning_curve.png`: exact match above, sampled tokens below."""
    curves = read_curves(run)
    figure, axes = new_figure(2, 1, heights=(3.2, 1), sharex=True)
    top, bottom = axes[:, 0]
    _training(top, curves, COLOURS[0], label="sampled, training questions (moving mean ± std)")
    _points(top, curves.sampled, COLOURS[0], label=f"sampled, {curves.asked}", look="s")
    _points(top, curves.greedy, COLOURS[1], label=f"greedy, {curves.asked}", look="o-")
    for index in sorted({0, len(curves.greedy.step) - 1} if len(curves.greedy.step) else ()):
        at = curves.greedy.step[index], curves.greedy.value[index]  # write the first and the last value there
        above = at[1] < 0.9
        offset, side = (-6 if index == 0 else 0, 8 if above else -9), "bottom" if above else "top"
        style = {"textcoords": "offset points", "ha": "center", "va": side, "fontweight": "bold"}
        top.annotate(f"{at[1]:.3f}", at, xytext=offset, color=COLOURS[1], zorder=5, **style)
    _finish_scores(top, f"{curves.score} · {curves.name}")
    top.tick_params(labelbottom=False)
    tokens = curves.training if len(curves.training.step) else curves.greedy
    bottom.fill_between(tokens.step, tokens.tokens, color="#9aa5b1", alpha=0.35, linewidth=0)
    bottom.plot(tokens.step, tokens.tokens, color="#5c6570", linewidth=1.5)
    bottom.set_ylim(bottom=0)
    bottom.set_ylabel("sampled\ntokens")
    in_thousands(bottom.yaxis)
    bottom.set_xlabel("training step")
    return save_figure(figure, path)


def _series(records: Sequence[Mapping[str, Any]], kind: Mapping[str, str]) -> Series:
    """Records of one kind that measured a score; a step done again after a resume counts once."""
    latest: dict[float, tuple[float, float, float]] = {}
    tokens = 0.0
    for record in records:
        tokens = float(record.get("sampled_tokens") or tokens) if record.get("kind") == "train" else tokens
        success = _success(record)
        score = record.get("em") if success is None else success
        score = record.get("reward") if score is None else score
        if all(record.get(key) == value for key, value in kind.items()) and score is not None:
            step = float(record["step"])
            latest[step] = (step, tokens, float(score))
    table = np.array(sorted(latest.values()), dtype=np.float64).reshape(-1, 3)
    return Series(table[:, 0], table[:, 1], table[:, 2])


def _success(record: Mapping[str, Any]) -> Any:
    """The share of successes in a record of training or of an evaluation; None where it has none."""
    return record.get("metrics/success", record.get("metrics", {}).get("success"))


def new_figure(
    rows: int,
    columns: int,
    *,
    size: tuple[float, float] = SIZE,
    heights: Sequence[float] | None = None,
    sharex: bool | str = False,
    sharey: bool | str = False,
) -> tuple[Any, Any]:
    """Make a figure in the style of all reports.

    Args:
        rows: Rows of panels.
        columns: Panels of a row.
        size: Width and height in inches.
        heights: Relative heights of the rows; None makes them equal.
        sharex: As in matplotlib's `subplots`.
        sharey: Likewise.

    Returns:
        The figure, and an array [rows, columns] of its axes.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib = require("matplotlib", "agent")
    figure_module = require("matplotlib.figure", "agent")
    style = {
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#9aa5b1",
        "axes.labelcolor": "#1b1f24",
        "xtick.color": "#5c6570",
        "ytick.color": "#5c6570",
        "grid.color": "#e3e7ec",
    }
    with matplotlib.rc_context(style):
        figure = figure_module.Figure(figsize=size, dpi=DPI, layout="constrained", facecolor="white")
        axes = figure.subplots(
            rows, columns, sharex=sharex, sharey=sharey, height_ratios=heights, squeeze=False
        )
        for each in axes.flat:
            each.grid(visible=True, axis="y")
            each.set_axisbelow(True)
    return figure, axes


def _training(axes: Any, curves: RunCurves, colour: str, *, label: str) -> None:
    series = curves.training
    if not len(series.step):
        return
    mean, std = smooth(series.value, smoothing_window(len(series.value)))
    axes.fill_between(series.step, mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)
    axes.plot(series.step, mean, color=colour, linewidth=2, alpha=0.9, label=label)


def _points(axes: Any, series: Series, colour: str, *, label: str, look: str) -> None:
    if len(series.step):
        style = {"markersize": 6.5, "linewidth": 2, "markeredgecolor": "white"}
        axes.plot(
            series.step, series.value, look, color=colour, label=label, clip_on=False, zorder=4, **style
        )


def _finish_scores(axes: Any, title: str) -> None:
    if not title.startswith("Reward"):  # a reward has a range of its own
        axes.set_ylim(0, 1)
        axes.set_yticks(np.linspace(0, 1, 6))
    axes.set_ylabel(title.partition(" ·")[0].lower())
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color="#1b1f24", pad=12)
    handles, labels = axes.get_legend_handles_labels()
    columns = 3 if max(map(len, labels), default=0) < 24 else 2
    axes.figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=10, frameon=False)


def in_thousands(axis: Any) -> None:
    """Label an axis 200k, 1M ..."""
    axis.set_major_formatter(require("matplotlib.ticker", "agent").EngFormatter(sep=""))


def save_figure(figure: Any, path: Path) -> Path:
    """Write a figure as the PNG or SVG that the path names; equal figures give equal files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".svg":
        with require("matplotlib", "agent").rc_context({"svg.hashsalt": "at2po"}):
            figure.savefig(path, metadata={"Creator": "at2po", "Date": None})
    else:
        require("matplotlib.backends.backend_agg", "agent").FigureCanvasAgg(figure)
        figure.savefig(path, metadata={"Software": "at2po"})
    return path
