"""AT2PO's turn-level losses: the ratio of a token is that of its turn, so a whole turn clips together."""

from __future__ import annotations

from torch import Tensor

from at2po_agent.losses.base import (
    Aggregation,
    LossResult,
    LossTotals,
    clipped_surrogate,
    prepare,
    turn_ratio,
)
from at2po_agent.losses.metrics import loss_metrics


def atpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    turn_ids: Tensor,
    *,
    clip_low: float = 3e-3,
    clip_high: float = 4e-3,
    aggregation: Aggregation = "branch",
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
        aggregation: How the numbers of the tokens add up, see `Inputs.aggregate`.
        totals: Counts of the whole minibatch when this call is a piece of it.
        weights: float[B, T], replaces the mean over branches (packed trees).

    Returns:
        loss, a scalar; metrics (`loss_metrics`).

    Raises:
        ValueError: Wrong shapes or dtypes, or a negative clip.

    References:
        AT2PO, https://arxiv.org/abs/2601.04767. Turns come from `turn_ids`; the released code infers them
        from runs of the mask, with a Python loop.
    """
    inputs = prepare(log_probs, old_log_probs, advantages, turn_ids, totals, weights)
    ratio = turn_ratio(inputs)
    surrogate = clipped_surrogate(ratio, inputs.advantages, low=clip_low, high=clip_high)
    loss = -inputs.aggregate(surrogate, by=aggregation)
    return loss, loss_metrics(inputs, ratio, surrogate)


def atpo_soft_clip_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    turn_ids: Tensor,
    *,
    clip_low: float = 3e-3,
    clip_high: float = 4e-3,
    aggregation: Aggregation = "branch",
    totals: LossTotals | None = None,
    weights: Tensor | None = None,
) -> LossResult:
    """Turn-level loss with soft bounds, `(1 -/+ e) / sg(s) * s`: the value is clipped, the gradient is kept.

    Arguments, results and errors are those of `atpo_loss`.

    References:
        AT2PO's released code, `gspo_turn_soft_clip`.
    """
    inputs = prepare(log_probs, old_log_probs, advantages, turn_ids, totals, weights)
    ratio = turn_ratio(inputs)
    surrogate = clipped_surrogate(
        ratio, inputs.advantages, low=clip_low, high=clip_high, soft_low=True, soft_high=True
    )
    loss = -inputs.aggregate(surrogate, by=aggregation)
    return loss, loss_metrics(inputs, ratio, surrogate)
