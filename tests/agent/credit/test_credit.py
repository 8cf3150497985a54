from __future__ import annotations

import json
from math import e, isnan, nan
from pathlib import Path

import numpy as np
import pytest
from helpers.credit_reference import advantages_reference, published_tree, values_reference
from hypothesis import given, settings
from hypothesis import strategies as st

from at2po_agent.credit.values import (
    branch_advantages,
    node_advantages,
    node_values,
    normalize_leaf_rewards,
    shared_mean_advantages,
)
from at2po_agent.expansion.rules import expansion_scores, select_nodes

GOLDEN = Path(__file__).parent / "golden" / "published_shape.json"
VALUE_MODES = ("child_mean", "child_softmax", "child_linear", "leaf_mean")
ADVANTAGE_MODES = ("node_value", "diff_parent", "diff_global", "diff_localglobal")

#      0
#     / \
#    1   2      leaves: 2 (value -1), 3 (2), 4 (0), 5 (1)
#   /|\
#  3 4 5        entropies: 1: 0, 2: 1, 3: 0, 4: ln 2, 5: ln 3
PARENT = [-1, 0, 0, 1, 1, 1]
ENTROPY = [0.0, 0.0, 1.0, 0.0, np.log(2), np.log(3)]
LEAF = [nan, nan, -1.0, 2.0, 0.0, 1.0]


@st.composite
def valued_trees(draw: st.DrawFn) -> tuple[list[int], list[float], list[float]]:
    size = draw(st.integers(1, 20)) + 1
    parent = [-1, *(draw(st.integers(0, node - 1)) for node in range(1, size))]
    entropy = [draw(st.floats(0, 5)) for _ in range(size)]
    leaf = [nan if node in parent else draw(st.floats(-3, 3)) for node in range(size)]
    return parent, entropy, leaf


def test_leaf_normalisation_by_hand() -> None:
    # rewards 0, 0, 1, 1: mean 1/2, population std 1/2 (unbiased: 0.5774)
    got = normalize_leaf_rewards([nan, 0.0, 0.0, nan, 1.0, 1.0])
    unit = 0.5 / (0.5 + 1e-6)
    np.testing.assert_allclose(got, [nan, -unit, -unit, nan, unit, unit], rtol=1e-12)
    assert abs(got[4] - 0.5 / 0.57735) > 0.1


@pytest.mark.parametrize("rewards", [[nan, 0.3], [nan, 0.1, 0.1, 0.1], [1.0]])
def test_one_leaf_or_equal_rewards_are_exactly_zero(rewards: list[float]) -> None:
    got = normalize_leaf_rewards(rewards)
    assert [value for value in got.tolist() if not isnan(value)] == [0.0] * sum(not isnan(r) for r in rewards)


@pytest.mark.parametrize(
    ("mode", "inner", "root"),
    [
        # node 1: (2 + 0 + 1) / 3; root: (1 - 1) / 2
        ("child_mean", 1.0, 0.0),
        # weights 1, 2, 3: (2 + 0 + 3) / 6; root: weights 1 and e
        ("child_softmax", 5 / 6, (5 / 6 - e) / (1 + e)),
        # weights 0, ln 2, ln 3: ln 3 / (ln 2 + ln 3); root: weights 0 and 1
        ("child_linear", np.log(3) / np.log(6), -1.0),
        # leaves 2, 0, 1 and -1, 2, 0, 1 (not the mean of the children's means)
        ("leaf_mean", 1.0, 0.5),
    ],
)
def test_values_by_hand(mode: str, inner: float, root: float) -> None:
    values = node_values(PARENT, ENTROPY, LEAF, mode=mode)  # type: ignore[arg-type]
    np.testing.assert_allclose(values, [root, inner, -1.0, 2.0, 0.0, 1.0], rtol=1e-12, atol=1e-15)


def test_default_modes_are_the_published_ones() -> None:
    values = node_values(PARENT, ENTROPY, LEAF)
    assert values[1] == pytest.approx(5 / 6)
    assert node_advantages(PARENT, values).tolist() == values.tolist()


def test_softmax_is_over_children_not_over_all_nodes_and_not_negated() -> None:
    right = node_values(PARENT, ENTROPY, LEAF)[1]
    negated = (2 / 1 + 0 / 2 + 1 / 3) / (1 + 1 / 2 + 1 / 3)
    by_value = (2 * e**2 + e) / (e**2 + 1 + e)
    assert abs(right - negated) > 0.1
    assert abs(right - by_value) > 0.1
    # large entropies neither overflow nor lose the limit
    assert node_values([-1, 0, 0], [0, 1000.0, 0], [nan, 1.0, 5.0])[0] == pytest.approx(1.0)


