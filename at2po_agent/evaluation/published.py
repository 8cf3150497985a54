"""Describes the seven question sets of the published table: groups, weighted averages, published figures.

This module is pure: it reads no data and runs no policy. The averages are weighted by the number of questions
of the whole sets, however many of them were asked, because those are the averages of the published table.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from at2po_env.data.catalog import QA_SETS
from at2po_env.errors import ConfigError

SPLITS = ("test", "dev")
"""Evaluation takes the first of these splits that a set has."""

GROUPS: Mapping[str, tuple[str, ...]] = {
    "multihop": ("hotpotqa", "2wikimultihopqa", "musique", "bamboogle"),
    "singlehop": ("nq", "triviaqa", "popqa"),
}
SUITES: Mapping[str, tuple[str, ...]] = {**{group: (group,) for group in GROUPS}, "all": tuple(GROUPS)}
SHORT: Mapping[str, str] = {
    **{"hotpotqa": "Hotpot", "2wikimultihopqa": "2Wiki", "musique": "MuSiQue", "bamboogle": "Bamb."},
    **{"nq": "NQ", "triviaqa": "Trivia", "popqa": "PopQA"},
}


class PublishedRow(NamedTuple):
    """One row of the published table: exact match in percent, by set, and the averages as printed."""

    name: str
    sets: Mapping[str, float]
    averages: Mapping[str, float]


class Average(NamedTuple):
    """A weighted average over the sets of a group that were evaluated.

    Attributes:
        em: Exact match, in [0, 1].
        em_low: Lower end of its 95% interval.
        em_high: Upper end.
        questions: How many questions were asked.
        sets: The sets that it covers.
        missing: The sets of the group that it does not cover.
    """

    em: float
    em_low: float
    em_high: float
    questions: int
    sets: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def partial(self) -> bool:
        """True when a set of the group is missing: then this is another average than the published one."""
        return bool(self.missing)

    def to_json(self) -> dict[str, Any]:
        """All figures as JSON values."""
        lists = {"sets": list(self.sets), "missing": list(self.missing), "partial": self.partial}
        return {**self._asdict(), **lists}


def _row(name: str, *figures: float) -> PublishedRow:
    columns = [*GROUPS["multihop"], "multihop", *GROUPS["singlehop"], "singlehop"]
    cells = dict(zip(columns, figures, strict=True))
    return PublishedRow(
        name, {key: cells[key] for key in columns if key in SHORT}, {group: cells[group] for group in GROUPS}
    )


PUBLISHED_MODEL = "Qwen3-4B"
PUBLISHED_SOURCE = "arXiv 2601.04767 (AT²PO), results of Qwen3-4B, exact match in percent"
PUBLISHED: tuple[PublishedRow, ...] = (
    _row("ReAct", 30.42, 32.92, 12.83, 44.80, 30.01, 26.75, 53.53, 35.34, 41.31),
    _row("GRPO", 44.76, 51.40, 21.60, 50.40, 46.02, 45.98, 65.17, 49.18, 54.97),
    _row("DAPO", 45.95, 51.81, 21.68, 51.20, 46.65, 47.50, 65.84, 51.03, 56.33),
    _row("GSPO", 47.07, 49.25, 22.68, 50.40, 45.69, 46.01, 64.24, 48.50, 54.28),
    _row("AEPO", 46.36, 51.78, 23.47, 50.40, 46.95, 45.71, 64.66, 50.13, 55.20),
    _row("AT²PO", 49.44, 52.99, 24.80, 56.80, 48.81, 47.90, 65.32, 51.81, 56.44),
)
PUBLISHED_REMARK = (
    "The averages are as printed. AT²PO's single-hop average (56.44) does not follow from its three sets, "
    "which give 56.56; every other one does, to within 0.02."
)


def suite_groups(suite: str) -> tuple[str, ...]:
    """Return the groups of a suite.

    Raises:
        ConfigError: There is none of that name.
    """
    if suite not in SUITES:
        raise ConfigError(f"--suite: got {suite!r}, expected one of {', '.join(SUITES)}")
    return SUITES[suite]


def suite_sets(suite: str) -> tuple[str, ...]:
    """Return the sets of a suite, in the order of the published table."""
    return tuple(name for group in suite_groups(suite) for name in GROUPS[group])


def published_split(name: str) -> str:
    """Return the split that is evaluated: test, or dev where a set has no public test split."""
    return next(split for split in SPLITS if split in QA_SETS[name].splits)


def set_size(name: str) -> int:
    """Count the questions of the whole evaluated split: the weight of the set in the averages."""
    count = QA_SETS[name].splits[published_split(name)]
    assert count is not None, name
    return count


def weighted_interval(
    weights: Sequence[float], means: Sequence[float], intervals: Sequence[tuple[float, float]]
) -> tuple[float, float, float]:
    """Average independent proportions by weight, with an interval made from their own intervals.

    `low = m - sqrt(sum (w_i (p_i - l_i))^2)`, `high = m + sqrt(sum (w_i (u_i - p_i))^2)`, weights summing to
    one. With Wilson's intervals it stays sound near 0 and 1, and for a single set it is Wilson's interval.

    Args:
        weights: Positive, of any sum.
        means: Proportions.
        intervals: (low, high) of each.

    Returns:
        Mean, low, high.

    References:
        Zou and Donner, "Construction of confidence limits about effect measures" (2008), for a sum.
    """
    total = sum(weights)
    parts = [weight / total for weight in weights]
    mean = sum(part * p for part, p in zip(parts, means, strict=True))
    lows = [part * (p - low) for part, p, (low, _) in zip(parts, means, intervals, strict=True)]
    highs = [part * (high - p) for part, p, (_, high) in zip(parts, means, intervals, strict=True)]
    return mean, mean - math.hypot(*lows), mean + math.hypot(*highs)


def group_average(group: str, figures: Mapping[str, Mapping[str, Any]]) -> Average | None:
    """Average a group over the sets that have figures; None where there are none.

    Args:
        group: A key of `GROUPS`.
        figures: By set: `em`, `em_low`, `em_high`, `questions`.
    """
    done = tuple(name for name in GROUPS[group] if name in figures)
    if not done:
        return None
    mean, low, high = weighted_interval(
        [set_size(name) for name in done],
        [figures[name]["em"] for name in done],
        [(figures[name]["em_low"], figures[name]["em_high"]) for name in done],
    )
    questions = sum(figures[name]["questions"] for name in done)
    missing = tuple(name for name in GROUPS[group] if name not in figures)
    return Average(mean, low, high, questions, done, missing)
