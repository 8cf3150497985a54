"""GSPO: one ratio per branch."""

from __future__ import annotations

from torch import Tensor

from at2po_agent.losses.base import LossResult, LossTotals, aggregate, prepare, sequence_ratio
from at2po_agent.losses.clipping import Clip, clip_metrics, clipped_surrogate, k3, ratio_metrics


def gspo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    turn_ids: Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
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
        totals: Counts of the whole minibatch when this call is a piece of it.
        weights: float[B, T], replaces the mean over branches.

    Returns:
        loss, a scalar; metrics (`ratio_metrics`, `clip_metrics`).

    References:
        GSPO, https://arxiv.org/abs/2507.18071 (the token form, GSPO-token, whose gradient is the same).
    """
    clip = Clip(clip_low, clip_high)
    inputs = prepare(log_probs, old_log_probs, advantages, turn_ids)
    ratio, log_ratio = sequence_ratio(inputs)
    surrogate = clipped_surrogate(ratio, inputs.advantages, clip)
    loss = -aggregate(surrogate, inputs, totals, weights, by="branch")
    bounded = log_ratio.clamp(-20.0, 20.0)
    kl_sum = (inputs.lengths * k3(bounded, bounded.exp())).sum()
    metrics = ratio_metrics(inputs, ratio, kl_sum, totals)
    return loss, metrics | clip_metrics(inputs, ratio, surrogate, totals)
