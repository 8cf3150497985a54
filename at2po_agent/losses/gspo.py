"""GSPO: one ratio per branch."""

from __future__ import annotations

from torch import Tensor

from at2po_agent.losses.base import (
    Aggregation,
    LossResult,
    LossTotals,
    branch_ratio,
    clipped_surrogate,
    prepare,
)
from at2po_agent.losses.metrics import loss_metrics


def gspo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    turn_ids: Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    aggregation: Aggregation = "branch",
    totals: LossTotals | None = None,
    weights: Tensor | None = None,
) -> LossResult:
    """Sequence-level clipped policy loss.

    `l = (1/|y|) sum_t (log pi_t - log pi_old_t)`; `log s_t = log pi_t - sg(log pi_t) + sg(l)`, at most 10;
    `L_t = max(-A s_t, -A clip(s_t, 1 - e_low, 1 + e_high))`; mean over branches. No dual clip.

    Args:
        log_probs: float[B, T], nats, current policy.
        old_log_probs: float[B, T], nats, at the start of the update.
        advantages: float[B, T].
        turn_ids: int64[B, T], -1 where the policy did not sample the token.
        clip_low: e_low.
        clip_high: e_high.
        aggregation: How the numbers of the tokens add up, see `Inputs.aggregate`.
        totals: Counts of the whole minibatch when this call is a piece of it.
        weights: float[B, T], replaces the mean over branches.

    Returns:
        loss, a scalar; metrics (`loss_metrics`).

    References:
        GSPO, https://arxiv.org/abs/2507.18071 (the token form, GSPO-token, whose gradient is the same).
    """
    inputs = prepare(log_probs, old_log_probs, advantages, turn_ids, totals, weights)
    ratio = branch_ratio(inputs)
    surrogate = clipped_surrogate(ratio, inputs.advantages, low=clip_low, high=clip_high)
    loss = -inputs.aggregate(surrogate, by=aggregation)
    return loss, loss_metrics(inputs, ratio, surrogate)
