"""Draws the figures that papers have, from any runs: training, scores, forks and cost; `at2po plot`.

Each figure is drawn from the numbers of `plot_data` and `fork_points` alone. Colours are those of Okabe and
Ito, which colour-blind readers can tell apart; groups also differ in their markers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from at2po_agent.report.curves import COLOURS, in_thousands, new_figure, save_figure
from at2po_agent.report.fork_points import Forks, forks
from at2po_agent.report.plot_data import (
    Cost,
    Curve,
    Group,
    as_json,
    cost,
    curve,
    group_runs,
    read_run,
)
from at2po_agent.report.run_folder import NothingYetError
from at2po_env.errors import ConfigError, DataError, require

TRAINING = {
    "entropy": ("Entropy of a turn", "nats per token"),
    "turn_kl": ("Turn KL, old to new policy", "nats per token"),
    "clip_fraction": ("Clip share", "share of tokens"),
    "update_norm": ("Update size", "L2 norm of the change of weights"),
}
"""Title and unit of each panel of the figure `training`."""
SCORES = {
    "exact_match": ("em", "exact match"),
    "reward": ("reward", "reward"),
    "success": ("metrics/success", "success"),
}
"""What the records call each score, and its name in figures."""
FIGURES = ("training", *SCORES, "forks", "cost")
FORMATS = ("png", "svg")
KINDS = {
    "training": "line: sampled, training questions",
    "greedy": "filled: greedy, in evaluations",
    "sampled": "open: sampled, in evaluations",
}
WIDE, MARKERS = (10.0, 7.6), "os^DvPX"
PHASE_COLOURS = {
    "sampling": "#0072B2",
    "rollout": "#56B4E9",
    "update": "#D55E00",
    "old_log_probs": "#E69F00",
    "reference": "#F0E442",
    "packing": "#009E73",
    "credit": "#CC79A7",
    "rest": "#9aa5b1",
    "paused": "#1b1f24",
}
SMALL_PHASE = 0.01


class Plots(NamedTuple):
    """What was drawn.

    Attributes:
        groups: The groups of runs.
        files: The picture of each figure.
        numbers: What each picture shows.
        left_out: Why a figure is missing, by its name.
        notes: What is missing within a figure.
    """

    groups: list[Group]
    files: dict[str, Path]
    numbers: dict[str, Any]
    left_out: dict[str, str]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        groups = [
            {"label": group.label, "runs": [str(run.path) for run in group.runs]} for group in self.groups
        ]
        figures = {
            name: {"file": str(file), "numbers": as_json(self.numbers[name])}
            for name, file in self.files.items()
        }
        return {"groups": groups, "figures": figures, "left_out": self.left_out, "notes": self.notes}


def plot_runs(
    runs: Sequence[Path], out: Path, *, only: Sequence[str] | None = None, image: str = "png"
) -> Plots:
    """Draw the figures of some runs; runs that differ only in their seed become one mean with its interval.

    Args:
        runs: Their folders; one that is given twice counts once.
        out: Folder for the pictures.
        only: Names out of `FIGURES`; None draws all, without scores that no run reports.
        image: `png` or `svg`.

    Raises:
        ConfigError: No such figure or format, or `out` is a file.
        DataError: Not a run's folder, a damaged file, or a run without steps; or every figure was left out.
        MissingExtraError: matplotlib is not installed.
    """
    wrong = [name for name in only or () if name not in FIGURES]
    if wrong:
        raise ConfigError(f"--only: no figure named {wrong[0]!r}; expected {', '.join(FIGURES)}")
    if image not in FORMATS:
        raise ConfigError(f"--format: got {image!r}, expected {' or '.join(FORMATS)}")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out: {out} is a file, expected a folder for the pictures")
    distinct = {run.resolve(): run for run in reversed(runs)}
    groups = group_runs([read_run(run) for run in reversed(distinct.values())])
    plots = Plots(groups, {}, {}, {}, [])
    for group in groups:
        if len({run.seed for run in group.runs}) < len(group.runs):
            plots.notes.append(f"{group.label}: runs of one seed count as independent in its intervals")
    for name in dict.fromkeys(only or FIGURES):
        try:
            numbers, figure = _DRAWN[name](groups, name, plots.notes)
        except DataError as error:
            unreported = name in SCORES and isinstance(error, NothingYetError)
            if only is not None or not unreported:
                plots.left_out[name] = str(error)
            continue
        plots.numbers[name] = numbers
        plots.files[name] = save_figure(figure, out / f"{name}.{image}")
    if not plots.files:
        reasons = "; ".join(f"{name}: {why}" for name, why in plots.left_out.items())
        raise NothingYetError(f"nothing to plot. {reasons}")
    return plots


def _training(groups: Sequence[Group], name: str, notes: list[str]) -> tuple[dict[str, list[Curve]], Any]:
    """Entropy, turn KL, clip share and update size against steps."""
    numbers = {key: [curve(group, key) for group in groups] for key in TRAINING}
    figure, axes = new_figure(2, 2, size=WIDE)
    ticker = require("matplotlib.ticker", "agent")
    for panel, (key, (title, unit)) in zip(axes.flat, TRAINING.items(), strict=True):
        for index, each in enumerate(numbers[key]):
            _line(panel, each.step, each, index)
            if not len(each.step):
                notes.append(f"{name}: {each.label} has no {key}")
        _title(panel, title, unit)
        panel.set_xlabel("training step")
        panel.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:.4g}"))
        _whole_numbers(panel, [step for each in numbers[key] for step in each.step])
        if any(len(each.step) for each in numbers[key]):
            _keep_to_means(panel, numbers[key])
            panel.set_ylim(bottom=0)
        else:
            _say(panel, "not recorded in these runs")
    _legend(figure, groups, _smoothing(curves for curves in numbers.values()))
    return numbers, figure


def _scores(groups: Sequence[Group], name: str, notes: list[str]) -> tuple[list[Curve], Any]:
    """A score in training and in evaluations against steps, sampled tokens, tool calls and time."""
    key, word = SCORES[name]
    numbers = [curve(group, key, kind) for kind in KINDS for group in groups]
    shown = [each for each in numbers if len(each.step)]
    if not shown:
        raise NothingYetError(f"no run reports {word} ({key}).")
    figure, axes = new_figure(2, 2, size=WIDE, sharey=True)
    unit, divisor = _time_unit(max((_last(each.costs["seconds"]) for each in shown), default=0.0))
    places = {
        "step": ("training step", 1.0),
        "sampled_tokens": ("sampled tokens", 1.0),
        "tool_calls": ("tool calls", 1.0),
        "seconds": (f"training time ({unit})", divisor),
    }
    labels = [group.label for group in groups]
    for panel, (cost_name, (title, scale)) in zip(axes.flat, places.items(), strict=True):
        drawn = False
        for each in shown:
            x = (each.step if cost_name == "step" else each.costs[cost_name]) / scale
            drawn |= bool(np.isfinite(x).any())
            index = labels.index(each.label)
            if each.kind == "training":
                _line(panel, x, each, index)
            else:
                _means(panel, x, each, index, filled=each.kind == "greedy")
        panel.set_xlabel(title)
        if cost_name == "step":
            _whole_numbers(panel, [step for each in shown for step in each.step])
        elif cost_name != "seconds":
            in_thousands(panel.xaxis)
        if not drawn:
            _say(panel, "not recorded in these runs")
            notes.append(f"{name}: no run tells its {cost_name.replace('_', ' ')}")
    for panel in axes[:, 0]:
        panel.set_ylabel(word)
        if name == "reward":
            _keep_to_means(panel, shown)
        else:
            panel.set_ylim(0, 1)
    figure.suptitle(word.capitalize(), x=0.01, ha="left", fontsize=12, fontweight="bold", color="#1b1f24")
    kinds = [KINDS[kind] for kind in KINDS if any(each.kind == kind for each in shown)]
    _legend(figure, groups, [*kinds, *_smoothing([shown])])
    return numbers, figure


def _forks(groups: Sequence[Group], name: str, notes: list[str]) -> tuple[list[Forks], Any]:
    """Depth and entropy of fork points against the variance of the rewards below them."""
    numbers, problems = [], []
    for group in groups:
        try:
            numbers.append(forks(group))
        except DataError as error:
            problems.append(str(error))
    if not numbers:
        raise NothingYetError(problems[0])
    notes += [f"{name}: {problem}" for problem in problems]
    figure, (axes,) = new_figure(1, 2, size=(10.0, 5.0), sharey=True)
    labels = [group.label for group in groups]
    jitter = np.random.default_rng(0)
    for each in numbers:
        index = labels.index(each.label)
        shift = 0.5 * ((index + 0.5) / len(groups) - 0.5)
        variance = [point.variance for point in each.points]
        spread = jitter.uniform(-0.2, 0.2, len(variance)) / len(groups)
        dots = {"s": 9, "color": _colour(index), "alpha": 0.2, "linewidths": 0, "rasterized": True}
        axes[0].scatter(np.array([point.depth for point in each.points]) + shift + spread, variance, **dots)
        axes[1].scatter([point.entropy for point in each.points], variance, **dots)
        _means(axes[0], each.by_depth.x + shift, each.by_depth, index)
        _means(axes[1], each.by_entropy.x, each.by_entropy, index, band=len(each.by_entropy.x) > 1)
    _title(axes[0], "Fork depth", "variance of the rewards below the fork")
    axes[0].set_xlabel("turn at which the branches part (1: the chains begin)")
    _whole_numbers(axes[0], [point.depth for each in numbers for point in each.points])
    _title(axes[1], "Entropy of the turn that was sampled again", "")
    axes[1].set_xlabel("nats per token")
    most = max(point.variance for each in numbers for point in each.points) or 1.0
    axes[0].set_ylim(-0.03 * most, 1.08 * most)  # so that dots at the ends are seen whole
    found = {
        each.label: f"{len(each.points)} fork points"
        + ("" if math.isnan(each.rank_correlation) else f", rank correlation {each.rank_correlation:+.2f}")
        for each in numbers
    }
    _legend(figure, groups, ["dots: fork points", "markers: means of a depth or an entropy bin"], found)
    return numbers, figure


def _cost(groups: Sequence[Group], name: str, notes: list[str]) -> tuple[list[Cost], Any]:
    """Seconds of a step by phase, one panel for each group."""
    numbers, problems = [], []
    for group in groups:
        try:
            numbers.append(cost(group))
        except NothingYetError as error:
            problems.append(str(error))
    if not numbers:
        raise NothingYetError(problems[0])
    notes += [f"{name}: {problem}" for problem in problems]
    columns = min(2, len(numbers))
    rows = -(-len(numbers) // columns)
    figure, axes = new_figure(rows, columns, size=(5.0 * max(columns, 1.6), 1.2 + 3.6 * rows), sharey=True)
    phases = list(dict.fromkeys(name for each in numbers for name in each.phases))
    small = [
        name
        for name in phases
        if all(
            each.phases.get(name, np.zeros(1)).sum() <= SMALL_PHASE * sum(map(np.sum, each.phases.values()))
            for each in numbers
        )
    ]
    large = [name for name in phases if name not in small]
    for panel in axes.flat[len(numbers) :]:
        panel.set_axis_off()
    for panel, each in zip(axes.flat, numbers, strict=False):
        bottom, width = np.zeros(len(each.first)), each.last - each.first + 1.0
        stack = {name: each.phases.get(name, np.zeros(len(width))) for name in large}
        if small:
            stack["others"] = np.sum([each.phases[name] for name in small if name in each.phases], axis=0)
        for name, seconds in stack.items():
            colour = PHASE_COLOURS.get(name, "#555555")
            style = {"width": 0.92 * width, "color": colour, "linewidth": 0}
            panel.bar((each.first + each.last) / 2, seconds, bottom=bottom, label=name, **style)
            bottom = bottom + seconds
        _title(panel, each.label, "seconds per step" if panel.get_subplotspec().is_first_col() else "")
        panel.set_xlabel("training step")
        _whole_numbers(panel, [each.first[0] - 0.5, each.last[-1] + 0.5])
    handles, labels = axes.flat[0].get_legend_handles_labels()
    if small:
        labels[-1] = f"others ({', '.join(small)})"
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=10, frameon=False)
    return numbers, figure


_DRAWN: dict[str, Callable[[Sequence[Group], str, list[str]], tuple[Any, Any]]] = {
    "training": _training,
    **dict.fromkeys(SCORES, _scores),
    "forks": _forks,
    "cost": _cost,
}
"""Each figure's numbers and picture, from the groups, its name and a list that takes notes."""


