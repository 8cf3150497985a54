"""GPPO and AEPO: one ratio per token, soft bounds, mean over tokens; AEPO scales advantages by entropy."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from at2po_agent.losses.base import (
    Aggregation,
    LossResult,
    LossTotals,
    check_at_least,
    clipped_surrogate,
    mask,
    mean_and_std,
    prepare,
    token_ratio,
)
from at2po_agent.losses.metrics import loss_metrics

_NO_SPREAD = 1e-9
"""Standard deviation in nats up to which entropies count as equal: their mean is rounded."""


def gppo_loss(
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
    """Token-level loss with both bounds soft, `(1 -/+ e) / sg(r) * r`, and a hard dual clip.

    The value is clipped, the gradient is kept; mean over all sampled tokens of the minibatch. Arguments and
    results are those of `grpo_loss`.

    References:
        GPPO, https://arxiv.org/abs/2508.07629.
    """
    inputs = prepare(log_probs, old_log_probs, advantages, turn_ids, totals, weights)
    ratio = token_ratio(inputs)
    surrogate = clipped_surrogate(
        ratio,
        inputs.advantages,
        low=clip_low,
        high=clip_high,
        ceiling=dual_clip,
        soft_low=True,
        soft_high=True,
    )
    loss = -inputs.aggregate(surrogate, by=aggregation)
    return loss, loss_metrics(inputs, ratio, surrogate)


def aepo_loss(  # noqa: PLR0913  the four tensors, AEPO's options, and what comes with a batch
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    turn_ids: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = 3.0,
    entropies: Tensor | None = None,
    entropy_weight: float = 0.2,
    aggregation: Aggregation = "token",
    totals: LossTotals | None = None,
    weights: Tensor | None = None,
) -> LossResult:
    """AEPO's loss: only the upper bound is soft (`gppo_half`), and advantages are scaled by entropy.

    `A <- A (1 + 0.2 z(H_t))`, z over the sampled tokens of the minibatch, without gradient; then
    `L_t = max(-A r, -A clip(r, 1 - e_low, (1 + e_high) / sg(r) * r))`, for A < 0 also `min(L_t, -c A)`;
    mean over tokens. Without `entropies` the advantages stay as they are; a configuration that names this
    loss always passes them, so that the scaling cannot be off unnoticed.

    Args:
        log_probs: float[B, T], nats, current policy.
        old_log_probs: float[B, T], nats, at the start of the update.
        advantages: float[B, T].
        turn_ids: int64[B, T], -1 where the policy did not sample the token.
        clip_low: e_low.
        clip_high: e_high.
        dual_clip: c > 1, or None for none.
        entropies: float[B, T], entropy of each token's distribution in nats, or None.
        entropy_weight: Weight of the standardised entropy.
        aggregation: How the numbers of the tokens add up, see `Inputs.aggregate`.
        totals: Counts of the whole minibatch when this call is a piece of it; with `entropies` it must
            hold their mean and standard deviation (`LossTotals.of(turn_ids, entropies)`).
        weights: float[B, T], replaces the mean over tokens (packed trees).

    Returns:
        loss, a scalar; metrics (`loss_metrics`, and entropy_scale, the mean |factor - 1| of the advantages).

    References:
        AEPO, https://arxiv.org/abs/2510.14545.
    """
    check_at_least(0.0, entropy_weight=entropy_weight)
    inputs = prepare(log_probs, old_log_probs, advantages, turn_ids, totals, weights)
    scale = {}
    if entropies is not None:
        factor = entropy_factor(entropies, inputs.sampled, weight=entropy_weight, totals=totals)
        factor = factor.to(inputs.advantages.dtype)
        inputs = replace(inputs, advantages=inputs.advantages * factor)
        scale = {"entropy_scale": (factor - 1.0).abs().sum() / inputs.tokens}
    ratio = token_ratio(inputs)
    surrogate = clipped_surrogate(
        ratio, inputs.advantages, low=clip_low, high=clip_high, ceiling=dual_clip, soft_high=True
    )
    loss = -inputs.aggregate(surrogate, by=aggregation)
    return loss, loss_metrics(inputs, ratio, surrogate) | scale


@torch.no_grad()
def entropy_factor(
    entropies: Tensor, sampled: Tensor, *, weight: float = 0.2, totals: LossTotals | None = None
) -> Tensor:
    """`1 + weight * z(H_t)`, z over the sampled tokens of the minibatch (unbiased std).

    Args:
        entropies: float[B, T], nats.
        sampled: bool[B, T].
        weight: Weight of z.
        totals: Holds mean and standard deviation of the whole minibatch when this call is a piece of it.

    Returns:
        float[B, T], 1 where not sampled and where the entropies do not vary.
    """
    if entropies.shape != sampled.shape:
        raise ValueError(f"entropies must have shape {list(sampled.shape)}, got {list(entropies.shape)}")
    if totals is None:
        mean, std = mean_and_std(entropies, sampled, int(sampled.sum()))
    elif totals.entropy_mean is None or totals.entropy_std is None:
        raise ValueError("totals lack the entropies' statistics: use LossTotals.of(turn_ids, entropies)")
    else:
        mean, std = totals.entropy_mean, totals.entropy_std
    z = (mask(entropies.double(), sampled) - mean) / torch.where(std > _NO_SPREAD, std, 1.0)
    return 1.0 + weight * mask(z, sampled)
