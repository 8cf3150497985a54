"""What holds for every loss: the formulas, masking, cutting into pieces, order, padding, contracts."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.loss_batches import LOSSES, Rows, batches, random_rows, value_and_grad
from helpers.loss_reference import NAMES, TOKEN_MEAN, reference_loss
from hypothesis import given, settings
from hypothesis import strategies as st

from at2po_agent.losses import LossTotals, make_loss

every_loss = pytest.mark.parametrize("name", NAMES)
quick = settings(max_examples=40, deadline=None)


@every_loss
@quick
@given(rows=batches())
def test_value_and_gradient_are_those_of_the_formulas(name: str, rows: Rows) -> None:
    leaf = rows.log_probs.clone().requires_grad_()
    expected = reference_loss(name, leaf, *rows[1:])
    (expected_grad,) = torch.autograd.grad(expected + 0.0 * leaf.sum(), leaf)
    value, grad = value_and_grad(LOSSES[name], rows)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-12, check_dtype=False)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-12)


@every_loss
@quick
@given(rows=batches(drift=0.0))
def test_on_policy_the_gradient_is_the_policy_gradient(name: str, rows: Rows) -> None:
    # ratio 1 everywhere, nothing clipped: d loss / d log pi_t = -A_t / n, n = |tokens| or B |y_b|
    sampled = rows.turn_ids >= 0
    lengths = sampled.sum(dim=1, keepdim=True).clamp(min=1)
    per_token = sampled.sum().clamp(min=1) if name in TOKEN_MEAN else lengths * len(lengths)
    expected = torch.where(sampled, -rows.advantages / per_token, 0.0)
    leaf = rows.log_probs.clone().requires_grad_()
    value, metrics = LOSSES[name](leaf, *rows[1:])
    (grad,) = torch.autograd.grad(value, leaf)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-14)
    if sampled.any():
        assert float(metrics["ratio_mean"]) == pytest.approx(1.0)
        assert float(metrics["approx_kl"]) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("aggregation", ["token", "branch"])
@quick
@given(rows=batches(drift=0.0))
def test_with_one_update_a_rollout_all_ratio_levels_are_one_method(aggregation: str, rows: Rows) -> None:
    found = [
        value_and_grad(make_loss(name, {"aggregation": aggregation}), rows)[1]
        for name in ("grpo", "atpo", "gspo", "sapo", "gppo")
    ]
    for grad in found[1:]:
        torch.testing.assert_close(grad, found[0], rtol=1e-12, atol=1e-14)


@every_loss
def test_an_unknown_aggregation_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match="aggregation must be one of"):
        make_loss(name, {"aggregation": "mean"})


@every_loss
@quick
@given(rows=batches())
def test_unsampled_tokens_never_matter(name: str, rows: Rows) -> None:
    hidden = rows.turn_ids < 0
    poisoned = Rows(
        rows.log_probs.masked_fill(hidden, math.nan),
        rows.old_log_probs.masked_fill(hidden, -math.inf),
        rows.advantages.masked_fill(hidden, math.inf),
        rows.turn_ids,
    )
    value, grad = value_and_grad(LOSSES[name], rows)
    poisoned_value, poisoned_grad = value_and_grad(LOSSES[name], poisoned)
    assert torch.equal(value, poisoned_value)
    assert torch.equal(grad, poisoned_grad)
    assert (poisoned_grad[hidden] == 0).all()
    assert torch.isfinite(poisoned_grad).all()


@every_loss
def test_one_branch_without_sampled_tokens_contributes_nothing_but_counts(name: str) -> None:
    rows = random_rows(3, 2, 8, 2, 1e-3)
    rows.turn_ids[1] = -1
    value, grad = value_and_grad(LOSSES[name], rows)
    alone, _ = value_and_grad(LOSSES[name], Rows(*(x[:1] for x in rows)))
    share = 1.0 if name in TOKEN_MEAN else 0.5
    torch.testing.assert_close(value, share * alone)
    assert (grad[1] == 0).all()
    nothing, grad = value_and_grad(LOSSES[name], Rows(*rows[:3], torch.full_like(rows.turn_ids, -1)))
    assert float(nothing) == 0.0
    assert (grad == 0).all()


@every_loss
@quick
@given(rows=batches(), seed=st.integers(0, 99))
def test_order_of_branches_and_padding_do_not_matter(name: str, rows: Rows, seed: int) -> None:
    value, grad = value_and_grad(LOSSES[name], rows)
    order = torch.randperm(len(rows.turn_ids), generator=torch.Generator().manual_seed(seed))
    moved, moved_grad = value_and_grad(LOSSES[name], Rows(*(x[order] for x in rows)))
    torch.testing.assert_close(moved, value)
    torch.testing.assert_close(moved_grad, grad[order])
    pad = torch.nn.functional.pad
    padded = Rows(*(pad(x, (2, 3), value=-1 if x is rows.turn_ids else 7.0) for x in rows))
    wide, wide_grad = value_and_grad(LOSSES[name], padded)
    torch.testing.assert_close(wide, value)
    torch.testing.assert_close(wide_grad, pad(grad, (2, 3)))


@every_loss
@pytest.mark.parametrize("pieces", [1, 2, 8])
def test_pieces_of_a_minibatch_add_up(name: str, pieces: int) -> None:
    rows = random_rows(11, 8, 200, 5, 0.01)
    rows = Rows(*(x.float() if x.is_floating_point() else x for x in rows))
    options = {"entropies": rows.old_log_probs.square()} if name == "aepo" else {}
    totals = LossTotals.of(rows.turn_ids, options.get("entropies"))
    leaf = rows.log_probs.clone().requires_grad_()
    whole, whole_metrics = LOSSES[name](leaf, *rows[1:], **options)
    (expected,) = torch.autograd.grad(whole, leaf)
    value, sums = torch.zeros(()), dict.fromkeys(whole_metrics, 0.0)
    for part in torch.arange(8).chunk(pieces):
        per_row = {key: tensor[part] for key, tensor in options.items()}
        loss, metrics = LOSSES[name](*(x[part] for x in (leaf, *rows[1:])), totals=totals, **per_row)
        loss.backward()
        value += loss.detach()
        sums = {key: sums[key] + float(metrics[key]) for key in sums}
    assert leaf.grad is not None
    assert float((leaf.grad - expected).norm() / expected.norm()) < 1e-6
    torch.testing.assert_close(value, whole.detach(), rtol=1e-5, atol=1e-7)
    for key, total in sums.items():
        assert total == pytest.approx(float(whole_metrics[key]), rel=1e-4, abs=1e-7), key


@every_loss
def test_without_totals_pieces_would_not_add_up(name: str) -> None:
    # negative control: pieces normalised by their own counts, and then averaged, weigh tokens wrongly
    rows = random_rows(11, 8, 200, 5, 0.01)
    rows.turn_ids[4:, 20:] = -1
    whole, _ = value_and_grad(LOSSES[name], rows)
    halves = [
        value_and_grad(LOSSES[name], Rows(*(x[part] for x in rows)))[0] for part in torch.arange(8).chunk(2)
    ]
    assert float((sum(halves) - whole).abs()) > 1e-3
    if name in TOKEN_MEAN:
        assert float((sum(halves) / 2 - whole).abs()) > 1e-3


@every_loss
def test_explicit_weights_replace_the_aggregation(name: str) -> None:
    rows = random_rows(5, 4, 30, 3, 1e-3)
    sampled = rows.turn_ids >= 0
    counts = sampled.sum() if name in TOKEN_MEAN else sampled.sum(dim=1, keepdim=True).clamp(min=1) * 4
    weights = torch.where(sampled, 1.0 / counts, math.nan)
    value, grad = value_and_grad(LOSSES[name], rows)
    weighted, weighted_grad = value_and_grad(LOSSES[name], rows, weights=weights)
    torch.testing.assert_close(weighted, value)
    torch.testing.assert_close(weighted_grad, grad)
    doubled, _ = value_and_grad(LOSSES[name], rows, weights=2 * weights)
    torch.testing.assert_close(doubled, 2 * value)
    with pytest.raises(ValueError, match=r"weights must have shape \[4, 30\]"):
        LOSSES[name](*rows, weights=weights[:1])


@every_loss
def test_half_precision_is_computed_in_float32(name: str) -> None:
    rows = random_rows(5, 4, 30, 3, 1e-2)
    half = Rows(*(x.bfloat16() if x.is_floating_point() else x for x in rows))
    exact = Rows(*(x.float() if x.is_floating_point() else x for x in half))
    value, grad = value_and_grad(LOSSES[name], half)
    assert value.dtype == torch.float32
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(value, value_and_grad(LOSSES[name], exact)[0])


@every_loss
def test_only_the_current_log_probs_get_a_gradient_and_metrics_none(name: str) -> None:
    rows = random_rows(5, 4, 30, 3, 1e-2)
    leaves = [x.clone().requires_grad_() for x in rows[:3]]
    value, metrics = LOSSES[name](*leaves, rows.turn_ids)
    value.backward()
    assert [leaf.grad is not None for leaf in leaves] == [True, False, False]
    assert value.shape == ()
    assert metrics
    assert all(metric.shape == () and not metric.requires_grad for metric in metrics.values())


@every_loss
@pytest.mark.parametrize("log_ratio", [-500.0, 500.0])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_extreme_ratios_stay_finite(name: str, log_ratio: float, advantage: float) -> None:
    rows = Rows(
        torch.tensor([[0.0, log_ratio]]),
        torch.zeros(1, 2),
        torch.tensor([[1.0, advantage]]),
        torch.tensor([[-1, 0]]),
    )
    value, grad = value_and_grad(LOSSES[name], rows)
    assert torch.isfinite(value)
    assert torch.isfinite(grad).all()


@every_loss
def test_wrong_shapes_dtypes_and_options_are_refused(name: str) -> None:
    rows = random_rows(5, 2, 6, 2, 1e-2)
    loss = LOSSES[name]
    with pytest.raises(ValueError, match=r"log_probs must be \[B, T\] with B, T >= 1, got shape \[6\]"):
        loss(*(x[0] for x in rows))
    with pytest.raises(ValueError, match="got shape"):
        loss(*(x[:, :0] for x in rows))
    with pytest.raises(
        ValueError, match=r"old_log_probs must have the shape of log_probs, \[2, 6\], got \[2, 5\]"
    ):
        loss(rows.log_probs, rows.old_log_probs[:, :5], rows.advantages, rows.turn_ids)
    with pytest.raises(ValueError, match="advantages must be floating point"):
        loss(rows.log_probs, rows.old_log_probs, rows.turn_ids, rows.turn_ids)
    with pytest.raises(ValueError, match="turn_ids must be int64"):
        loss(*rows[:3], rows.turn_ids.int())
    with pytest.raises(ValueError, match=r"turn_ids must have shape \[2, 6\]"):
        loss(*rows[:3], rows.turn_ids[:, :5])
    if name == "sapo":
        with pytest.raises(ValueError, match="temperatures must be positive"):
            loss(*rows, tau_positive=0.0)
        return
    for option in ("clip_low", "clip_high"):
        for bad in (-0.1, math.nan):
            with pytest.raises(ValueError, match=f"{option} must be at least 0"):
                loss(*rows, **{option: bad})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@every_loss
def test_no_loss_waits_for_the_device(name: str) -> None:
    rows = random_rows(5, 8, 60, 4, 1e-2)
    there = Rows(*(x.cuda() for x in rows))
    leaf = there.log_probs.clone().requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        value, _ = LOSSES[name](leaf, *there[1:])
        value.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(value.cpu().detach(), value_and_grad(LOSSES[name], rows)[0])
