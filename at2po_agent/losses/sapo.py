"""SAPO: a sigmoid gate instead of a clip."""

from __future__ import annotations

from torch import Tensor

from at2po_agent.losses.base import Aggregation, LossResult, LossTotals, prepare, token_ratio
from at2po_agent.losses.metrics import loss_metrics


def sapo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    turn_ids: Tensor,
    *,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
    aggregation: Aggregation = "branch",
    totals: LossTotals | None = None,
    weights: Tensor | None = None,
) -> LossResult:
    """Soft adaptive policy loss.

    `L_t = -A (4 / tau) sigmoid(tau (r_t - 1))` with the token ratio r, tau = tau_positive for A > 0 and
    tau_negative else; mean over branches. At r = 1 its derivative is that of `-A r`.

    Args:
        log_probs: float[B, T], nats, current policy.
        old_log_probs: float[B, T], nats, at the start of the update.
        advantages: float[B, T].
        turn_ids: int64[B, T], -1 where the policy did not sample the token.
        tau_positive: Temperature of the gate for A > 0.
        tau_negative: Temperature of the gate for A <= 0.
        aggregation: How the numbers of the tokens add up, see `Inputs.aggregate`.
        totals: Counts of the whole minibatch when this call is a piece of it.
        weights: float[B, T], replaces the mean over branches (packed trees).

    Returns:
        loss, a scalar; metrics (`loss_metrics`; nothing is clipped).

    References:
        SAPO, https://arxiv.org/abs/2511.20347.
    """
    if not (tau_positive > 0 and tau_negative > 0):
        raise ValueError(f"temperatures must be positive, got {tau_positive} and {tau_negative}")
    inputs = prepare(log_probs, old_log_probs, advantages, turn_ids, totals, weights)
    ratio = token_ratio(inputs)
    gain, cost = inputs.advantages.clamp(min=0.0), inputs.advantages.clamp(max=0.0)
    surrogate = gain * _gate(ratio.per_token, tau_positive) + cost * _gate(ratio.per_token, tau_negative)
    loss = -inputs.aggregate(surrogate, by=aggregation)
    return loss, loss_metrics(inputs, ratio)


def _gate(ratio: Tensor, tau: float) -> Tensor:
    """`(4 / tau) sigmoid(tau (r - 1))`, elementwise; slope 1 at r = 1."""
    return (4.0 / tau) * (tau * (ratio - 1.0)).sigmoid()
