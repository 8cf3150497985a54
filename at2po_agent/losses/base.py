"""What all policy losses share: the contract of their inputs, the ratios, the clipping, the aggregation.

A loss is `-aggregate(surrogate(ratio, advantages))`:

- a *ratio* is one number per token, computed from the token, its turn or its branch, and its derivative with
  respect to that token's log-prob is the ratio itself. For turns and branches this is the form of GSPO and
  AT2PO, `log s_t = log pi_t - sg(log pi_t) + sg(l)`; for tokens it is the plain derivative;
- a *surrogate* is one number per token and knows nothing of rows, turns or weights, so a packed tree can use
  it with its own weights;
- an *aggregation* divides by counts of the whole minibatch (`LossTotals`), so that the pieces of a minibatch
  add up to the same loss, gradient and metrics however it is cut.

Positions with turn id -1 never matter, whatever they hold (nan and inf included): they are masked with
`where` before any arithmetic that carries a gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self, TypeAlias

import torch
from torch import Tensor

from at2po_agent.losses.segments import TurnSegments

Metrics: TypeAlias = dict[str, Tensor]
LossResult: TypeAlias = tuple[Tensor, Metrics]
RatioLevel: TypeAlias = Literal["token", "turn", "branch"]

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are kept within +-20 so that no ratio overflows or vanishes; far outside of every clip."""
TURN_RATIO_LIMIT = math.exp(10.0)
"""Turn and sequence ratios have no gradient beyond a log-ratio of 10 (algorithms.md section 1)."""


@dataclass(frozen=True)
class LossTotals:
    """Counts of a whole minibatch, by which the losses of its pieces are normalised.

    Attributes:
        branches: Rows.
        tokens: Sampled tokens.
        turns: Turns with a sampled token.
        entropy_mean: Mean entropy of the sampled tokens in nats, a scalar; None where nobody needs it.
        entropy_std: Their standard deviation (unbiased), a scalar.
    """

    branches: int
    tokens: int
    turns: int
    entropy_mean: Tensor | None = None
    entropy_std: Tensor | None = None

    @classmethod
    def of(cls, turn_ids: Tensor, entropies: Tensor | None = None) -> Self:
        """Count a whole minibatch. Counts are read where `turn_ids` lies: keep it on the host.

        Args:
            turn_ids: int64[B, T], -1 where not sampled.
            entropies: float[B, T] in nats, on any device, or None. Nothing waits for them.
        """
        sampled = turn_ids >= 0
        tokens = int(sampled.sum())
        counts = TurnSegments.of(turn_ids).counts
        statistics = () if entropies is None else mean_and_std(entropies, sampled, tokens)
        return cls(turn_ids.shape[0], tokens, int((counts > 0).sum()), *statistics)


