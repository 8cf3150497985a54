"""Every loss on numbers that were worked out by hand, beside the plausible wrong formulas."""

from __future__ import annotations

from math import exp, log

import pytest
import torch
from helpers.loss_batches import Rows, batches, value_and_grad
from hypothesis import given, settings
from torch import Tensor

from at2po_agent import losses


def make_rows(
    log_ratios: list[list[float]], advantages: list[list[float]], turn_ids: list[list[int]]
) -> Rows:
    old = torch.full((len(turn_ids), len(turn_ids[0])), -1.0, dtype=torch.float64)
    change = torch.tensor(log_ratios, dtype=torch.float64)
    return Rows(old + change, old, torch.tensor(advantages, dtype=torch.float64), torch.tensor(turn_ids))


def tokens(*pairs: tuple[float, float]) -> Rows:
    """One branch of one turn: (ratio, advantage) of each token."""
    return make_rows([[log(r) for r, _ in pairs]], [[a for _, a in pairs]], [[0] * len(pairs)])


TWO_BRANCHES = make_rows(
    [[9.0, 0.002, 0.004, -0.01], [9.0, 0.005, 9.0, 9.0]],
    [[9.0, 1.0, 1.0, -2.0], [9.0, 1.0, 9.0, 9.0]],
    [[-1, 0, 0, 1], [-1, 0, -1, -1]],
)


def test_atpo_literal() -> None:
    # branch 1, turn 0: l = 0.003, s = 1.0030045 < 1.004, A = 1: L = -1.0030045 for both tokens
    #           turn 1: s = exp(-0.01) = 0.9900498 < 0.997, A = -2: L = max(1.9801, 1.994) = 1.994, clipped
    #   mean over 3 tokens: (-2.0060090 + 1.994) / 3 = -0.0040030
    # branch 2: s = exp(0.005) = 1.0050125 > 1.004, A = 1: L = -1.004, clipped
    # mean over 2 branches: (-0.0040030 - 1.004) / 2
    value, grad = value_and_grad(losses.atpo_loss, TWO_BRANCHES)
    assert float(value) == pytest.approx(-0.5040015015, abs=1e-9)
    # unclipped tokens: -A s / (B |y|) = -1.0030045 / 6
    expected = [[0.0, -0.1671674174, -0.1671674174, 0.0], [0.0, 0.0, 0.0, 0.0]]
    torch.testing.assert_close(grad, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("wrong", "value"),
    [
        # token ratios: exp(0.002), min(exp(0.004), 1.004), 1.994 and 1.004
        ("token ratios", ((-1.002002001 - 1.004 + 1.994) / 3 - 1.004) / 2),
        # sum instead of mean: l = 0.006 is clipped
        ("sum of log-ratios", ((-2 * 1.004 + 1.994) / 3 - 1.004) / 2),
        # one ratio per branch: l = -0.004 / 3, s = 0.9986676, nothing clipped in branch 1
        ("sequence ratio", ((-2 * 0.9986676 + 2 * 0.9986676) / 3 - 1.004) / 2),
        # turns weigh the same, whatever their length
        ("mean over turns", ((-1.0030045 + 1.994) / 2 - 1.004) / 2),
        # tokens of all branches together
        ("token mean", (-2.0060090 + 1.994 - 1.004) / 4),
        # the clip's two sides exchanged: bounds 0.996 and 1.003
        ("bounds exchanged", ((-2 * 1.003 + 2 * 0.996) / 3 - 1.003) / 2),
        # minimum instead of maximum
        ("optimistic", ((-2 * 1.0030045 + 2 * 0.9900498) / 3 - 1.0050125) / 2),
    ],
)
def test_atpo_is_none_of_the_plausible_wrong_formulas(wrong: str, value: float) -> None:
    right, _ = value_and_grad(losses.atpo_loss, TWO_BRANCHES)
    assert abs(float(right) - value) > 1e-6, wrong


def test_a_whole_turn_clips_together() -> None:
    # log-ratios 0.05 and -0.04: apart the first alone would be clipped; together l = 0.005, so both are
    rows = make_rows([[0.05, -0.04]], [[1.0, 1.0]], [[0, 0]])
    _, grad = value_and_grad(losses.atpo_loss, rows)
    assert grad.tolist() == [[0.0, 0.0]]
    _, metrics = losses.atpo_loss(*rows)
    assert float(metrics["clip_fraction"]) == 1.0
    _, apart = value_and_grad(losses.atpo_loss, Rows(*rows[:3], torch.tensor([[0, 1]])))
    assert (apart[0, 0] == 0) == (apart[0, 1] != 0)


