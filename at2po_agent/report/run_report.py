"""Draws a run's folder for a person: `learning_curve.png` and `tree.html`."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np

from at2po_agent.credit.values import node_advantages, node_values, normalize_leaf_rewards
from at2po_agent.report.curves import draw_run
from at2po_agent.report.run_folder import (
    CONFIG,
    NothingYetError,
    TreeRecord,
    check_run_folder,
    most_telling,
    read_rollout_config,
    read_trees,
)
from at2po_agent.report.tree_page import PageOptions, write_tree_page
from at2po_agent.report.turn_text import run_decoder
from at2po_agent.types import FloatArray
from at2po_env.errors import DataError

CURVE_PICTURE, TREE_PAGE = "learning_curve.png", "tree.html"


def write_run_report(run: Path) -> list[Path]:
    """Write the learning curve of a run, and the page of the most telling of its newest trees.

    A file whose data has not been recorded yet is left out.

    Raises:
        DataError: Not a run's folder.
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    check_run_folder(run)
    written: list[Path] = []
    with contextlib.suppress(NothingYetError):
        written.append(draw_run(run, run / CURVE_PICTURE))
    with contextlib.suppress(NothingYetError):
        record = most_telling(read_trees(run))
        written.append(write_tree_page(run / TREE_PAGE, record, page_options(record, run)))
    return written


def run_of(path: Path) -> Path | None:
    """Find the run that a path belongs to: a run's folder, or anything inside one."""
    absolute = path.resolve()
    return next((folder for folder in (absolute, *absolute.parents) if (folder / CONFIG).is_file()), None)


def page_options(record: TreeRecord, run: Path | None) -> PageOptions:
    """Collect what a run knows about one of its trees: credit, rounds, token texts.

    Args:
        record: The tree.
        run: The run's folder; None leaves forks and tokens unmarked.
    """
    values, advantages = node_credit(record)
    if run is None:
        return PageOptions(values, advantages)
    rollout = read_rollout_config(run)
    shape = {name: rollout.get(name, 0) for name in ("chains", "forks", "rounds")}
    if not all(isinstance(number, int) for number in shape.values()):
        raise DataError(f"{run / CONFIG}: rollout has no numbers as chains, forks and rounds, got {shape}.")
    return PageOptions(
        values,
        advantages,
        chains=shape["chains"] if shape["rounds"] else None,
        forks=shape["forks"],
        decode=run_decoder(run),
        facts=(f"run {run.name}",),
    )


def node_credit(record: TreeRecord) -> tuple[FloatArray | None, FloatArray | None]:
    """Return values and advantages of a tree's nodes: those that training gave, else AT²PO's.

    Where a turn has its own advantage in each branch through it, the mean over these branches is shown.

    Returns:
        float64[N] values, None where training had none; float64[N] advantages; None for both when the tree is
        unfinished and has neither.
    """
    tree = record.tree
    if record.advantages is not None:
        advantages = record.advantages
        if advantages.shape == (len(tree),):
            return record.values, advantages
        leaves = tree.leaves()
        through = np.zeros((len(leaves), len(tree)), dtype=bool)  # which nodes each branch passes
        for number, leaf in enumerate(leaves):
            through[number, tree.path(leaf)] = True
        each = advantages[:, None] if advantages.ndim == 1 else advantages
        total = np.where(through, each, 0.0).sum(axis=0)
        return record.values, np.asarray(total / np.maximum(1, through.sum(axis=0)), dtype=np.float64)
    try:
        values = node_values(tree.parent, tree.entropy, normalize_leaf_rewards(tree.leaf_reward))
    except ValueError:  # a turn that is neither ended nor gone on from
        return None, None
    return values, node_advantages(tree.parent, values)
