import itertools

import numpy as np
import pytest

from at2po_agent.credit.registry import credit_rules
from at2po_agent.credit.surprisal import surprisal_tree_advantages, weighted_baseline_advantages
from at2po_agent.tree import Tree
from at2po_agent.types import Turn

NAN = np.nan


def expected_gradient(logits, reward, size, advantages):
    """The exact mean, over all groups of `size` draws, of the estimate for a softmax policy."""
    probabilities = np.exp(logits) / np.exp(logits).sum()
    total = np.zeros(len(logits))
    for group in itertools.product(range(len(logits)), repeat=size):
        drawn = list(group)
        chance = probabilities[drawn].prod()
        credit = advantages(reward[drawn], -np.log(probabilities[drawn]))
        for action, advantage in zip(drawn, credit, strict=True):
            total += chance * advantage * (np.eye(len(logits))[action] - probabilities) / size
    return total


def true_gradient(logits, reward):
    probabilities = np.exp(logits) / np.exp(logits).sum()
    return probabilities * (reward - probabilities @ reward)


LOGITS, REWARD = np.array([1.5, 0.2, -1.0]), np.array([0.0, 1.0, 0.3])


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_weighted_baseline_leaves_the_mean_gradient_as_it_is(size):
    got = expected_gradient(LOGITS, REWARD, size, weighted_baseline_advantages)
    assert got == pytest.approx(true_gradient(LOGITS, REWARD), abs=1e-12)


def test_a_baseline_that_contains_the_branch_itself_would_not():
    def with_itself(rewards, weights):
        return rewards - (weights @ rewards) / weights.sum()

    got = expected_gradient(LOGITS, REWARD, 3, with_itself)
    assert abs(got - true_gradient(LOGITS, REWARD)).max() > 0.01


def test_the_weighted_baseline_by_hand():
    # Others of the first: (1 * 1 + 3 * 0) / 4 = 1/4; of the second: (2 * 1 + 3 * 0) / 5; of the third: 3/3.
    got = weighted_baseline_advantages([1.0, 1.0, 0.0], [2.0, 1.0, 3.0])
    assert got == pytest.approx([3 / 4, 3 / 5, -1.0])


def test_others_without_weight_count_alike():
    assert weighted_baseline_advantages([1.0, 0.0, 0.5], [0.0, 0.0, 0.0]) == pytest.approx([0.75, -0.75, 0.0])


def test_one_branch_keeps_its_reward_and_equal_rewards_are_worth_nothing():
    assert weighted_baseline_advantages([0.7], [2.0]).tolist() == [0.7]
    assert not weighted_baseline_advantages([0.1] * 3, [0.3, 0.7, 0.11]).any()


@pytest.mark.parametrize(
    ("rewards", "weights", "match"),
    [
        ([], [], "G >= 1"),
        ([1.0, 0.0], [1.0], "shape"),
        ([1.0, 0.0], [1.0, -1.0], "at least 0"),
        ([1.0, NAN], [1.0, 1.0], "finite"),
        ([1.0, 0.0], [np.inf, 1.0], "finite"),
    ],
)
def test_bad_groups_are_errors(rewards, weights, match):
    with pytest.raises(ValueError, match=match):
        weighted_baseline_advantages(rewards, weights)


def test_chains_are_the_flat_rule_whatever_lies_beyond():
    # Two turns each; a branch's weight is the surprisal of both.
    parent, surprisal = [-1, 0, 1, 0, 3, 0, 5], [0.0, 0.5, 1.5, 0.25, 0.75, 2.0, 1.0]
    reward = [NAN, NAN, 1.0, NAN, 1.0, NAN, 0.0]
    flat = weighted_baseline_advantages([1.0, 1.0, 0.0], [2.0, 1.0, 3.0])
    for beyond in (0.1, 1.0):
        got = surprisal_tree_advantages(parent, surprisal, reward, beyond=beyond)
        assert got == pytest.approx([0.0, *np.repeat(flat, 2)])


def test_a_fork_is_compared_with_its_siblings_first():
    # Root 0 -> 1 -> {2 (r 1), 3 (r 0)} and 0 -> 4 (r 1). Chance of leaves 2, 3, 4: 1/4, 1/4, 1/2.
    parent, surprisal = [-1, 0, 1, 1, 0], [0.0, 1.0, 2.0, 4.0, 3.0]
    reward = [NAN, NAN, 1.0, 0.0, 1.0]
    got = surprisal_tree_advantages(parent, surprisal, reward, beyond=0.5)
    # 1: V 1/2; parts from 4 alone, baseline 1. Chance 1/2, 3 leaves, 2 pass: factor 3/4.
    # 2: V 1; 3 parts with 4/4 = 1 and reward 0; 4 lies beyond with 0.5 * 3/2 = 3/4 and reward 1:
    #    baseline 3/7. Factor 1/4 * 3 = 3/4.
    # 3: V 0; 2 parts with 2/4 and reward 1, 4 as before with reward 1: baseline 1.
    # 4: V 1; 2 parts with 3/4 and reward 1, 3 with 5/4 and reward 0: baseline 3/8. Factor 3/2.
    assert got == pytest.approx([0.0, -3 / 8, 3 / 4 * 4 / 7, -3 / 4, 3 / 2 * 5 / 8])