def _line(panel: Any, x: Any, each: Curve, index: int) -> None:
    """A line with its band; a dash where it is a single point."""
    known = np.isfinite(x)
    if not known.any():
        return
    style = {"color": _colour(index), "linewidth": 1.8, "linestyle": _dash(index)}
    if known.sum() == 1:
        style |= {"marker": "_", "markersize": 16, "markeredgewidth": 2.5}
    panel.plot(x[known], each.mean[known], **style)
    _band(panel, x, each, index)


def _means(panel: Any, x: Any, each: Any, index: int, *, filled: bool = True, band: bool = False) -> None:
    """Markers at means, filled and joined or open, with their intervals as bars or as a band."""
    known = np.isfinite(x)
    colour = _colour(index)
    style = {
        "marker": _marker(index),
        "markersize": 6.5,
        "markerfacecolor": colour if filled else "white",
        "markeredgecolor": "white" if filled else colour,
        "linestyle": ":" if filled else "none",
        "linewidth": 1.4,
    }
    half = (each.mean - each.low)[known]
    bars = half if np.isfinite(half).any() and not band else None
    panel.errorbar(
        x[known], each.mean[known], yerr=bars, color=colour, capsize=3, elinewidth=1.2, zorder=4, **style
    )
    if band:
        _band(panel, x, each, index)


