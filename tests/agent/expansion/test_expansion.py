from __future__ import annotations

from math import log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from at2po_agent.expansion import (
    aepo_branch_probability,
    aepo_root_chains,
    arpo_branch_probability,
    expansion_scores,
    random_nodes,
    select_nodes,
    top_entropy,
    tree_grpo_nodes,
)

#        0
#      / | \
#     1  2  3      leaves: 2, 4, 5
#     |     |
#     4     5
PARENT = [-1, 0, 0, 0, 1, 3]
ENTROPY = [0.0, 0.5, 0.9, 0.3, 0.7, 0.2]
IS_LEAF = [False, False, True, False, True, True]


@st.composite
def trees(draw: st.DrawFn) -> tuple[list[int], list[float], list[bool]]:
    size = draw(st.integers(1, 25))
    parent = [-1] + [draw(st.integers(0, node - 1)) for node in range(1, size)]
    entropy = [0.0] + [draw(st.sampled_from([0.0, 0.25, 0.5, 0.55, 1.0])) for _ in range(1, size)]
    is_leaf = [node > 0 and node not in parent and draw(st.booleans()) for node in range(size)]
    return parent, entropy, is_leaf


def test_scores_by_hand() -> None:
    # three children of the root: its own penalty and theirs is 0.05 * (3 - 1); only children pay nothing
    expected = [-0.1, 0.4, 0.8, 0.2, 0.7, 0.2]
    np.testing.assert_allclose(expansion_scores(PARENT, ENTROPY), expected, atol=1e-12)
    # the paper counts all children: 0.05 * 3 and 0.05 * 1
    paper = [-0.15, 0.35, 0.75, 0.15, 0.65, 0.15]
    np.testing.assert_allclose(expansion_scores(PARENT, ENTROPY, penalty="paper"), paper, atol=1e-12)
    np.testing.assert_allclose(expansion_scores(PARENT, ENTROPY, alpha=0.0), ENTROPY)
    assert expansion_scores([-1], [0.0]).tolist() == [0.0]


def test_scores_are_not_those_of_wrong_rules() -> None:
    scores = expansion_scores(PARENT, ENTROPY)
    own_children = [0.0 - 0.05 * 2, 0.5, 0.9, 0.3, 0.7, 0.2]  # penalised by a node's own children
    free_root = [0.0, 0.4, 0.8, 0.2, 0.7, 0.2]  # no penalty for the root
    for wrong in (own_children, free_root):
        assert not np.allclose(scores, wrong)


@settings(max_examples=100, deadline=None)
@given(trees(), st.sampled_from(["released", "paper"]))
def test_scores_are_the_formula(tree: tuple[list[int], list[float], list[bool]], penalty: str) -> None:
    parent, entropy, _ = tree
    for node, score in enumerate(expansion_scores(parent, entropy, penalty=penalty)):  # type: ignore[arg-type]
        siblings = sum(p == (parent[node] if node else 0) for p in parent)
        paid = max(0, siblings - 1) if penalty == "released" else siblings
        assert score == pytest.approx(entropy[node] - 0.05 * paid, abs=1e-12)


def test_selection_by_hand() -> None:
    # candidates 0, 1, 3 with -0.1, 0.4, 0.2; the leaves 2 and 4 would be first
    assert select_nodes(PARENT, ENTROPY, IS_LEAF, k=2) == [1, 3]
    assert select_nodes(PARENT, ENTROPY, IS_LEAF, k=3) == [1, 3, 0]
    assert select_nodes(PARENT, ENTROPY, IS_LEAF, k=8) == [1, 3, 0, 1, 3, 0, 1, 3]
    assert select_nodes(PARENT, ENTROPY, IS_LEAF, k=0) == []
    assert select_nodes([-1], [0.0], [False], k=2) == [0, 0]
    # a price of 1 nat per sibling: 0 pays 2, and so do 1 and 3
    assert select_nodes(PARENT, ENTROPY, IS_LEAF, k=1, alpha=1.0) == [1]
    assert select_nodes([-1, 0, 0, 1, 1, 1], [0, 0.5, 0.45, 0, 0, 0], [False] * 6, k=2) == [1, 2]


def test_ties_keep_the_order_of_creation() -> None:
    parent, entropy = [-1, 0, 1, 2, 3], [0.0, 0.4, 0.4, 0.4, 0.4]
    assert select_nodes(parent, entropy, [False] * 4 + [True], k=4) == [1, 2, 3, 0]


@settings(max_examples=100, deadline=None)
@given(trees(), st.integers(0, 30))
def test_selection_is_sorted_cycled_and_never_a_leaf(
    tree: tuple[list[int], list[float], list[bool]], k: int
) -> None:
    parent, entropy, is_leaf = tree
    scores = expansion_scores(parent, entropy).tolist()
    candidates = [node for node in range(len(parent)) if not is_leaf[node]]
    ranked = sorted(candidates, key=lambda node: -scores[node])
    expected = [ranked[i % len(ranked)] for i in range(k)]
    assert select_nodes(parent, entropy, is_leaf, k=k) == expected


