"""GRPO and DAPO: one ratio per token, hard bounds and a dual clip, mean over tokens."""

from __future__ import annotations

from torch import Tensor

from at2po_agent.losses.base import (
    Aggregation,
    LossResult,
    LossTotals,
    clipped_surrogate,
    prepare,
    token_ratio,
)
from at2po_agent.losses.metrics import loss_metrics


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    turn_ids: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = 3.0,
    aggregation: Aggregation = "token",
    totals: LossTotals | None = None,
    weights: Tensor | None = None,
) -> LossResult:
    """Token-level clipped policy loss with a dual clip.

    `r_t = exp(log pi_t - log pi_old_t)`; `L_t = max(-A r_t, -A clip(r_t, 1 - e_low, 1 + e_high))`, for
    A < 0 also `min(L_t, -c A)`; mean over all sampled tokens of the minibatch.

    Args:
        log_probs: float[B, T], nats, current policy.
        old_log_probs: float[B, T], nats, at the start of the update.
        advantages: float[B, T].
        turn_ids: int64[B, T], -1 where the policy did not sample the token.
        clip_low: e_low.
        clip_high: e_high.
        dual_clip: c > 1, or None for none.
        aggregation: How the numbers of the tokens add up, see `Inputs.aggregate`.
        totals: Counts of the whole minibatch when this call is a piece of it.
        weights: float[B, T], replaces the mean over tokens (packed trees).

    Returns:
        loss, a scalar; metrics (`loss_metrics`).

    References:
        GRPO, https://arxiv.org/abs/2402.03300; dual clip, https://arxiv.org/abs/1912.09729. GRPO's KL term is
        `kl_penalty`.
    """
    inputs = prepare(log_probs, old_log_probs, advantages, turn_ids, totals, weights)
    ratio = token_ratio(inputs)
    surrogate = clipped_surrogate(ratio, inputs.advantages, low=clip_low, high=clip_high, ceiling=dual_clip)
    loss = -inputs.aggregate(surrogate, by=aggregation)
    return loss, loss_metrics(inputs, ratio, surrogate)


def dapo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    turn_ids: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = 3.0,
    aggregation: Aggregation = "token",
    totals: LossTotals | None = None,
    weights: Tensor | None = None,
) -> LossResult:
    """GRPO's loss with a higher upper bound ("clip higher"); arguments and results are those of `grpo_loss`.

    References:
        DAPO, https://arxiv.org/abs/2503.14476.
    """
    return grpo_loss(
        log_probs,
        old_log_probs,
        advantages,
        turn_ids,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        aggregation=aggregation,
        totals=totals,
        weights=weights,
    )