def test_linear_weights_fall_back_to_equal_ones() -> None:
    assert node_values([-1, 0, 0], [0, 0, 0], [nan, 1.0, 2.0], mode="child_linear")[0] == 1.5


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("node_value", [0.5, 1.0, -1.0, 2.0, 0.0, 1.0]),
        ("diff_parent", [0.5, 0.5, -1.5, 1.0, -1.0, 0.0]),
        ("diff_global", [0.5, 0.5, -1.5, 1.5, -0.5, 0.5]),
        ("diff_localglobal", [0.5, 1.0, -3.0, 2.5, -1.5, 0.5]),
        # a shared turn: the mean over the branches through it
        ("group", [0.5, 1.0, -1.0, 2.0, 0.0, 1.0]),
    ],
)
def test_advantages_by_hand(mode: str, expected: list[float]) -> None:
    values = [0.5, 1.0, -1.0, 2.0, 0.0, 1.0]
    assert node_advantages(PARENT, values, mode=mode).tolist() == expected  # type: ignore[arg-type]


def test_group_credit_differs_from_node_values_on_shared_turns() -> None:
    softmax = node_values(PARENT, ENTROPY, LEAF)
    group = node_advantages(PARENT, softmax, mode="group")
    assert group[1] == 1.0  # (2 + 0 + 1) / 3, whatever the entropies
    assert group.tolist() == shared_mean_advantages(PARENT, LEAF).tolist()
    assert branch_advantages(LEAF).tolist() == [-1.0, 2.0, 0.0, 1.0]


@settings(max_examples=80, deadline=None)
@given(valued_trees(), st.sampled_from(VALUE_MODES), st.sampled_from(ADVANTAGE_MODES))
def test_trees_of_any_shape_agree_with_the_recursion(
    tree: tuple[list[int], list[float], list[float]], value_mode: str, advantage_mode: str
) -> None:
    parent, entropy, leaf = tree
    values = node_values(parent, entropy, leaf, mode=value_mode)  # type: ignore[arg-type]
    expected = values_reference(parent, entropy, leaf, value_mode)
    np.testing.assert_allclose(values, expected, rtol=1e-9, atol=1e-12)
    advantages = node_advantages(parent, values, mode=advantage_mode)  # type: ignore[arg-type]
    np.testing.assert_allclose(
        advantages, advantages_reference(parent, values.tolist(), advantage_mode), atol=1e-12
    )