def test_random_forks_leave_the_mean_gradient_as_it_is():
    """Two turns of two actions; the first chain's second state is forked whatever was done there."""
    first, second = np.array([0.4, -0.3]), np.array([[0.2, 1.0], [-0.5, 0.6]])
    outcome = np.array([[0.0, 1.0], [0.6, 0.2]])

    def softmax(x):
        return np.exp(x) / np.exp(x).sum()

    p, q = softmax(first), np.array([softmax(row) for row in second])
    values = (q * outcome).sum(axis=1)
    true_first = p * (values - p @ values)
    true_second = p[:, None] * q * (outcome - values[:, None])

    mean_first, mean_second = np.zeros(2), np.zeros((2, 2))
    for a, b, c, x, y in itertools.product(range(2), repeat=5):  # chain a b, fork c of b; chain x y
        chance = p[a] * q[a, b] * q[a, c] * p[x] * q[x, y]
        parent = [-1, 0, 1, 0, 3, 1]
        surprisal = -np.log([1.0, p[a], q[a, b], p[x], q[x, y], q[a, c]])
        reward = [NAN, NAN, outcome[a, b], NAN, outcome[x, y], outcome[a, c]]
        credit = surprisal_tree_advantages(parent, surprisal, reward, beyond=0.3)
        # The sum over the branches, divided by their number, as losses do it.
        for node, (state, action) in enumerate([(None, a), (a, b), (None, x), (x, y), (a, c)], start=1):
            branches = 2 if node == 1 else 1
            weight = chance * credit[node] * branches / 3
            if state is None:
                mean_first += weight * (np.eye(2)[action] - p)
            else:
                mean_second[state] += weight * (np.eye(2)[action] - q[state])
    assert mean_first == pytest.approx(true_first, abs=1e-12)
    assert mean_second == pytest.approx(true_second, abs=1e-12)


def test_a_cap_scales_down_surprising_turns_alone():
    parent, surprisal, reward = [-1, 0, 0], [0.0, 8.0, 1.0], [NAN, 1.0, 0.0]
    assert surprisal_tree_advantages(parent, surprisal, reward).tolist() == [0.0, 1.0, -1.0]
    assert surprisal_tree_advantages(parent, surprisal, reward, cap=2.0).tolist() == [0.0, 0.25, -1.0]


def test_equal_rewards_are_worth_nothing_and_one_leaf_keeps_its_reward():
    parent = [-1, 0, 1, 1, 0]
    reward = [NAN, NAN, 0.1, 0.1, 0.1]
    assert not surprisal_tree_advantages(parent, [0.0, 1.0, 2.0, 0.3, 0.7], reward).any()
    assert surprisal_tree_advantages([-1, 0], [0.0, 1.0], [NAN, 0.5]).tolist() == [0.0, 0.5]


def test_a_policy_without_surprise_has_a_credit():
    got = surprisal_tree_advantages([-1, 0, 0], [0.0, 0.0, 0.0], [NAN, 1.0, 0.0])
    assert got.tolist() == [0.0, 1.0, -1.0]


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"surprisal": [0.0, 1.0]}, "shape"),
        ({"surprisal": [0.0, -1.0, 1.0]}, "at least 0"),
        ({"leaf_reward": [NAN, NAN, NAN]}, "without leaves"),
        ({"leaf_reward": [NAN, np.inf, 0.0]}, "finite"),
        ({"beyond": -0.1}, "beyond"),
        ({"cap": 0.0}, "cap"),
    ],
)
def test_bad_trees_are_errors(changed, match):
    given = {"parent": [-1, 0, 0], "surprisal": [0.0, 1.0, 1.0], "leaf_reward": [NAN, 1.0, 0.0], **changed}
    with pytest.raises(ValueError, match=match):
        surprisal_tree_advantages(**given)


def test_the_rule_reads_the_surprisal_of_sampled_tokens():
    def turn(log_probs, sampled=None):
        log_probs = np.array(log_probs, dtype=np.float32)
        chosen = log_probs if sampled is None else log_probs[np.array(sampled)]
        return Turn((), (3,) * len(log_probs), log_probs, sampled, "", "", -float(chosen.mean()), "stop")

    tree = Tree([1])
    tree.close(tree.add(0, turn([-1.0, -1.0])), 1.0)
    tree.close(tree.add(0, turn([-1.0, -7.0], [True, False])), 1.0)  # the forced token does not count
    tree.close(tree.add(0, turn([-3.0])), 0.0)
    got = credit_rules()["surprisal"](tree).advantages
    assert got == pytest.approx([0.0, 3 / 4, 3 / 5, -1.0])
