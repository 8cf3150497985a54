"""KL to a reference policy, estimated from the sampled tokens: as a loss term, or per token for a reward."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

from torch import Tensor

from at2po_agent.losses.base import (
    LOG_RATIO_LIMIT,
    Aggregation,
    LossResult,
    LossTotals,
    check_tokens,
    check_turn_ids,
    mask,
    prepare,
)

Estimator: TypeAlias = Literal["k1", "k2", "k3"]

KL_LIMIT = 10.0


def token_kl(
    log_probs: Tensor, ref_log_probs: Tensor, turn_ids: Tensor, *, estimator: Estimator = "k3"
) -> Tensor:
    """Estimate KL(pi || ref) at each sampled token.

    With `d = log pi - log ref`: `k1 = d`; `k2 = d^2 / 2`; `k3 = exp(-d) - 1 + d`, clamped to +-10.

    Args:
        log_probs: float[B, T], nats.
        ref_log_probs: float[B, T], nats.
        turn_ids: int64[B, T], -1 where not sampled.
        estimator: `k1`, `k2` or `k3`.

    Returns:
        float[B, T], 0 where not sampled. As a reward, subtract its multiple; the gradient is for a loss. (The
        gradient of k1 has expectation 0: as a loss it does nothing but add noise.)

    References:
        http://joschu.net/blog/kl-approx.html; the clamp is verl's.
    """
    check_tokens(log_probs=log_probs, ref_log_probs=ref_log_probs)
    check_turn_ids(turn_ids, log_probs.shape)
    if estimator not in get_args(Estimator):
        raise ValueError(f"estimator must be one of {get_args(Estimator)}, got {estimator!r}")
    difference = mask(log_probs.float() if log_probs.itemsize < 4 else log_probs, turn_ids >= 0)
    difference = difference - mask(ref_log_probs.detach().to(difference.dtype), turn_ids >= 0)
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    bounded = difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return ((-bounded).exp() - 1.0 + bounded).clamp(-KL_LIMIT, KL_LIMIT)


def kl_penalty(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    turn_ids: Tensor,
    *,
    estimator: Estimator = "k3",
    aggregation: Aggregation = "token",
    totals: LossTotals | None = None,
    weights: Tensor | None = None,
) -> LossResult:
    """KL loss term: add its multiple (GRPO: 0.001) to a policy loss.

    Args:
        log_probs: float[B, T], nats.
        ref_log_probs: float[B, T], nats.
        turn_ids: int64[B, T], -1 where not sampled.
        estimator: `k1`, `k2` or `k3`.
        aggregation: Mean over `token`s, or over `branch`es of the mean over their tokens.
        totals: Counts of the whole minibatch when this call is a piece of it.
        weights: float[B, T], replaces the aggregation (packed trees).

    Returns:
        The term, a scalar; metrics (ref_kl, the same without gradient).
    """
    if aggregation not in get_args(Aggregation):
        raise ValueError(f"aggregation must be one of {get_args(Aggregation)}, got {aggregation!r}")
    kl = token_kl(log_probs, ref_log_probs, turn_ids, estimator=estimator)
    inputs = prepare(log_probs, ref_log_probs, ref_log_probs, turn_ids, totals, weights)
    term = inputs.aggregate(kl, by=aggregation)
    return term, {"ref_kl": term.detach()}
