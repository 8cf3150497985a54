"""ARPO's and AEPO's rules on trees written by hand.

Trees are lists of parents; first entropies in nats; V = 10 unless said otherwise.
"""

import math

import numpy as np
import pytest

from at2po_agent.expansion.adaptive import aepo_nodes, arpo_nodes


class Draws:
    """A generator that gives what it is told, and remembers how many draws were asked for."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def random(self, count: int) -> np.ndarray:
        given, self.values = self.values[:count], self.values[count:]
        assert len(given) == count
        return np.array(given)


def leaves_of(parents):
    return np.array([node not in parents for node in range(len(parents))])


def choose(rule, parents, entropy, draws=(), leaves=8, round=1, **options):
    return rule(
        np.array(parents),
        np.array(entropy, dtype=float),
        leaves_of(parents),
        leaves=leaves,
        round=round,
        vocab_size=options.pop("vocab_size", 10),
        generator=Draws(*draws),
        **options,
    )


# Two chains of two turns: root 0; 1-2 and 3-4.
TWO = [-1, 0, 1, 0, 3]


def test_a_turn_is_re_sampled_with_the_probability_of_its_entropy():
    # H - H_initial = ln 10 / 2 in chain 1: P = 0.5 + 0.2 / 2 = 0.6; -ln 10 in chain 2: P = 0.3
    entropy = [0, 1, 1 + math.log(10) / 2, 3, 3 - math.log(10)]
    assert choose(arpo_nodes, TWO, entropy, [0.59, 0.31]) == [2]
    assert choose(arpo_nodes, TWO, entropy, [0.61, 0.29]) == [4]


def test_the_baseline_is_the_chains_own_first_entropy():
    # With the wrong chain's baseline (3 for chain 1), P would be 0.5 + 0.2 (2 - 3)/ln 10 < 0.5.
    entropy = [0, 1, 2, 3, 3]
    assert choose(arpo_nodes, TWO, entropy, [0.55, 0.9]) == [2]


def test_the_budget_ends_the_choice_and_the_tree():
    entropy = [0, 1, 1, 1, 1]
    assert choose(arpo_nodes, TWO, entropy, [0.0, 0.0], leaves=3) == [2]
    assert choose(arpo_nodes, TWO, entropy, leaves=2) is None


def test_no_branch_so_deep_sends_the_rest_to_the_root():
    assert choose(arpo_nodes, TWO, [0, 1, 1, 1, 1], leaves=5, round=2) == [0, 0, 0]


def test_copies_bounds_the_branches_of_one_point():
    entropy = [0, 1, 1, 1, 1]
    assert choose(arpo_nodes, TWO, entropy, [0.0, 0.9], copies=3) == [2, 2]


def test_consecutive_branchings_lower_the_probability():
    # Root 0, first turn 1; its second turn was branched at (2 and 3); 4 follows 2: one branching before it.
    # Chain 5-6-7 has none. P = 0.5 and 0.5 (1 - 0.9) = 0.05 at penalty 0.9.
    parents = [-1, 0, 1, 1, 2, 0, 5, 6]
    entropy = [0, 1, 1, 1, 1, 1, 1, 1]
    assert choose(arpo_nodes, parents, entropy, [0.06, 0.06], round=2, penalty=0.9) == [7]
    assert choose(arpo_nodes, parents, entropy, [0.06, 0.06], round=2) == [4, 7]


def test_aepo_splits_the_budget_after_the_monitoring_chain():
    # H_root - H_tool = ln 3: sigmoid 0.75, m = round(8 * 0.75) = 6, one of which is the monitoring chain.
    entropy = [0, 1 + math.log(3), 1]
    assert choose(aepo_nodes, [-1, 0, 1], entropy) == [0] * 5
    # the other way round: sigmoid(-ln 3) = 0.25, m = 2
    assert choose(aepo_nodes, [-1, 0, 1], [0, 1, 1 + math.log(3)]) == [0]


def test_aepo_goes_on_as_arpo_with_a_penalty():
    parents = [-1, 0, 1, 1, 2, 0, 5, 6]
    entropy = [0, 1, 1, 1, 1, 1, 1, 1]
    # l = 1: P = 0.5 * 0.95 = 0.475
    assert choose(aepo_nodes, parents, entropy, [0.48, 0.48], round=3) == [7]
    assert choose(arpo_nodes, parents, entropy, [0.48, 0.48], round=2) == [4, 7]


@pytest.mark.parametrize("rule", [arpo_nodes, aepo_nodes])
def test_entropies_must_be_finite(rule):
    with pytest.raises(ValueError, match="finite"):
        choose(rule, TWO, [0, math.nan, 1, 1, 1], [0.5, 0.5])
