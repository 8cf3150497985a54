"""Computes the numbers behind the figures of `plots` from the folders of runs; draws and writes nothing.

Runs that differ only in their seed are one group: each number is their mean, with Student's 95% interval
where there are two or more. A number that a run has not recorded is nan here, and missing in the figure.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from at2po_agent.report.curves import smooth, smoothing_window
from at2po_agent.report.run_folder import (
    METRICS,
    NothingYetError,
    check_run_folder,
    read_config,
    read_metrics,
)
from at2po_agent.types import FloatArray, IntArray
from at2po_env.errors import DataError

COSTS = ("sampled_tokens", "tool_calls", "seconds")
PHASE = "seconds/"
PHASES = (
    "sampling",
    "rollout",
    "update",
    "old_log_probs",
    "reference",
    "packing",
    "credit",
    "rest",
    "paused",
)
"""The phases that runs record, in the order in which they are stacked."""
MOST_BARS = 40
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5% quantiles of Student's t for 1, 2, ... degrees of freedom."""


@dataclass(frozen=True)
class RunRecords:
    """What a run has recorded so far.

    Attributes:
        path: Its folder.
        config: Its configuration, as the file has it; empty without a file.
        steps: The records of training in the order of the steps; of a step done again after a resume the
            newest.
        evaluations: Those of evaluations, likewise by mode and step.
    """

    path: Path
    config: Mapping[str, Any]
    steps: tuple[Mapping[str, Any], ...]
    evaluations: tuple[Mapping[str, Any], ...]

    @property
    def preset(self) -> str:
        """The name of its algorithm; that of its folder where there is no configuration."""
        algorithm = self.config.get("algorithm")
        preset = algorithm.get("preset") if isinstance(algorithm, Mapping) else algorithm
        return str(preset or self.path.resolve().name)

    @property
    def seed(self) -> Any:
        """Its seed; None where there is no configuration."""
        section = self.config.get("run")
        return section.get("seed") if isinstance(section, Mapping) else None


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed.

    Attributes:
        label: What tells it from the other groups.
        runs: Its runs.
    """

    label: str
    runs: tuple[RunRecords, ...]


class Curve(NamedTuple):
    """A number of a group's runs over their training; float[n] each, unless said otherwise.

    Attributes:
        label: The group.
        kind: Where it was measured: "training", or the mode of an evaluation.
        step: int[n], training steps.
        mean: Mean over the runs.
        low: Lower end of its 95% interval; nan for fewer than two runs.
        high: Upper end.
        runs: int[n], how many runs have recorded it.
        costs: What these runs had spent in training by then, on average, by name of `COSTS`; nan where one
            of them has not recorded it.
        window: Steps of the centred moving mean that each run's values are; 1 for the values themselves.
    """

    label: str
    kind: str
    step: IntArray
    mean: FloatArray
    low: FloatArray
    high: FloatArray
    runs: IntArray
    costs: dict[str, FloatArray]
    window: int


class Cost(NamedTuple):
    """Seconds of a group's training steps by phase.

    Attributes:
        label: The group.
        first: int[n], first step of each bar.
        last: int[n], last step of it.
        phases: Mean seconds of a step, float[n] by phase.
    """

    label: str
    first: IntArray
    last: IntArray
    phases: dict[str, FloatArray]


def read_run(run: Path) -> RunRecords:
    """Read what a run has recorded; it may still be training.

    Raises:
        NothingYetError: It has recorded no training step.
        DataError: Not a run's folder, or a damaged file.
    """
    by_kind: dict[str, dict[tuple[float, str], Mapping[str, Any]]] = {"train": {}, "eval": {}}
    for record in read_metrics(check_run_folder(run)):
        step = _number(record, "step")
        if math.isnan(step):
            raise DataError(
                f"{run / METRICS}: a record has no number as step. Fix: restore or remove the line."
            )
        by_kind.setdefault(str(record.get("kind")), {})[step, str(record.get("mode"))] = record
    if not by_kind["train"]:
        raise NothingYetError(
            f"{run}: no training step recorded yet. Fix: wait for the first one, or leave this run out."
        )
    ordered = {kind: tuple(found[key] for key in sorted(found)) for kind, found in by_kind.items()}
    return RunRecords(run, read_config(run), ordered["train"], ordered["eval"])


def group_runs(runs: Sequence[RunRecords]) -> list[Group]:
    """Put runs that differ only in their seed together, in the order in which they are given.

    Settings that a resumed run may change (folder, evaluations, checkpoints ...) do not count, and a setting
    that an older configuration lacks counts as its default. A run without configuration is a group of its
    own. A group is called by its preset; where others have the same one, also by the settings in which they
    differ, or by a folder where those are more than two.
    """
    if len({run.preset for run in runs}) == len(runs):  # nothing to compare, and no torch to load for it
        return [Group(run.preset, (run,)) for run in runs]
    from at2po_agent.config.loading import flatten
    from at2po_agent.config.sections import Config
    from at2po_agent.runs.folder import MAY_CHANGE

    defaults = dict(flatten(Config().model_dump(mode="json", exclude={"served"})))
    members: dict[str, list[RunRecords]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for run in runs:
        preset = {"algorithm": {"preset": run.preset}} if isinstance(run.config.get("algorithm"), str) else {}
        values = {**defaults, **dict(flatten({**run.config, **preset}))}
        fixed = {
            key: value
            for key, value in sorted(values.items())
            if not key.startswith((*MAY_CHANGE, "served.")) and key != "run.seed"
        }
        key = json.dumps(fixed, default=str) if run.config else str(run.path)
        members.setdefault(key, []).append(run)
        settings[key] = fixed
    groups = []
    for key, own in members.items():
        rivals = [settings[other] for other in members if members[other][0].preset == own[0].preset]
        differing = sorted(name for name in settings[key] if len({str(one.get(name)) for one in rivals}) > 1)
        label = own[0].preset
        if len(rivals) > 1:
            changed = ", ".join(f"{name}={settings[key][name]}" for name in differing)
            label += f" · {changed if 0 < len(differing) <= 2 else own[0].path}"
        groups.append(Group(label, tuple(own)))
    return groups


def curve(group: Group, name: str, kind: str = "training") -> Curve:
    """Follow a number of a group's runs over their training.

    Args:
        group: The runs.
        name: The number, as a record of training has it (`reward`, `metrics/success` ...).
        kind: "training" for the smoothed values of the steps; the mode of evaluations for theirs.

    Returns:
        The curve, with no points where nothing is recorded.
    """
    measured = [_measured(run, name, kind) for run in group.runs]
    steps = sorted({step for values in measured for step in values})
    window = 1
    if kind == "training":
        window = smoothing_window(max(len(values) for values in measured))
    table = np.full((len(measured), len(steps)), np.nan)
    costs = {cost: np.full_like(table, np.nan) for cost in COSTS}
    for row, (run, values) in enumerate(zip(group.runs, measured, strict=True)):
        here = np.searchsorted(steps, list(values)).astype(np.int64)
        table[row, here], _ = smooth(np.array(list(values.values())), window)
        for cost, spent in _spent(run, list(values)).items():
            costs[cost][row, here] = spent
    counted = np.isfinite(table)
    return Curve(
        group.label,
        kind,
        np.array(steps, dtype=np.int64),
        *mean_interval(table),
        {
            cost: np.where(counted, each, 0.0).sum(axis=0) / np.maximum(1, counted.sum(axis=0))
            for cost, each in costs.items()
        },
        window,
    )


def mean_interval(table: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray, IntArray]:
    """Compute means over runs with Student's 95% interval, `mean ± t(n - 1) s / sqrt(n)`.

    Args:
        table: float[R, n], nan where a run has no value.

    Returns:
        float[n] means, float[n] lower and upper ends (nan below two values), int[n] counts.
    """
    known = np.isfinite(table)
    runs = known.sum(axis=0)
    mean = np.where(runs > 0, np.where(known, table, 0.0).sum(axis=0) / np.maximum(1, runs), np.nan)
    squares = np.where(known, table - mean, 0.0) ** 2
    quantile = np.array([_student(int(count) - 1) for count in runs])
    half = quantile * np.sqrt(squares.sum(axis=0) / np.maximum(1, runs - 1) / np.maximum(1, runs))
    return mean, mean - half, mean + half, runs


def cost(group: Group) -> Cost:
    """Average the seconds of a group's steps by phase, in at most `MOST_BARS` bars of successive steps.

    Raises:
        NothingYetError: No run of the group has recorded seconds by phase.
    """
    records = [record for run in group.runs for record in run.steps]
    timed = [record for record in records if any(key.startswith(PHASE) for key in record)]
    if not timed:
        raise NothingYetError(f"{group.runs[0].path}: no step has recorded its seconds by phase.")
    recorded = {key.removeprefix(PHASE) for record in timed for key in record if key.startswith(PHASE)}
    names = [*(name for name in PHASES if name in recorded), *sorted(recorded.difference(PHASES))]
    steps = np.unique([_number(record, "step") for record in timed]).astype(np.int64)
    bars = np.array_split(steps, min(len(steps), MOST_BARS))
    bar = np.repeat(np.arange(len(bars)), [len(each) for each in bars])
    place = bar[np.searchsorted(steps, [_number(record, "step") for record in timed])]
    per_bar = np.bincount(place, minlength=len(bars))
    return Cost(
        group.label,
        np.array([each[0] for each in bars]),
        np.array([each[-1] for each in bars]),
        {
            name: np.bincount(
                place,
                weights=np.nan_to_num([_number(record, PHASE + name) for record in timed]),
                minlength=len(bars),
            )
            / per_bar
            for name in names
        },
    )


def as_json(value: Any) -> Any:
    """Turn the numbers behind a figure into JSON values; what is not a number becomes None."""
    if isinstance(value, np.ndarray):
        return as_json(value.tolist())
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return as_json(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): as_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _measured(run: RunRecords, name: str, kind: str) -> dict[float, float]:
    """The values of a number by step, in the order of the steps."""
    if kind == "training":
        values = {_number(record, "step"): _number(record, name) for record in run.steps}
    else:
        place, _, own = name.rpartition("/")  # an evaluation has metrics in a mapping of their own
        values = {
            _number(record, "step"): _number(record.get(place, {}) if place else record, own)
            for record in run.evaluations
            if record.get("mode") == kind
        }
    return {step: value for step, value in values.items() if math.isfinite(value)}


def _spent(run: RunRecords, at: Sequence[float]) -> dict[str, FloatArray]:
    """What a run had spent in training by the end of some steps; nan where its records do not tell."""
    steps = np.array([_number(record, "step") for record in run.steps])
    # Sums need every step from the first on.
    whole = steps == np.arange(1, len(steps) + 1)

    def column(key: str) -> FloatArray:
        return np.array([_number(record, key) for record in run.steps])

    def total(values: FloatArray) -> FloatArray:
        return np.where(whole, np.cumsum(values), np.nan)

    spent = {
        "sampled_tokens": column("sampled_tokens"),
        "tool_calls": total(column("step_tool_calls")),
        "seconds": total(column("seconds") - np.nan_to_num(column(PHASE + "paused"))),
    }
    index = np.searchsorted(steps, at, side="right")
    # Nothing is spent before the first step, if it is known what the first step spent.
    return {name: np.concatenate([each[:1] * 0.0, each])[index] for name, each in spent.items()}


def _student(freedom: int) -> float:
    """97.5% quantile of Student's t; nan below one degree of freedom.

    Above the table it is the expansion around the normal quantile z, right to 0.2%.
    """
    if freedom < 1:
        return math.nan
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _number(record: Any, key: str) -> float:
    """A number of a record; nan where there is none."""
    value = record.get(key) if isinstance(record, Mapping) else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