@settings(max_examples=50, deadline=None)
@given(valued_trees(), st.sampled_from(VALUE_MODES), st.randoms(use_true_random=False))
def test_the_order_of_children_does_not_matter(
    tree: tuple[list[int], list[float], list[float]], mode: str, random: object
) -> None:
    parent, entropy, leaf = tree
    # any order in which parents precede their children is the same tree
    order, ready = [], [0]
    while ready:
        node = ready.pop(random.randrange(len(ready)))  # type: ignore[attr-defined]
        order.append(node)
        ready += [child for child, above in enumerate(parent) if above == node]
    place = {node: index for index, node in enumerate(order)}
    moved = node_values(
        [-1 if parent[node] < 0 else place[parent[node]] for node in order],
        [entropy[node] for node in order],
        [leaf[node] for node in order],
        mode=mode,  # type: ignore[arg-type]
    )
    values = node_values(parent, entropy, leaf, mode=mode)  # type: ignore[arg-type]
    np.testing.assert_allclose(moved, values[order], rtol=1e-9, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(valued_trees())
def test_a_value_lies_between_its_children(tree: tuple[list[int], list[float], list[float]]) -> None:
    parent, entropy, leaf = tree
    for mode in VALUE_MODES:
        values = node_values(parent, entropy, leaf, mode=mode)  # type: ignore[arg-type]
        for node in range(len(parent)):
            below = [values[child] for child, above in enumerate(parent) if above == node]
            if below:
                assert min(below) - 1e-9 <= values[node] <= max(below) + 1e-9


def test_golden_tree_of_the_published_shape() -> None:
    # regenerate with: python tests/agent/test_credit.py
    golden = json.loads(GOLDEN.read_text())
    parent, entropy = golden["parent"], golden["entropy"]
    reward = [nan if value is None else value for value in golden["leaf_reward"]]
    leaf_value = normalize_leaf_rewards(reward)
    np.testing.assert_allclose(leaf_value[~np.isnan(reward)], golden["leaf_value"], rtol=1e-9)
    np.testing.assert_allclose(expansion_scores(parent, entropy), golden["scores"], atol=1e-12)
    is_leaf = ~np.isnan(reward)
    assert select_nodes(parent, entropy, is_leaf, k=6) == golden["selected"]
    for mode in VALUE_MODES:
        values = node_values(parent, entropy, leaf_value, mode=mode)  # type: ignore[arg-type]
        np.testing.assert_allclose(values, golden["values"][mode], rtol=1e-9, atol=1e-12)
    values = node_values(parent, entropy, leaf_value)
    for mode in ADVANTAGE_MODES:
        advantages = node_advantages(parent, values, mode=mode)  # type: ignore[arg-type]
        np.testing.assert_allclose(advantages, golden["advantages"][mode], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        ([nan] * 6, "a tree without leaves"),
        ([nan, nan, -1.0, nan, 0.0, 1.0], r"node 3 has neither a value nor children \(nan reward\?\)"),
        ([nan, 1.0, -1.0, 2.0, 0.0, 1.0], "node 1 has a value and children"),
        ([nan, nan, np.inf, 2.0, 0.0, 1.0], "must be finite: node 2"),
        ([nan, -1.0], r"leaf_value must have shape \(6,\)"),
    ],
)
def test_bad_leaf_values_are_refused(leaf: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        node_values(PARENT, ENTROPY, leaf)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="a tree without leaves"):
        normalize_leaf_rewards([nan, nan])
    with pytest.raises(ValueError, match="must be finite: node 1"):
        normalize_leaf_rewards([nan, np.inf])
    with pytest.raises(ValueError, match=r"must be float\[N\]"):
        normalize_leaf_rewards([[1.0]])
    with pytest.raises(ValueError, match="entropy must be finite: entry 1"):
        node_values([-1, 0], [0.0, nan], [nan, 1.0])
    with pytest.raises(ValueError, match=r"mode must be one of .*child_softmax"):
        node_values(PARENT, ENTROPY, LEAF, mode="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mode must be one of .*diff_parent"):
        node_advantages(PARENT, [0.0] * 6, mode="vanilla")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="values must be finite: entry 2"):
        node_advantages(PARENT, [0.0, 0.0, nan, 0.0, 0.0, 0.0])


def test_deep_and_wide_trees_are_linear() -> None:
    size = 200_000
    wide = node_values(np.r_[-1, np.zeros(size, np.int64)], np.zeros(size + 1), np.r_[nan, np.ones(size)])
    assert wide[0] == pytest.approx(1.0)
    chain = np.arange(-1, 4999)
    deep = node_values(chain, np.ones(5000), np.r_[np.full(4999, nan), 3.0])
    assert (deep == 3.0).all()


def _write_golden() -> None:
    parent, entropy, reward = published_tree(20260104)
    rewards = [value for value in reward if not isnan(value)]
    mean = sum(rewards) / len(rewards)
    std = (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5
    leaf_value = [(r - mean) / (std + 1e-6) for r in reward]
    siblings = [max(0, sum(p == max(parent[n], 0) for p in parent) - 1) for n in range(len(parent))]
    scores = [h - 0.05 * s for h, s in zip(entropy, siblings, strict=True)]
    inner = [node for node in range(len(parent)) if isnan(reward[node])]
    values = {mode: values_reference(parent, entropy, leaf_value, mode) for mode in VALUE_MODES}
    golden = {
        "parent": parent,
        "entropy": entropy,
        "leaf_reward": [None if isnan(value) else value for value in reward],
        "leaf_value": [value for value in leaf_value if not isnan(value)],
        "scores": scores,
        "selected": sorted(inner, key=lambda node: -scores[node])[:6],
        "values": values,
        "advantages": {
            mode: advantages_reference(parent, values["child_softmax"], mode) for mode in ADVANTAGE_MODES
        },
    }
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text("{\n" + ",\n".join(f'"{k}": {json.dumps(v)}' for k, v in golden.items()) + "\n}\n")


if __name__ == "__main__":
    _write_golden()
