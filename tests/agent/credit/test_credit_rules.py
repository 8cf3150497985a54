import numpy as np
import pytest

from at2po_agent.credit.registry import credit_rules
from at2po_agent.tree import Tree
from at2po_agent.types import Turn


def turn(observation: str = "") -> Turn:
    return Turn((), (3,), np.array([-1.0], dtype=np.float32), None, observation, "", 1.0, "stop")


def chains(*branches: tuple[list[str], float, int]) -> Tree:
    """Branches as (observations of their turns, reward, chain)."""
    tree = Tree([1])
    for observations, reward, chain in branches:
        node = 0
        for observation in observations:
            node = tree.add(node, turn(observation))
        tree.close(node, reward, {"chain": chain})
    return tree


def test_tree_grpo_adds_two_z_scores():
    # Question: 1, 0, 0, 0: mean 1/4, unbiased std 1/2: z = 1.5, -0.5 (three times).
    # Tree 0 (1, 0): unbiased std 1/sqrt 2: z = 1/sqrt 2, -1/sqrt 2; tree 1 (0, 0): 0.
    tree = chains(([""], 1.0, 0), ([""], 0.0, 0), ([""], 0.0, 1), ([""], 0.0, 1))
    got = credit_rules()["tree_grpo"](tree).advantages
    assert got == pytest.approx([1.5 + 0.5**0.5, -0.5 - 0.5**0.5, -0.5, -0.5], abs=1e-5)


def test_tree_grpo_needs_to_know_the_trees():
    tree = Tree([1])
    tree.close(tree.add(0, turn()), 1.0)
    with pytest.raises(ValueError, match=r"rollout\.expansion=tree_grpo"):
        credit_rules()["tree_grpo"](tree)


def test_gigpo_compares_turns_that_saw_the_same():
    # Three episodes; second turns saw "a", "a", "b". Rewards 1, 0, 0.
    # Episode: unbiased std 1/sqrt 3: 2/sqrt 3, -1/sqrt 3, -1/sqrt 3.
    # First turns (all saw the prompt), returns 0.95, 0, 0: the same three z-scores.
    # Second turns: "a": returns 1, 0: z = 1/sqrt 2, -1/sqrt 2; "b" alone: 0.
    tree = chains((["", "a"], 1.0, 0), (["", "a"], 0.0, 1), (["", "b"], 0.0, 2))
    got = credit_rules()["gigpo"](tree).advantages
    z, half = np.array([2.0, -1.0, -1.0]) / 3**0.5, 0.5**0.5
    assert got.shape == (3, 7)
    assert got[[0, 1, 2], [1, 3, 5]] == pytest.approx(2 * z, abs=1e-4)
    assert got[[0, 1, 2], [2, 4, 6]] == pytest.approx([z[0] + half, z[1] - half, z[2]], abs=1e-4)


def test_gigpos_options_change_it():
    tree = chains((["", "a"], 1.0, 0), (["", "a", "c"], 0.0, 1), ([""], 0.5, 2))
    rule = credit_rules()["gigpo"]
    plain = rule(tree).advantages
    for options in ({"step_weight": 0.0}, {"normalization": "mean"}, {"gamma": 0.5}):
        assert not np.allclose(rule(tree, **options).advantages, plain, atol=1e-6)
    group = credit_rules()["group"](tree).advantages
    alone = rule(tree, step_weight=0.0).advantages
    assert alone[0, 1] == alone[0, 2] == pytest.approx(group[0])


def test_a_shared_turn_counts_in_every_branch():
    tree = Tree([1])
    shared = tree.add(0, turn())
    for reward in (1.0, 0.0):
        tree.close(tree.add(shared, turn("a")), reward)
    got = credit_rules()["gigpo"](tree).advantages
    # each branch's own return stands at the shared turn: +, - (group 1/sqrt 2 twice)
    assert got[:, shared] == pytest.approx([2**0.5, -(2**0.5)], abs=1e-4)


@pytest.mark.parametrize("name", ["group", "group_shared", "gigpo", "tree", "tree_grpo", "surprisal"])
def test_a_tree_without_leaves_is_an_error(name):
    with pytest.raises(ValueError, match="without leaves"):
        credit_rules()[name](Tree([1]))


@pytest.mark.parametrize("name", ["group", "group_shared", "gigpo", "tree_grpo", "tree", "surprisal"])
def test_equal_rewards_are_worth_nothing_and_never_nan(name):
    # gigpo's discounted returns are equal too, since all branches have two turns
    tree = chains((["", "a"], 1.0, 0), (["", "a"], 1.0, 0), (["", "a"], 1.0, 0))
    assert np.asarray(credit_rules()[name](tree).advantages).any() == np.False_


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_never_enters_a_tree(reward):
    tree = Tree([1])
    with pytest.raises(ValueError, match="finite"):
        tree.close(tree.add(0, turn()), reward)
    tree.close(1, 1.0)
    with pytest.raises(ValueError, match="finite"):
        tree.with_leaf_rewards([reward])


def test_other_rewards_leave_the_tree_as_it_is():
    tree = chains(([""], 1.0, 0), ([""], 0.0, 0))
    other = tree.with_leaf_rewards([0.25, 0.5])
    assert other.leaf_reward[other.is_leaf].tolist() == [0.25, 0.5]
    assert tree.leaf_reward[tree.is_leaf].tolist() == [1.0, 0.0]
    assert other.turns[1] is tree.turns[1]
    with pytest.raises(ValueError, match="each of 2 leaves"):
        tree.with_leaf_rewards([1.0])