@pytest.mark.parametrize("choose", [random_nodes, tree_grpo_nodes])
def test_random_choices_are_uniform_over_candidates(choose: object) -> None:
    rng = np.random.default_rng(0)
    draw = {random_nodes: {"k": 1}, tree_grpo_nodes: {"n": 1}}[choose]  # type: ignore[index]
    counts = np.zeros(6)
    for _ in range(3000):
        counts[choose(PARENT, IS_LEAF, rng=rng, **draw)] += 1  # type: ignore[operator]
    assert counts[[2, 4, 5]].tolist() == [0, 0, 0]
    # 1000 each with standard deviation 26
    assert np.abs(counts[[0, 1, 3]] - 1000).max() < 130


def test_random_nodes_are_without_replacement_and_tree_grpo_with() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        assert sorted(random_nodes(PARENT, IS_LEAF, k=3, rng=rng)) == [0, 1, 3]
        assert sorted(random_nodes(PARENT, IS_LEAF, k=6, rng=rng)) == [0, 0, 1, 1, 3, 3]
    drawn = [tree_grpo_nodes(PARENT, IS_LEAF, n=2, rng=rng) for _ in range(300)]
    same = np.mean([first == second for first, second in drawn])
    assert 0.22 < same < 0.45  # 1/3 with replacement, 0 without
    again = np.random.default_rng(5), np.random.default_rng(5)
    assert random_nodes(PARENT, IS_LEAF, k=9, rng=again[0]) == random_nodes(
        PARENT, IS_LEAF, k=9, rng=again[1]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"is_leaf": [True] + [False] * 5}, r"the root \(node 0\) cannot be a leaf"),
        ({"is_leaf": [False]}, r"is_leaf must have shape \(6,\)"),
        ({"entropy": [0.0]}, r"entropy must have shape \(6,\)"),
        ({"entropy": [0.0, np.nan, 0, 0, 0, 0]}, "entropy must be finite: node 1"),
        ({"k": -1}, "must be at least 0"),
        ({"alpha": -0.1}, "alpha must be a finite number of at least 0"),
        ({"penalty": "code"}, "penalty must be 'released' or 'paper'"),
        ({"parent": [0] * 6}, r"parent\[0\] must be -1"),
    ],
)
def test_bad_input_is_refused(arguments: dict[str, object], message: str) -> None:
    given_ = {"parent": PARENT, "entropy": ENTROPY, "is_leaf": IS_LEAF, "k": 2} | arguments
    with pytest.raises(ValueError, match=message):
        select_nodes(**given_)  # type: ignore[arg-type]


def test_top_entropy_by_hand() -> None:
    # two equal tokens: ln 2; a certain token: 0; their mean
    assert top_entropy([[log(0.5), log(0.5)], [0.0, -np.inf]]) == pytest.approx(log(2) / 2)
    # the tail is left out, not renormalised: 2 * 0.25 ln 4
    assert top_entropy([[log(0.25), log(0.25)]]) == pytest.approx(0.5 * log(4))
    assert top_entropy(np.zeros((0, 10))) == 0.0
    with pytest.raises(ValueError, match="top_log_probs must be"):
        top_entropy([0.1])


def test_arpo_and_aepo_branch_probabilities_by_hand() -> None:
    # V = e^10: dH = (3 - 1) / 10, P = 0.5 + 0.2 * 0.2
    vocabulary = round(np.exp(10))
    assert float(arpo_branch_probability(3.0, 1.0, vocab_size=vocabulary)) == pytest.approx(0.54, abs=1e-6)
    assert arpo_branch_probability([0.0, 99.0], [99.0, 0.0], vocab_size=2).tolist() == [0.0, 1.0]
    # after two branches in a row 0.54 * 0.9; never below 0
    assert float(aepo_branch_probability(0.54, 2)) == pytest.approx(0.486)
    assert aepo_branch_probability([0.5, 0.5], [0, 40]).tolist() == [0.5, 0.0]
    with pytest.raises(ValueError, match="vocab_size must be at least 2"):
        arpo_branch_probability(1.0, 1.0, vocab_size=1)
    with pytest.raises(ValueError, match="must be finite"):
        arpo_branch_probability(np.nan, 1.0, vocab_size=9)


def test_aepo_splits_the_budget_by_hand() -> None:
    # sigmoid(0) = 1/2; sigmoid(ln 3) = 3/4; sigmoid(-ln 3) = 1/4
    assert aepo_root_chains(16, 1.0, [0.5, 1.5]) == 8
    assert aepo_root_chains(16, 1.0 + log(3), [1.0]) == 12
    assert aepo_root_chains(16, 1.0, [1.0 + log(3)]) == 4
    assert aepo_root_chains(16, 1.0, []) == 8
    assert aepo_root_chains(16, 0.0, [500.0]) == 1
    assert aepo_root_chains(16, 500.0, [0.0], beta=2.0) == 16
    with pytest.raises(ValueError, match="budget"):
        aepo_root_chains(0, 1.0, [])
    with pytest.raises(ValueError, match="finite"):
        aepo_root_chains(4, np.nan, [])


def test_selection_is_linear_in_the_nodes() -> None:
    size = 200_000
    parent = np.arange(-1, size - 1)
    chosen = select_nodes(parent, np.linspace(0, 1, size), np.zeros(size, np.bool_), k=2)
    assert chosen == [size - 1, size - 2]
