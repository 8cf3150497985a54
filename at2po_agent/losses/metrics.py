"""Figures about an update; the pieces of a minibatch add up to its values."""

from __future__ import annotations

import torch
from torch import Tensor

from at2po_agent.losses.base import (
    LOG_RATIO_LIMIT,
    Inputs,
    LossTotals,
    Metrics,
    Ratio,
    k3,
    mask,
    prepare,
    token_ratio,
)
from at2po_agent.losses.segments import TurnSegments


@torch.no_grad()
def loss_metrics(inputs: Inputs, ratio: Ratio, surrogate: Tensor | None = None) -> Metrics:
    """Describe one loss call.

    Args:
        inputs: The checked inputs.
        ratio: The loss's own ratio.
        surrogate: float[B, T], of `clipped_surrogate`; None where nothing is clipped.

    Returns:
        ratio_mean, approx_kl (the k3 estimate of KL(old || new)) and surprisal (mean -log pi in nats, an
        estimate of the entropy), each a mean over the sampled tokens. With a surrogate also the shares of
        those tokens that are bounded: clip_fraction (beyond the bounds) and dual_clip_fraction (beyond the
        ceiling).
    """
    tokens = inputs.tokens
    metrics = {
        "ratio_mean": ((ratio.per_token - 1.0).sum() + inputs.lengths.sum()) / tokens,
        "approx_kl": ratio.kl_sum / tokens,
        "surprisal": -mask(inputs.log_probs, inputs.sampled).sum() / tokens,
    }
    if surrogate is not None:
        # A bound can only lower A r, the ceiling only raise it: the sign of the difference tells which.
        bounded = (inputs.advantages * ratio.per_token - surrogate).sign_()
        metrics["clip_fraction"] = bounded.clamp(min=0.0).sum() / tokens
        metrics["dual_clip_fraction"] = -bounded.clamp_(max=0.0).sum() / tokens
    return metrics


@torch.no_grad()
def drift_metrics(
    log_probs: Tensor, old_log_probs: Tensor, turn_ids: Tensor, *, totals: LossTotals | None = None
) -> Metrics:
    """Measure how far the policy has moved since it sampled, at token and turn level, whatever the loss.

    Args:
        log_probs: float[B, T], nats.
        old_log_probs: float[B, T], nats.
        turn_ids: int64[B, T], -1 where not sampled.
        totals: Counts of the whole minibatch; None when this call is all of it.

    Returns:
        token_kl: mean over sampled tokens of the k3 estimate.
        turn_kl: mean over turns of the k3 estimate from the turn's mean log-ratio.
        turn_kl_entropy: mean over branches of the normalised entropy of `softmax_k(KL_k / KL_branch)`: 1
            when all turns moved alike, 0 for one turn (AT2PO's measure of how a step spreads over turns).
    """
    inputs = prepare(log_probs, old_log_probs, torch.zeros_like(old_log_probs), turn_ids, totals)
    segments = TurnSegments.of(turn_ids, inputs.lengths.dtype)
    log_ratio = segments.mean(inputs.log_probs - inputs.old_log_probs)  # [B, K]
    present = segments.counts > 0
    turns = present.sum().clamp(min=1) if totals is None else max(totals.turns, 1)
    branches = len(turn_ids) if totals is None else totals.branches
    bounded = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)

    # Each turn's share of its branch's log-ratio; a branch that did not move at all counts as 0.
    moved_by_turn = log_ratio * segments.counts
    moved_by_branch = moved_by_turn.sum(dim=1, keepdim=True)
    moved = moved_by_branch != 0
    share = torch.where(moved, moved_by_turn / torch.where(moved, moved_by_branch, 1.0), 0.0)
    log_p = share.masked_fill(~present, -torch.inf).log_softmax(dim=1)
    entropy = -torch.where(present, log_p.exp() * log_p, 0.0).sum(dim=1)
    largest = present.sum(dim=1).clamp(min=2).to(entropy.dtype).log()
    spread = torch.where(moved[:, 0], entropy / largest, 0.0)

    return {
        "token_kl": token_ratio(inputs).kl_sum / inputs.tokens,
        "turn_kl": k3(bounded, bounded.exp()).sum() / turns,
        "turn_kl_entropy": spread.sum() / branches,
    }
