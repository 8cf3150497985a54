from __future__ import annotations

from math import inf, nan, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from at2po_agent.credit.groups import (
    anchor_advantages,
    discounted_returns,
    gigpo_advantages,
    group_advantages,
    is_informative,
    overlong_penalty,
    tree_grpo_advantages,
)


def test_group_advantages_by_hand() -> None:
    # 0, 0, 1, 1: mean 1/2, unbiased std sqrt(1/3) = 0.57735 (population: 0.5, which would give 1.0)
    unit = 0.5 / (sqrt(1 / 3) + 1e-6)
    np.testing.assert_allclose(group_advantages([0, 0, 1, 1]), [-unit, -unit, unit, unit], rtol=1e-12)
    assert group_advantages([0, 0, 1, 1], normalization="mean").tolist() == [-0.5, -0.5, 0.5, 0.5]


def test_group_edges() -> None:
    assert group_advantages([0.7]).tolist() == [0.7]
    assert group_advantages([0.1, 0.1, 0.1]).tolist() == [0.0, 0.0, 0.0]
    for bad in (nan, inf):
        with pytest.raises(ValueError, match="rewards must be finite: entry 1"):
            group_advantages([0.0, bad])
    with pytest.raises(ValueError, match=r"rewards must be float\[G\] with G >= 1"):
        group_advantages([])
    with pytest.raises(ValueError, match="normalization must be one of"):
        group_advantages([0.0, 1.0], normalization="std")  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=12), st.randoms(use_true_random=False))
def test_group_advantages_sum_to_zero_in_any_order(rewards: list[float], random: object) -> None:
    advantages = group_advantages(rewards)
    assert abs(advantages.sum()) < 1e-6
    order = list(range(len(rewards)))
    random.shuffle(order)  # type: ignore[attr-defined]
    np.testing.assert_allclose(group_advantages([rewards[i] for i in order]), advantages[order], atol=1e-6)


def test_tree_grpo_adds_two_z_scores() -> None:
    # question 1, 0, 0, 0, 0, 1: mean 1/3, std sqrt(4/15); trees (1, 0, 0): mean 1/3, std sqrt(1/3); (0, 0, 1)
    question, tree = sqrt(4 / 15) + 1e-6, sqrt(1 / 3) + 1e-6
    high, low = (2 / 3) / question + (2 / 3) / tree, (-1 / 3) / question + (-1 / 3) / tree
    expected = [high, low, low, low, low, high]
    np.testing.assert_allclose(
        tree_grpo_advantages([1, 0, 0, 0, 0, 1], [0, 0, 0, 1, 1, 1]), expected, rtol=1e-12
    )
    # a tree without contrast adds nothing; its branches keep the question's part
    got = tree_grpo_advantages([1, 1, 0, 0], [5, 5, 3, 3])
    np.testing.assert_allclose(got, group_advantages([1, 1, 0, 0]))
    # members may be interleaved
    assert tree_grpo_advantages([1, 0, 0, 1], [0, 1, 0, 1])[0] == pytest.approx(
        0.5 / (sqrt(1 / 3) + 1e-6) + 0.5 / (sqrt(1 / 2) + 1e-6)
    )
    with pytest.raises(ValueError, match=r"tree_ids must have shape \(2,\)"):
        tree_grpo_advantages([1, 0], [0])


def test_discounted_returns_by_hand() -> None:
    # terminal reward 1 after three turns: 0.95^2, 0.95, 1; a reward on the way adds itself
    np.testing.assert_allclose(discounted_returns([0, 0, 1]), [0.9025, 0.95, 1.0])
    np.testing.assert_allclose(discounted_returns([1, 0, 2], gamma=0.5), [1.5, 1.0, 2.0])
    assert discounted_returns([]).tolist() == []
    with pytest.raises(ValueError, match="gamma must be between 0 and 1"):
        discounted_returns([1.0], gamma=1.1)


def test_gigpo_by_hand() -> None:
    # two episodes of two turns from the same state A, then B and C; rewards 1 and 0
    returns = [0.95, 1.0, 0.0, 0.0]
    step = anchor_advantages(returns, ["A", "B", "A", "C"])
    # group A: 0.95 and 0: mean 0.475, unbiased std 0.95 / sqrt 2; B and C are alone: 0
    unit = 0.475 / (0.95 / sqrt(2) + 1e-6)
    np.testing.assert_allclose(step, [unit, 0.0, -unit, 0.0])
    episode = 0.5 / (sqrt(0.5) + 1e-6)
    total = gigpo_advantages([1, 0], [0, 0, 1, 1], returns, ["A", "B", "A", "C"], step_weight=2.0)
    np.testing.assert_allclose(total, [episode + 2 * unit, episode, -episode - 2 * unit, -episode])
    mean = gigpo_advantages([1, 0], [0, 0, 1, 1], returns, ["A", "B", "A", "C"], normalization="mean")
    np.testing.assert_allclose(mean, [0.975, 0.5, -0.975, -0.5])
    with pytest.raises(ValueError, match="episode_ids must be 4 indices of the 2 episodes"):
        gigpo_advantages([1, 0], [0, 0, 1, 2], returns, ["A", "B", "A", "C"])
    with pytest.raises(ValueError, match=r"returns must have shape \(1,\)"):
        anchor_advantages(returns, ["A"])


def test_overlong_penalty_by_hand() -> None:
    # starts at 4192, -1 at 6192, goes on beyond
    got = overlong_penalty([0, 4192, 5192, 6192, 7192])
    np.testing.assert_allclose(got, [0.0, 0.0, -0.5, -1.0, -1.5])
    assert float(overlong_penalty(90, max_length=100, buffer=20, factor=0.4)) == pytest.approx(-0.2)
    with pytest.raises(ValueError, match="1 <= buffer <= max_length"):
        overlong_penalty(1, buffer=0)


def test_informative_groups() -> None:
    assert is_informative([0, 1, 0])
    assert not is_informative([1, 1])
    assert not is_informative([1])
    with pytest.raises(ValueError, match="finite"):
        is_informative([nan, 1])
