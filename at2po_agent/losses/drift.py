"""How far a policy has moved since it sampled: metrics that mean the same for every loss."""

from __future__ import annotations

import torch
from torch import Tensor

from at2po_agent.losses.base import LossTotals, Metrics, prepare, token_count, token_ratio
from at2po_agent.losses.clipping import k3
from at2po_agent.losses.segments import TurnSegments


@torch.no_grad()
def drift_metrics(
    log_probs: Tensor, old_log_probs: Tensor, turn_ids: Tensor, *, totals: LossTotals | None = None
) -> Metrics:
    """Measure the change of the policy at token and turn level, whatever ratio the loss uses.

    Args:
        log_probs: float[B, T], nats.
        old_log_probs: float[B, T], nats.
        turn_ids: int64[B, T], -1 where not sampled.
        totals: Counts of the whole minibatch; None when this call is all of it.

    Returns:
        token_kl (mean k3 estimate per sampled token), turn_kl and turn_kl_entropy (see `turn_metrics`).
    """
    inputs = prepare(log_probs, old_log_probs, torch.zeros_like(old_log_probs), turn_ids)
    segments = TurnSegments.of(turn_ids, inputs.lengths.dtype)
    ratio, log_ratio = token_ratio(inputs)
    per_turn = segments.mean(inputs.log_probs - inputs.old_log_probs)
    token_kl = k3(log_ratio, ratio).sum() / token_count(inputs, totals)
    return {"token_kl": token_kl} | turn_metrics(segments, per_turn, totals)


@torch.no_grad()
def turn_metrics(segments: TurnSegments, log_ratio: Tensor, totals: LossTotals | None) -> Metrics:
    """Two numbers about turns; the pieces of a minibatch add up to its values.

    Args:
        segments: The batch's turns.
        log_ratio: [B, K], mean log-ratio of each turn.
        totals: Counts of the whole minibatch.

    Returns:
        turn_kl: mean over turns of the k3 estimate from the turn's mean log-ratio.
        turn_kl_entropy: mean over branches of the normalised entropy of `softmax_k(KL_k / KL_branch)`: 1
            when all
        turns moved alike, 0 for one turn (the paper's measure of how a step spreads over turns).
    """
    present = segments.counts > 0
    turns = present.sum().clamp(min=1) if totals is None else max(totals.turns, 1)
    branches = segments.shape[0] if totals is None else totals.branches
    bounded = log_ratio.clamp(-20.0, 20.0)
    return {
        "turn_kl": k3(bounded, bounded.exp()).sum() / turns,
        "turn_kl_entropy": _spread(log_ratio * segments.counts, present).sum() / branches,
    }


def _spread(turn_sums: Tensor, present: Tensor) -> Tensor:
    """Normalised entropy of the softmax of each turn's share of its branch's log-ratio: [B]."""
    whole = turn_sums.sum(dim=1, keepdim=True)
    moved = whole != 0
    share = torch.where(moved, turn_sums / torch.where(moved, whole, 1.0), 0.0)
    log_p = share.masked_fill(~present, -torch.inf).log_softmax(dim=1)
    entropy = -torch.where(present, log_p.exp() * log_p, 0.0).sum(dim=1)
    turns = present.sum(dim=1).clamp(min=2)
    return torch.where(moved[:, 0], entropy / turns.to(entropy.dtype).log(), 0.0)