def _band(panel: Any, x: Any, each: Any, index: int) -> None:
    """The interval around a line, where there is one."""
    known = np.isfinite(x) & np.isfinite(each.low)
    panel.fill_between(
        x[known], each.low[known], each.high[known], color=_colour(index), alpha=0.18, linewidth=0
    )


def _legend(
    figure: Any, groups: Sequence[Group], remarks: Sequence[str], found: Mapping[str, str] | None = None
) -> None:
    """Name the groups and explain the signs below all panels; the figure grows by what that takes.

    Args:
        figure: The figure.
        groups: Its groups.
        remarks: Explanations of signs.
        found: What to say of each group, by its label.
    """
    lines = require("matplotlib.lines", "agent")
    handles, labels = [], []
    for index, group in enumerate(groups):
        style = {"color": _colour(index), "marker": _marker(index), "linestyle": _dash(index)}
        handles.append(lines.Line2D([], [], **style))
        seeds = f" ({len(group.runs)} seeds)" if len(group.runs) > 1 else ""
        about = (found or {}).get(group.label)
        labels.append(group.label + seeds + (f": {about}" if about else ""))
    labels += remarks
    if any(len(group.runs) > 1 for group in groups):
        labels.append("bands and bars: 95% intervals over seeds")
    handles += [lines.Line2D([], [], linestyle="none") for _ in labels[len(groups) :]]
    columns = next((count for count in (3, 2) if max(map(len, labels)) * count < 132), 1)
    rows = -(-len(labels) // columns)
    figure.set_figheight(figure.get_figheight() + 0.24 * max(0, rows - 2))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=10, frameon=False)