def mean_and_std(values: Tensor, sampled: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of `count` sampled tokens, 0 where there are too few."""
    sampled = sampled.to(values.device)
    mean = mask(values.double(), sampled).sum() / max(count, 1)
    squares = mask(values.double() - mean, sampled).square().sum()
    return mean, (squares / max(count - 1, 1)).sqrt()


class Inputs(NamedTuple):
    """Checked tensors of one loss call: float, advantages 0 where not sampled."""

    log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    sampled: Tensor
    lengths: Tensor


def prepare(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, turn_ids: Tensor) -> Inputs:
    """Check the common contract and mask the advantages.

    Args:
        log_probs: float[B, T], nats, current policy; half precision is computed in float32.
        old_log_probs: float[B, T], nats, at the start of the update.
        advantages: float[B, T].
        turn_ids: int64[B, T], -1 where the policy did not sample the token.

    Raises:
        ValueError: A tensor is not [B, T] with B, T >= 1 or of another shape, or has the wrong kind of dtype.
    """
    check_tokens(log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages)
    check_turn_ids(turn_ids, log_probs.shape)
    wide = torch.promote_types(log_probs.dtype, torch.float32)
    sampled = turn_ids >= 0
    return Inputs(
        log_probs=log_probs.to(wide),
        old_log_probs=old_log_probs.to(wide),
        advantages=mask(advantages.detach().to(wide), sampled),
        sampled=sampled,
        lengths=sampled.sum(dim=1, dtype=torch.int32).to(wide),
    )


def check_tokens(**tensors: Tensor) -> None:
    """Raise a `ValueError` unless all tensors are float[B, T] of one shape with B, T >= 1."""
    expected: tuple[int, ...] | None = None
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"{name} must be [B, T] with B, T >= 1, got shape {list(shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
        expected = expected or shape
        if shape != expected:
            first = next(iter(tensors))
            raise ValueError(f"{name} must have the shape of {first}, {list(expected)}, got {list(shape)}")


def check_turn_ids(turn_ids: Tensor, shape: tuple[int, ...]) -> None:
    """Raise a `ValueError` unless `turn_ids` is an int64 tensor of the given shape."""
    if turn_ids.dtype != torch.int64:
        raise ValueError(f"turn_ids must be int64 (-1 where not sampled), got {turn_ids.dtype}")
    if turn_ids.shape != shape:
        raise ValueError(f"turn_ids must have shape {list(shape)}, got {list(turn_ids.shape)}")


def check_at_least(minimum: float, **options: float | None) -> None:
    """Raise a `ValueError` that names the option unless every one is None or at least the minimum."""
    for name, value in options.items():
        if value is not None and not value >= minimum:
            raise ValueError(f"{name} must be at least {minimum:g}, got {value}")


def mask(values: Tensor, sampled: Tensor) -> Tensor:
    """Keep sampled tokens and put 0 elsewhere; what stood there, nan included, reaches no gradient."""
    return torch.where(sampled, values, 0.0)


class _TokenGradient(torch.autograd.Function):
    """Give a ratio the derivative `d ratio_t / d log pi_t = ratio_t`."""

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, ratio: Tensor) -> Tensor:  # noqa: ARG004  carries the gradient
        ctx.save_for_backward(ratio)
        return ratio.view_as(ratio)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (ratio,) = ctx.saved_tensors
        return grads[0] * ratio, None


def token_ratio(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """`r_t = exp(log pi_t - log pi_old_t)`.

    Returns:
        ratio [B, T] with gradient, 1 where not sampled; log_ratio [B, T] without gradient, 0 there.
    """
    with torch.no_grad():
        log_ratio = mask(inputs.log_probs - inputs.old_log_probs, inputs.sampled)
        log_ratio = log_ratio.clamp_(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        ratio = log_ratio.exp()
    return attach(inputs.log_probs, ratio), log_ratio


def turn_ratio(inputs: Inputs, segments: TurnSegments) -> tuple[Tensor, Tensor]:
    """`s_t = exp((1/|y_k|) sum_{t in k} (log pi_t - log pi_old_t))` for the tokens of turn k.

    Returns:
        ratio [B, T] with gradient, 1 where not sampled; log_ratio [B, K] per turn without gradient.
    """
    with torch.no_grad():
        log_ratio = segments.mean(inputs.log_probs - inputs.old_log_probs)
        per_turn = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
        ratio = segments.expand(per_turn, fill=1.0)
    return attach(inputs.log_probs, ratio), log_ratio


def sequence_ratio(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """`s_t = exp((1/|y|) sum_t (log pi_t - log pi_old_t))` over the branch's sampled tokens.

    Returns:
        ratio [B, T] with gradient, 1 where not sampled; log_ratio [B] per branch without gradient.
    """
    with torch.no_grad():
        difference = mask(inputs.log_probs - inputs.old_log_probs, inputs.sampled)
        log_ratio = difference.sum(dim=1) / inputs.lengths.clamp(min=1.0)
        per_branch = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
        ratio = torch.where(inputs.sampled, per_branch[:, None], 1.0)
    return attach(inputs.log_probs, ratio), log_ratio


def attach(log_probs: Tensor, ratio: Tensor) -> Tensor:
    """A ratio whose derivative with respect to each token's log-prob is the ratio itself."""
    attached: Tensor = _TokenGradient.apply(log_probs, ratio)  # type: ignore[no-untyped-call]
    return attached


def aggregate(
    per_token: Tensor, inputs: Inputs, totals: LossTotals | None, weights: Tensor | None, *, by: str
) -> Tensor:
    """Weigh a number per token and add up.

    `branch`: `sum_t x_t / (B |y_b|)`; `token`: `sum_t x_t / |tokens|`; B and |tokens| are those of the whole
    minibatch. Explicit weights replace both: `sum_t w_t x_t`.

    Args:
        per_token: float[B, T], 0 where not sampled.
        inputs: The checked inputs.
        totals: Counts of the whole minibatch; None when this call is all of it.
        weights: float[B, T], or None.
        by: `branch` or `token`.

    Returns:
        A scalar.
    """
    if weights is not None:
        if weights.shape != per_token.shape:
            raise ValueError(f"weights must have shape {list(per_token.shape)}, got {list(weights.shape)}")
        return (per_token * mask(weights.to(per_token.dtype), inputs.sampled)).sum()
    if by == "token":
        return per_token.sum() / token_count(inputs, totals)
    branches = inputs.lengths.shape[0] if totals is None else totals.branches
    return (per_token.sum(dim=1) / (inputs.lengths.clamp(min=1.0) * branches)).sum()


def token_count(inputs: Inputs, totals: LossTotals | None) -> Tensor | float:
    """Sampled tokens of the minibatch, at least 1."""
    return inputs.lengths.sum().clamp(min=1.0) if totals is None else max(float(totals.tokens), 1.0)
