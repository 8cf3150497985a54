"""AT2PO's turn-level losses: the ratio of a token is that of its turn, so a whole turn clips together."""

from __future__ import annotations

from torch import Tensor

from at2po_agent.losses.base import LossResult, LossTotals, aggregate, prepare, turn_ratio
from at2po_agent.losses.clipping import Clip, clip_metrics, clipped_surrogate, k3, ratio_metrics
from at2po_agent.losses.drift import turn_metrics
from at2po_agent.losses.segments import TurnSegments


def atpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    turn_ids: Tensor,
    *,
    clip_low: float = 3e-3,
    clip_high: float = 4e-3,
    totals: LossTotals | None = None,
    weights: Tensor | None = None,
) -> LossResult:
    """Turn-level clipped policy loss.

    `l_k = (1/|y_k|) sum_{t in k} (log pi_t - log pi_old_t)`;
    `log s_t = log pi_t - sg(log pi_t) + sg(l_k)`, at most 10;
    `L_t = max(-A s_t, -A clip(s_t, 1 - e_low, 1 + e_high))`; mean over branches of the mean over the branch's
    sampled tokens. No dual clip. A branch without sampled tokens contributes 0.

    Args:
        log_probs: float[B, T], nats, current policy.
        old_log_probs: float[B, T], nats, at the start of the update.
        advantages: float[B, T].
        turn_ids: int64[B, T], -1 where the policy did not sample the token.
        clip_low: e_low.
        clip_high: e_high.
        totals: Counts of the whole minibatch when this call is a piece of it.
        weights: float[B, T], replaces the mean over branches (packed trees).

    Returns:
        loss, a scalar; metrics (`ratio_metrics`, `clip_metrics`, `turn_metrics`).

    Raises:
        ValueError: Wrong shapes or dtypes, or a negative clip.

    References:
        AT2PO, https://arxiv.org/abs/2601.04767. Turns come from `turn_ids`; the released code infers them
        from runs of the mask, with a Python loop.
    """
    clip = Clip(clip_low, clip_high)
    return _turn_loss((log_probs, old_log_probs, advantages, turn_ids), clip, totals, weights)


def atpo_soft_clip_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    turn_ids: Tensor,
    *,
    clip_low: float = 3e-3,
    clip_high: float = 4e-3,
    totals: LossTotals | None = None,
    weights: Tensor | None = None,
) -> LossResult:
    """Turn-level loss with soft bounds, `(1 -/+ e) / sg(s) * s`: the value is clipped, the gradient is kept.

    Args:
        log_probs: float[B, T], nats, current policy.
        old_log_probs: float[B, T], nats, at the start of the update.
        advantages: float[B, T].
        turn_ids: int64[B, T], -1 where the policy did not sample the token.
        clip_low: e_low.
        clip_high: e_high.
        totals: Counts of the whole minibatch when this call is a piece of it.
        weights: float[B, T], replaces the mean over branches (packed trees).

    Returns:
        loss, a scalar; metrics as `atpo_loss`.

    References:
        AT2PO's released code, `gspo_turn_soft_clip`.
    """
    clip = Clip(clip_low, clip_high, soft_low=True, soft_high=True)
    return _turn_loss((log_probs, old_log_probs, advantages, turn_ids), clip, totals, weights)


def _turn_loss(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    clip: Clip,
    totals: LossTotals | None,
    weights: Tensor | None,
) -> LossResult:
    inputs = prepare(*tensors)
    segments = TurnSegments.of(tensors[3], inputs.lengths.dtype)
    ratio, log_ratio = turn_ratio(inputs, segments)
    surrogate = clipped_surrogate(ratio, inputs.advantages, clip)
    loss = -aggregate(surrogate, inputs, totals, weights, by="branch")
    bounded = log_ratio.clamp(-20.0, 20.0)
    kl_sum = (segments.counts * k3(bounded, bounded.exp())).sum()
    metrics = ratio_metrics(inputs, ratio, kl_sum, totals) | clip_metrics(inputs, ratio, surrogate, totals)
    return loss, metrics | turn_metrics(segments, log_ratio, totals)