def _smoothing(curves: Iterable[Sequence[Curve]]) -> list[str]:
    """A remark on how the lines were smoothed, where they were."""
    windows = sorted({each.window for several in curves for each in several if each.window > 1})
    if not windows:
        return []
    span = f"{windows[0]}" if len(windows) == 1 else f"{windows[0]} to {windows[-1]}"
    return [f"lines: moving means of {span} steps"]


def _title(panel: Any, title: str, unit: str) -> None:
    panel.set_title(title, loc="left", fontsize=12, fontweight="bold", color="#1b1f24", pad=12)
    panel.set_ylabel(unit)


def _say(panel: Any, text: str) -> None:
    """Write in the middle of an empty panel."""
    panel.text(0.5, 0.5, text, transform=panel.transAxes, ha="center", va="center", color="#5c6570")
    panel.set_xticks([])
    panel.tick_params(left=False, labelleft=False)


def _keep_to_means(panel: Any, curves: Sequence[Curve]) -> None:
    """Cut intervals off that go far beyond the means, as those of two seeds do."""
    means = np.concatenate([each.mean for each in curves])
    low, high = panel.get_ylim()
    room = max(float(np.ptp(means)), 0.5 * float(np.abs(means).max()))
    if room:
        panel.set_ylim(max(low, means.min() - room), min(high, means.max() + room))


def _whole_numbers(panel: Any, values: Sequence[float]) -> None:
    """Ticks at whole numbers only; values that lie close together get room on both sides."""
    ticker = require("matplotlib.ticker", "agent")
    panel.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    if values and max(values) - min(values) <= 1:
        panel.set_xlim(min(values) - 0.5, max(values) + 0.5)


def _time_unit(seconds: float) -> tuple[str, float]:
    """The unit in which a time is read best, and its seconds."""
    return ("s", 1.0) if seconds < 180 else ("min", 60.0) if seconds < 3 * 3600 else ("h", 3600.0)


def _last(values: Any) -> float:
    """The largest number; 0 where there is none."""
    known = values[np.isfinite(values)]
    return float(known.max()) if len(known) else 0.0


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _marker(index: int) -> str:
    """A marker that no other group of the same colour has."""
    return MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]


def _dash(index: int) -> str:
    """Solid lines for as many groups as there are colours, then dashed ones."""
    return ("-", "--", "-.")[index // len(COLOURS) % 3]
