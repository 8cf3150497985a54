from __future__ import annotations

from math import nan

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from at2po_agent.losses import LossTotals
from at2po_agent.packing.branches import Overflow
from at2po_agent.packing.rows import RowBatch, pack_rows
from at2po_agent.tree import Tree
from at2po_agent.types import Turn


def make_turn(seen: tuple[int, ...], action: tuple[int, ...], sampled: list[bool] | None = None) -> Turn:
    log_probs = np.array([-id_ / 10 for id_ in action], dtype=np.float32)
    mask = None if sampled is None else np.array(sampled)
    return Turn(seen, action, log_probs, mask, "", "", 0.5, "stop")


def make_tree() -> Tree:
    """Prompt 1 2; turn 1 writes 3 4; then 5 is seen and 6 7 (7 forced) or 8 is written."""
    tree = Tree([1, 2])
    first = tree.add(0, make_turn((), (3, 4)))
    tree.close(tree.add(first, make_turn((5,), (6, 7), [True, False])), 1.0)
    tree.close(tree.add(first, make_turn((5,), (8,))), 0.0)
    return tree


def test_rows_by_hand() -> None:
    batch = pack_rows([make_tree()], [[9.0, 0.5, 1.0, -1.0]], pad_id=99)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 8, 99]]
    assert batch.attention_mask.tolist() == [[1] * 7, [1] * 6 + [0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 5]]
    assert batch.turn_ids.tolist() == [[-1, -1, 0, 0, -1, 1, -1], [-1, -1, 0, 0, -1, 1, -1]]
    assert batch.advantages.tolist() == [[0, 0, 0.5, 0.5, 0, 1, 0], [0, 0, 0.5, 0.5, 0, -1, 0]]
    expected = [[0, 0, -0.3, -0.4, 0, -0.6, 0], [0, 0, -0.3, -0.4, 0, -0.8, 0]]
    torch.testing.assert_close(batch.sampled_log_probs, torch.tensor(expected))
    assert batch.lengths.tolist() == [7, 6]
    assert {x.dtype for x in (batch.input_ids, batch.turn_ids, batch.position_ids)} == {torch.int64}


def test_rows_are_what_the_policy_saw_and_sampled() -> None:
    tree = make_tree()
    batch = pack_rows([tree], [np.zeros(4)])
    for row, leaf in enumerate(tree.leaves()):
        assert batch.input_ids[row, : batch.lengths[row]].tolist() == tree.branch_ids(leaf)


def test_advantages_per_node_per_branch_or_both() -> None:
    per_branch = pack_rows([make_tree()], [[2.0, 3.0]]).advantages
    assert per_branch.tolist() == [[0, 0, 2, 2, 0, 2, 0], [0, 0, 3, 3, 0, 3, 0]]
    # the shared turn (node 1) has another advantage in each branch; what is off the branch is never read
    both = pack_rows([make_tree()], [[[nan, 1.0, 2.0, nan], [nan, 3.0, nan, 4.0]]]).advantages
    assert both.tolist() == [[0, 0, 1, 1, 0, 2, 0], [0, 0, 3, 3, 0, 4, 0]]


def test_several_trees_and_the_first_position() -> None:
    other = Tree([])
    other.close(other.add(0, make_turn((), (5, 6))), 1.0)
    batch = pack_rows([make_tree(), other], [np.ones(4), [7.0]])
    assert batch.input_ids.shape == (3, 7)
    # with an empty prompt token 0 has no prediction and cannot be trained
    assert batch.turn_ids[2, :2].tolist() == [-1, 0]
    assert batch.advantages[2, :2].tolist() == [0.0, 7.0]


@pytest.mark.parametrize(
    ("overflow", "rows"),
    [("truncate", [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 8]]), ("drop", [[1, 2, 3, 4, 5, 8]])],
)
def test_policies_for_rows_that_are_too_long(overflow: Overflow, rows: list[list[int]]) -> None:
    batch = pack_rows([make_tree()], [np.ones(4)], max_length=6, overflow=overflow)
    assert batch.input_ids.tolist() == rows
    assert batch.turn_ids[0].tolist() == [-1, -1, 0, 0, -1, 1]


def test_bad_input_is_refused() -> None:
    tree = make_tree()
    with pytest.raises(
        ValueError, match=r"1 of 2 rows are longer than max_length 6 .the longest has 7 tokens"
    ):
        pack_rows([tree], [np.ones(4)], max_length=6)
    with pytest.raises(ValueError, match="nothing to pack"):
        pack_rows([tree], [np.ones(4)], max_length=3, overflow="drop")
    with pytest.raises(ValueError, match="nothing to pack"):
        pack_rows([Tree([1])], [np.ones(1)])
    with pytest.raises(ValueError, match=r"must have shape \(4,\), \(2,\) or \(2, 4\), got \(3,\)"):
        pack_rows([tree], [np.ones(3)])
    with pytest.raises(ValueError, match="got 0 for 1 trees"):
        pack_rows([tree], [])
    with pytest.raises(ValueError, match=r"advantages must be finite .* branch of node 2"):
        pack_rows([tree], [[0.0, 0.0, nan, 0.0]])
    with pytest.raises(ValueError, match="overflow must be one of"):
        pack_rows([tree], [np.ones(4)], overflow="wrap")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_length must be at least 1"):
        pack_rows([tree], [np.ones(4)], max_length=0)
    with pytest.raises(ValueError, match=r"must be \[B, T\]"):
        RowBatch(*[torch.zeros(2, 3)] * 5, torch.zeros(2, 4))


def ragged(lengths: list[int]) -> RowBatch:
    trees = []
    for length in lengths:
        tree = Tree([0])
        tree.close(tree.add(0, make_turn((), tuple(range(1, length)))), 0.0)
        trees.append(tree)
    return pack_rows(trees, [np.ones(1)] * len(trees))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=15), st.integers(1, 100))
def test_micro_batches_keep_the_budget_and_every_row(lengths: list[int], budget: int) -> None:
    batch = ragged([*lengths, 2])
    seen: list[int] = []
    for rows, micro in batch.micro_batches(budget):
        assert micro.input_ids.numel() <= budget or len(rows) == 1
        assert micro.input_ids.shape[1] == int(micro.lengths.max())
        assert torch.equal(micro.input_ids, batch.input_ids[rows, : micro.input_ids.shape[1]])
        seen += rows.tolist()
    lengths = batch.lengths.tolist()
    assert seen == sorted(range(len(lengths)), key=lambda row: -lengths[row])  # a stable sort
    assert sorted(seen) == list(range(len(batch.lengths)))


def test_micro_batches_of_chosen_rows() -> None:
    batch = ragged([5, 9, 3, 9])
    chosen = [rows.tolist() for rows, _ in batch.micro_batches(14, rows=torch.tensor([0, 2, 3]))]
    assert chosen == [[3], [0, 2]]
    assert [rows.tolist() for rows, _ in batch.micro_batches(9)] == [[1], [3], [0], [2]]
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        list(batch.micro_batches(0))


def test_totals_of_a_packed_minibatch() -> None:
    totals = LossTotals.of(pack_rows([make_tree()], [np.ones(4)]).turn_ids)
    assert (totals.branches, totals.tokens, totals.turns) == (2, 6, 4)


def test_select_and_move() -> None:
    batch = pack_rows([make_tree()], [np.ones(4)])
    assert batch.select(torch.tensor([1]), 6).input_ids.tolist() == [[1, 2, 3, 4, 5, 8]]
    assert torch.equal(batch.to("cpu").turn_ids, batch.turn_ids)
