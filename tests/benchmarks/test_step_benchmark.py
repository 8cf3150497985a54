"""The benchmark of a step measures steps in which the learner really trains."""

import numpy as np
import pytest

from at2po_agent.tree import Tree
from at2po_agent.types import Turn
from benchmarks.step import LARGE, PARTS, mixed_credit, run_case

TINY = (
    "model.hidden_size=16",
    "model.layers=1",
    "model.heads=2",
    "model.kv_heads=1",
    "model.head_dim=8",
    "model.ffn_size=16",
)


def test_the_credit_trains_every_branch_though_all_leaves_earn_the_same():
    tree = Tree([1])
    for _ in range(4):
        turn = Turn((), (2, 3), np.array([-1.0, -2.0]), None, "", "", 1.5, "stop")
        tree.close(tree.add(0, turn), -1.0)
    credit = mixed_credit(tree)
    # rewards 0 1 0 1: mean 1/2, deviation 1/2
    assert credit.advantages[1:] == pytest.approx([-1.0, 1.0, -1.0, 1.0], rel=1e-4)


def test_parts_and_rest_make_up_the_step_of_a_random_model():
    figures = run_case((*LARGE, *TINY, "rollout.max_turn_tokens=8", "run.threads=1"), 1)
    assert figures["trained_share"] == 1.0
    parts = sum(figures[f"{part}_s"] for part in (*PARTS, "rest"))
    assert parts == pytest.approx(figures["step_s"])
    assert figures["learner_s"] > 0
    assert figures["leaves"] == 12