def test_turn_ratio_is_clamped_at_ten() -> None:
    # A = -1 has no upper clip: the ratio stops at e^10, without gradient beyond
    inside, outside = make_rows([[9.9]], [[-1.0]], [[0]]), make_rows([[10.1]], [[-1.0]], [[0]])
    value, grad = value_and_grad(losses.atpo_loss, inside)
    assert float(value) == pytest.approx(exp(9.9))
    assert float(grad) == pytest.approx(exp(9.9))
    value, grad = value_and_grad(losses.atpo_loss, outside)
    assert float(value) == pytest.approx(exp(10.0))
    assert float(grad) == 0.0


def test_soft_clip_keeps_the_value_and_the_gradient() -> None:
    # the clipped turns of TWO_BRANCHES now pass -A * bound: 2 * 0.997 / 6 and -1.004 / 2
    value, grad = value_and_grad(losses.atpo_soft_clip_loss, TWO_BRANCHES)
    assert float(value) == pytest.approx(-0.5040015015, abs=1e-9)
    expected = [[0.0, -0.1671674174, -0.1671674174, 0.3323333333], [0.0, -0.502, 0.0, 0.0]]
    torch.testing.assert_close(grad, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(rows=batches(max_turns=1))
def test_with_one_turn_atpo_is_gspo(rows: Rows) -> None:
    value, grad = value_and_grad(losses.atpo_loss, rows, clip_low=3e-4, clip_high=4e-4)
    other, other_grad = value_and_grad(losses.gspo_loss, rows)
    torch.testing.assert_close(value, other)
    torch.testing.assert_close(grad, other_grad)


def test_with_two_turns_atpo_is_not_gspo() -> None:
    value, _ = value_and_grad(losses.atpo_loss, TWO_BRANCHES)
    other, _ = value_and_grad(losses.gspo_loss, TWO_BRANCHES, clip_low=3e-3, clip_high=4e-3)
    assert abs(float(value - other)) > 1e-4


def test_gspo_literal() -> None:
    # branch 1: l = (0.001 - 0.0003) / 2 = 0.00035, s = 1.00035006 < 1.0004: L = -s; two tokens, B = 2
    # branch 2: l = 0.0005 > ln 1.0004: L = -1.0004, clipped
    rows = make_rows([[0.001, -0.0003], [0.0004, 0.0006]], [[1.0, 1.0]] * 2, [[0, 1]] * 2)
    value, grad = value_and_grad(losses.gspo_loss, rows)
    assert float(value) == pytest.approx(-(1.000350061 + 1.0004) / 2, abs=1e-9)
    assert grad[0].tolist() == pytest.approx([-0.2500875153] * 2, abs=1e-9)
    assert grad[1].tolist() == [0.0, 0.0]


GRPO_TOKENS = tokens((1.5, 1.0), (5.0, -1.0), (0.5, -1.0), (0.5, 2.0))


@pytest.mark.parametrize(
    ("name", "per_token", "grads"),
    [
        # 1.5, A 1: -1.2 clipped; 5, A -1: 5 cut to 3 by the dual clip; 0.5, A -1: 0.8 clipped; 0.5, A 2: -1
        ("grpo", [-1.2, 3.0, 0.8, -1.0], [0.0, 0.0, 0.0, -1.0]),
        # the upper bound is 1.28
        ("dapo", [-1.28, 3.0, 0.8, -1.0], [0.0, 0.0, 0.0, -1.0]),
        # both bounds soft: the gradient is -A * bound; the dual clip stays hard
        ("gppo", [-1.2, 3.0, 0.8, -1.0], [-1.2, 0.0, 0.8, -1.0]),
        # only the upper bound soft
        ("aepo", [-1.2, 3.0, 0.8, -1.0], [-1.2, 0.0, 0.0, -1.0]),
    ],
)
def test_token_losses_literal(name: str, per_token: list[float], grads: list[float]) -> None:
    value, grad = value_and_grad(getattr(losses, f"{name}_loss"), GRPO_TOKENS)
    assert float(value) == pytest.approx(sum(per_token) / 4, abs=1e-12)
    assert grad[0].tolist() == pytest.approx([g / 4 for g in grads], abs=1e-12)


def test_grpo_without_dual_clip_and_its_metrics() -> None:
    value, grad = value_and_grad(losses.grpo_loss, GRPO_TOKENS, dual_clip=None)
    assert float(value) == pytest.approx((-1.2 + 5.0 + 0.8 - 1.0) / 4)
    assert float(grad[0, 1]) == pytest.approx(5.0 / 4)
    _, metrics = losses.grpo_loss(*GRPO_TOKENS)
    assert float(metrics["clip_fraction"]) == 0.5
    assert float(metrics["dual_clip_fraction"]) == 0.25
    assert float(metrics["ratio_mean"]) == pytest.approx((1.5 + 5 + 0.5 + 0.5) / 4)
    # k3: r - 1 - ln r = 0.0945349, 2.3905621, 0.1931472, 0.1931472; surprisal: mean of 1 - ln r
    assert float(metrics["approx_kl"]) == pytest.approx(0.7178478, abs=1e-6)
    assert float(metrics["surprisal"]) == pytest.approx(
        1 - (0.4054651 + 1.6094379 - 2 * 0.6931472) / 4, abs=1e-6
    )
    with pytest.raises(ValueError, match="dual_clip must be greater than 1"):
        losses.grpo_loss(*GRPO_TOKENS, dual_clip=0.9)


def test_grpo_takes_the_mean_over_all_tokens_not_over_branches() -> None:
    rows = make_rows([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [[1.0] * 3, [-1.0] * 3], [[0, 0, 0], [0, -1, -1]])
    value, _ = value_and_grad(losses.grpo_loss, rows)
    assert float(value) == pytest.approx((-3 + 1) / 4)  # a mean over branches would be 0


def test_sapo_literal() -> None:
    # r 1.5, A 1: -4 sigmoid(0.5) = -4 * 0.6224593312
    # r 0.5, A -1: (4 / 1.05) sigmoid(-0.525) = 3.8095238095 * 0.3716841
    value, grad = value_and_grad(losses.sapo_loss, tokens((1.5, 1.0), (0.5, -1.0)))
    low = 1 / (1 + exp(0.525))
    assert float(value) == pytest.approx((-2.4898373249 + 3.8095238095 * low) / 2, abs=1e-9)
    # d/d log pi = -A 4 sigmoid' r
    assert float(grad[0, 0]) == pytest.approx(-4 * 0.6224593312 * 0.3775406688 * 1.5 / 2, abs=1e-9)
    assert float(grad[0, 1]) == pytest.approx(4 * low * (1 - low) * 0.5 / 2, abs=1e-9)
    one_tau, _ = value_and_grad(losses.sapo_loss, tokens((1.5, 1.0), (0.5, -1.0)), tau_negative=1.0)
    assert abs(float(value - one_tau)) > 1e-3


ENTROPY_ROWS = make_rows([[0.0, 0.0, 0.0, 0.0]], [[1.0, 1.0, 2.0, 7.0]], [[0, 0, 0, -1]])
ENTROPIES = torch.tensor([[1.0, 2.0, 3.0, torch.nan]])


def test_aepo_scales_advantages_by_entropy() -> None:
    # mean 2, unbiased std 1: z = -1, 0, 1; A = 0.8, 1, 2.4: loss = -4.2 / 3. (Population std: -4.2449 / 3.)
    value, grad = value_and_grad(losses.aepo_loss, ENTROPY_ROWS, entropies=ENTROPIES)
    assert float(value) == pytest.approx(-1.4, abs=1e-12)
    assert grad[0].tolist() == pytest.approx([-0.8 / 3, -1 / 3, -0.8, 0.0], abs=1e-12)
    plain, _ = value_and_grad(losses.aepo_loss, ENTROPY_ROWS)
    assert float(plain) == pytest.approx(-4 / 3)
    off, _ = value_and_grad(losses.aepo_loss, ENTROPY_ROWS, entropies=ENTROPIES, entropy_weight=0.0)
    assert float(off) == pytest.approx(-4 / 3)


def test_aepo_edges() -> None:
    same, _ = value_and_grad(losses.aepo_loss, ENTROPY_ROWS, entropies=torch.ones(1, 4))
    assert float(same) == pytest.approx(-4 / 3)
    hidden = Rows(*ENTROPY_ROWS[:3], torch.full((1, 4), -1))
    nothing, _ = value_and_grad(losses.aepo_loss, hidden, entropies=ENTROPIES)
    assert float(nothing) == 0.0
    with pytest.raises(ValueError, match=r"entropies must have shape \[1, 4\]"):
        losses.aepo_loss(*ENTROPY_ROWS, entropies=ENTROPIES[:, :2])
    with pytest.raises(ValueError, match="entropy_weight must be at least 0"):
        losses.aepo_loss(*ENTROPY_ROWS, entropies=ENTROPIES, entropy_weight=-1.0)
    with pytest.raises(ValueError, match=r"LossTotals\.of"):
        losses.aepo_loss(
            *ENTROPY_ROWS, entropies=ENTROPIES, totals=losses.LossTotals.of(ENTROPY_ROWS.turn_ids)
        )


def kl_rows(differences: list[list[float]], turn_ids: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    ref = torch.full((len(turn_ids), len(turn_ids[0])), -2.0, dtype=torch.float64)
    return (ref + torch.tensor(differences)).requires_grad_(), ref, torch.tensor(turn_ids)


@pytest.mark.parametrize(
    ("estimator", "value", "slope"),
    # d = 0.1: k1 = d; k2 = d^2 / 2; k3 = exp(-0.1) - 1 + 0.1 (not exp(0.1) - 1 - 0.1 = 0.0051709)
    [("k1", 0.1, 1.0), ("k2", 0.005, 0.1), ("k3", 0.0048374180, 0.0951625820)],
)
def test_kl_literal(estimator: losses.kl.Estimator, value: float, slope: float) -> None:
    log_probs, ref, turn_ids = kl_rows([[0.1, torch.inf]], [[0, -1]])
    term, metrics = losses.kl_penalty(log_probs, ref, turn_ids, estimator=estimator)
    (grad,) = torch.autograd.grad(term, log_probs)
    assert term.item() == pytest.approx(value, abs=1e-8)
    assert grad[0].tolist() == pytest.approx([slope, 0.0], abs=1e-7)
    assert float(metrics["ref_kl"]) == term.item()


def test_kl_is_clamped_and_aggregated_as_asked() -> None:
    # d = -5: exp(5) - 6 = 142.4, clamped to 10 and without gradient; d = -1000 would overflow
    log_probs, ref, turn_ids = kl_rows([[-5.0, -1000.0, 0.0], [0.1, 0.0, 0.0]], [[0, 0, 0], [0, -1, -1]])
    term, _ = losses.kl_penalty(log_probs, ref, turn_ids)
    assert term.item() == pytest.approx((10 + 10 + 0.0048374) / 4, abs=1e-6)
    (grad,) = torch.autograd.grad(term, log_probs)
    assert grad[0].tolist() == [0.0, 0.0, 0.0]
    term, _ = losses.kl_penalty(log_probs, ref, turn_ids, aggregation="branch")
    assert term.item() == pytest.approx((20 / 3 + 0.0048374) / 2, abs=1e-6)
    with pytest.raises(ValueError, match="estimator must be one of"):
        losses.token_kl(log_probs, ref, turn_ids, estimator="k4")
    with pytest.raises(ValueError, match="aggregation must be one of"):
        losses.kl_penalty(log_probs, ref, turn_ids, aggregation="turn")


def test_drift_metrics_literal() -> None:
    # branch 1: turn sums 3 and -1 of 2: shares 1.5 and -0.5, softmax 0.8807971 and 0.1192029,
    #           entropy 0.3653339 / ln 2 = 0.5270652; branch 2: one turn, 0; branch 3: alike, 1
    rows = make_rows(
        [[1.0, 2.0, -1.0], [1.0, 0.0, 0.0], [0.5, 0.0, 0.5]],
        [[0.0] * 3] * 3,
        [[0, 0, 1], [0, -1, -1], [0, -1, 1]],
    )
    metrics = losses.drift_metrics(rows.log_probs, rows.old_log_probs, rows.turn_ids)
    assert float(metrics["turn_kl_entropy"]) == pytest.approx((0.5270652 + 0.0 + 1.0) / 3, abs=1e-6)
    # k3(l) = e^l - 1 - l: k3(1.5) = 1.9816891, k3(-1) = 0.3678794, k3(1) = 0.7182818, k3(0.5) = 0.1487213
    assert float(metrics["turn_kl"]) == pytest.approx(
        (1.9816891 + 0.3678794 + 0.7182818 + 2 * 0.1487213) / 5, abs=1e-6
    )
    # k3(2) = 4.3890561
    assert float(metrics["token_kl"]) == pytest.approx(
        (0.7182818 + 4.3890561 + 0.3678794 + 0.7182818 + 2 * 0.1487213) / 6, abs=1e-6
    )
    still = losses.drift_metrics(rows.old_log_probs, rows.old_log_probs, rows.turn_ids)
    assert [float(value) for value in still.values()] == [0.0, 0.0, 0.0]
