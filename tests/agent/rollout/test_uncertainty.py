import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from at2po_agent.rollout.uncertainty import (
    FLOOR,
    RunningSignal,
    recent_change,
    running_threshold,
    turn_uncertainty,
)

# (entropy, two highest log-probs): confidence is -(mean of the two), so 1, 2, 1.5
TOKENS = [(0.2, (-0.5, -1.5)), (0.6, (-1.0, -3.0)), (0.4, (-1.0, -2.0))]


def signal(kind, tokens=TOKENS, **options):
    running = RunningSignal(kind, **options)
    return [running.add(entropy, top) for entropy, top in tokens]


def test_the_papers_signal_by_hand():
    # t=1: no spread yet, both halves 1/2: 0.4 * 0.5 + 0.6 * 0.5 = 0.5
    # t=2: H~ = 1 (largest so far), C~ = 1: 0.4 + 0.6 * 0 = 0.4
    # t=3: H~ = (0.4 - 0.2)/(0.6 - 0.2) = 0.5, C~ = (1.5 - 1)/(2 - 1) = 0.5: 0.2 + 0.3 = 0.5
    assert signal("paper", top=2) == pytest.approx([0.5, 0.4, 0.5])


def test_the_papers_signal_is_causal():
    longer = [*TOKENS, (9.0, (-5.0, -7.0))]
    assert signal("paper", longer, top=2)[:3] == signal("paper", top=2)
    # negative control: bounds of the whole turn would have changed the third token to 0.4 * 0.2/8.8 + ...
    assert signal("paper", longer, top=2)[2] != pytest.approx(0.4 * (0.2 / 8.8) + 0.6 * (1 - 0.5 / 5))


def test_the_released_signal_by_hand():
    # 0.6 * max log-prob + 0.4 (1 - H / ln V) with V = e^2 rounded to 7: ln 7
    expected = [0.6 * -0.5 + 0.4 * (1 - 0.2 / math.log(7)), 0.6 * -1.0 + 0.4 * (1 - 0.6 / math.log(7))]
    assert signal("released", TOKENS[:2], vocab_size=7) == pytest.approx(expected)


def test_the_two_signals_point_in_opposite_directions():
    sure, unsure = (0.1, (-0.01, -5.0)), (1.0, (-0.6, -0.8))
    assert signal("paper", [sure, unsure], top=2)[1] > 0.5
    assert np.diff(signal("released", [sure, unsure], vocab_size=10))[0] < 0


def test_top_counts_the_log_probs_that_the_confidence_averages():
    tokens = [(0.2, (-0.5, -1.5, -9.0)), (0.2, (-0.5, -1.7, -8.0))]
    two, three = signal("paper", tokens, top=2), signal("paper", tokens, top=3)
    assert two[1] == pytest.approx(0.4 * 0.5)  # confidence rose
    assert three[1] == pytest.approx(0.4 * 0.5 + 0.6)  # it fell


@given(
    st.lists(
        st.tuples(st.floats(0, 5), st.tuples(st.floats(-9, 0), st.floats(-9, 0))), min_size=1, max_size=30
    )
)
def test_the_papers_signal_stays_between_0_and_1(tokens):
    values = signal("paper", tokens, top=2)
    assert all(0 <= value <= 1 for value in values)


def test_the_uncertainty_of_a_turn_is_a_geometric_mean():
    assert turn_uncertainty([0.25, 1.0]) == pytest.approx(0.5)
    assert turn_uncertainty([0.25, 1.0]) != pytest.approx(0.625)  # negative control: arithmetic
    assert turn_uncertainty([-3.0]) == pytest.approx(FLOOR)
    assert turn_uncertainty([]) == 1.0


def test_recent_changes_by_mean_and_by_the_largest():
    values = [0.9, 0.5, 0.5, 0.5, 0.56]  # of the last three changes 0, 0, 0.06: mean 0.02, largest 0.06
    assert recent_change(values, kind="paper", window=3) == pytest.approx(0.02)
    assert recent_change(values, kind="released", window=3) == pytest.approx(0.06)
    assert recent_change(values, kind="paper", window=5) == math.inf  # too few tokens


def test_a_running_threshold_has_the_share_of_the_values_below_it():
    values = [0.5, math.inf, 0.1, 0.4, 0.2, 0.3, math.inf, math.inf, math.inf, math.inf]
    first = running_threshold(None, values, 0.2)
    assert first == 0.3  # the third smallest of ten: exactly 0.1 and 0.2 lie below
    # then half of the way to the next step's quantile, whose infinite values count as turns too
    assert running_threshold(first, [0.9, 0.7], 0.2) == pytest.approx((0.3 + 0.7) / 2)
    # negative control: a quantile of the finite values alone would be 0.2
    assert first != np.quantile([0.1, 0.2, 0.3, 0.4, 0.5], 0.2, method="higher")


def test_a_running_threshold_without_values_stays():
    assert running_threshold(0.3, [math.inf], 0.2) == 0.3
    assert running_threshold(None, [], 0.2) is None
    above = running_threshold(None, [0.5, math.inf, math.inf], 0.9)  # fewer values than wanted: all of them
    assert 0.5 < above < 0.5001


@given(st.lists(st.floats(0, 1) | st.just(math.inf), min_size=1, max_size=60), st.floats(0.05, 0.9))
def test_at_most_the_share_lies_below_a_first_threshold(values, share):
    threshold = running_threshold(None, values, share)
    if threshold is not None:
        assert sum(value < threshold for value in values) <= share * len(values)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("papr", {}), ("paper", {"top": 1}), ("paper", {"weight": 1.5}), ("released", {"vocab_size": 1})],
)
def test_bad_arguments_are_refused(kind, options):
    with pytest.raises(ValueError, match=r"signal must be|need 0"):
        RunningSignal(kind, **options)
