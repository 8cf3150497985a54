from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from at2po_agent.tree import Tree, check_parent
from at2po_agent.types import Turn


def make_turn(action: tuple[int, ...] = (3,), seen: tuple[int, ...] = (), *, entropy: float = 0.5) -> Turn:
    return Turn(
        seen, action, np.full(len(action), -entropy, np.float32), None, "seen", "wrote", entropy, "stop"
    )


def two_branches() -> Tree:
    tree = Tree([1, 2], "prompt", "q7")
    first = tree.add(0, make_turn((3, 4)), prefix_ids=[1, 2])
    left = tree.add(first, make_turn((6,), (5,)), prefix_ids=[1, 2, 3, 4, 5])
    right = tree.add(first, make_turn((7, 8), (5,)), prefix_ids=(1, 2, 3, 4, 5))
    tree.close(left, 1.0, {"em": 1.0, "reason": "answer"})
    tree.close(right, -1.0)
    return tree


def test_json_keeps_the_version_of_the_weights_and_omits_the_first() -> None:
    tree = Tree([1])
    for version in (0, 7):
        turn = dataclasses.replace(make_turn(), version=version)
        tree.close(tree.add(0, turn), 1.0)
    text = tree.to_json()
    assert ["version" in node for node in json.loads(text)["nodes"]] == [False, True]
    assert [turn.version for turn in Tree.from_json(text).turns[1:]] == [0, 7]


def test_pieces_along_a_path_are_the_branch() -> None:
    tree = two_branches()
    assert tree.path(3) == [0, 1, 3]
    assert tree.branch_ids(3) == [1, 2, 3, 4, 5, 7, 8]
    assert tree.branch_ids(0) == [1, 2]
    assert tree.leaves() == [2, 3]
    assert tree.children(1) == (2, 3)


def test_arrays_of_a_tree() -> None:
    tree = two_branches()
    assert tree.parent.tolist() == [-1, 0, 1, 1]
    assert tree.parent.dtype == np.int64
    assert tree.entropy.tolist() == [0.0, 0.5, 0.5, 0.5]
    assert tree.is_leaf.tolist() == [False, False, True, True]
    np.testing.assert_array_equal(tree.leaf_reward, [math.nan, math.nan, 1.0, -1.0])
    assert tree.outcomes[2] == {"em": 1.0, "reason": "answer"}
    assert tree.outcomes[3] == {}
    assert tree.turns[0] is None


@pytest.mark.parametrize(
    ("prefix", "where"),
    [([1, 2, 3, 4, 9], 4), ([1, 2, 3, 4], 4), ([1, 2, 3, 4, 5, 5], 5), ([9, 2, 3, 4, 5], 0)],
)
def test_a_policy_that_saw_other_ids_is_caught(prefix: list[int], where: int) -> None:
    tree = two_branches()
    with pytest.raises(ValueError, match=f"token in, token out .* first difference at position {where}"):
        tree.add(1, make_turn((6,), (5,)), prefix_ids=prefix)
    assert len(tree) == 4


def test_misuse_is_refused_and_changes_nothing() -> None:
    tree = two_branches()
    before = tree.to_json()
    with pytest.raises(ValueError, match="node 2 ended its episode"):
        tree.add(2, make_turn())
    with pytest.raises(IndexError, match="no node 9: the tree has nodes 0 to 3"):
        tree.add(9, make_turn())
    with pytest.raises(IndexError, match="no node -1"):
        tree.path(-1)
    with pytest.raises(ValueError, match="the root is the prompt"):
        tree.close(0, 1.0)
    with pytest.raises(ValueError, match="already closed or has children"):
        tree.close(2, 1.0)
    with pytest.raises(ValueError, match="already closed or has children"):
        tree.close(1, 1.0)
    assert tree.to_json() == before
    node = tree.add(0, make_turn())
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"reward of node {node} must be finite"):
            tree.close(node, bad)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 12))
def test_json_gives_every_token_back(seed: int, nodes: int) -> None:
    rng = np.random.default_rng(seed)
    tree = Tree(rng.integers(0, 99, 3).tolist(), "pröm\u2028pt", "id")
    for _ in range(nodes):
        length = int(rng.integers(0, 4))
        sampled = rng.random(length) < 0.5 if rng.random() < 0.5 else None
        log_probs = -rng.exponential(size=length).astype(np.float32)
        seen, action = rng.integers(0, 9, 2).tolist(), rng.integers(0, 9, length).tolist()
        turn = Turn(tuple(seen), tuple(action), log_probs, sampled, "o", "a", float(rng.random()), "eos")
        open_nodes = np.flatnonzero(~tree.is_leaf)
        node = tree.add(int(rng.choice(open_nodes)), turn)
        if rng.random() < 0.4:
            tree.close(node, float(rng.normal()), {"em": 0.0})
    again = Tree.from_json(tree.to_json())
    assert again.to_json() == tree.to_json()
    for ours, theirs in zip(tree.turns[1:], again.turns[1:], strict=True):
        assert ours is not None
        assert theirs is not None
        assert ours.ids == theirs.ids
        np.testing.assert_array_equal(ours.sampled_log_probs, theirs.sampled_log_probs)
        np.testing.assert_array_equal(ours.sampled_mask, theirs.sampled_mask)
    np.testing.assert_array_equal(tree.leaf_reward, again.leaf_reward)


def test_broken_files_are_refused() -> None:
    body = json.loads(two_branches().to_json())
    with pytest.raises(ValueError, match="not a tree of format version 1: got 2"):
        Tree.from_json(json.dumps(body | {"version": 2}))
    with pytest.raises(ValueError, match="not a tree of format version 1: got 'list'"):
        Tree.from_json("[]")
    with pytest.raises(ValueError, match="Expecting"):
        Tree.from_json(two_branches().to_json()[:-20])
    with pytest.raises(ValueError, match="not a complete tree: KeyError 'nodes'"):
        Tree.from_json(json.dumps({key: value for key, value in body.items() if key != "nodes"}))
    body["nodes"][0]["parent"] = 7
    with pytest.raises(ValueError, match="not a complete tree: IndexError no node 7"):
        Tree.from_json(json.dumps(body))


def test_a_long_chain_does_not_recurse() -> None:
    tree = Tree([1])
    node = 0
    for _ in range(3000):
        node = tree.add(node, make_turn())
    tree.close(node, 1.0)
    assert len(tree.path(node)) == 3001
    assert len(Tree.from_json(tree.to_json()).branch_ids(node)) == 3001


@pytest.mark.parametrize(
    ("parent", "message"),
    [
        ([], "parent must be int"),
        ([0], r"parent\[0\] must be -1"),
        ([-1, 1], "node 1 has parent 1"),
        ([-1, 0, -1], "node 2 has parent -1"),
        ([-1.0, 0.0], "got float64"),
        ([[-1, 0]], "parent must be int"),
    ],
)
def test_arrays_that_are_no_tree_are_refused(parent: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_parent(parent)


def test_text_that_no_encoding_holds_survives_a_file() -> None:
    tree = Tree([1], "odd \ud800\x00 prompt", "q")
    again = Tree.from_json(tree.to_json().encode("utf-8").decode("utf-8"))
    assert again.prompt == tree.prompt
