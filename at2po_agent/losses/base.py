"""What every policy loss is made of: checked inputs, a ratio, a clipped surrogate, an aggregation, metrics.

A loss is `-aggregate(surrogate(ratio, advantages))`:

- a *ratio* is one number per token, computed from the token, its turn or its branch. Its derivative with
  respect to that token's log-prob is the ratio itself. For turns and branches this is the form of GSPO and
  AT2PO, `log s_t = log pi_t - sg(log pi_t) + sg(l)`; for tokens it is the plain derivative;
- a *surrogate* is one number per token and knows nothing of rows, turns or weights;
- an *aggregation* divides by counts of the whole minibatch (`LossTotals`), so that the pieces of a minibatch
  add up to the same loss, gradient and metrics however the minibatch is cut.

Positions with turn id -1 never matter, whatever they hold (nan and inf included): they are masked with
`where` before any arithmetic that carries a gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self, TypeAlias, get_args

import torch
from torch import Tensor

from at2po_agent.losses.segments import TurnSegments

Metrics: TypeAlias = dict[str, Tensor]
LossResult: TypeAlias = tuple[Tensor, Metrics]
RatioLevel: TypeAlias = Literal["token", "turn", "branch"]
Aggregation: TypeAlias = Literal["token", "branch"]

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are kept within +-20 so that no ratio overflows or vanishes; far outside of every clip."""
TURN_RATIO_LIMIT = math.exp(10.0)
"""Turn and branch ratios have no gradient beyond a log-ratio of 10, as in AT2PO and GSPO."""


@dataclass(frozen=True)
class LossTotals:
    """Counts of a whole minibatch, by which the losses of its pieces are normalised.

    Attributes:
        branches: Rows.
        tokens: Sampled tokens.
        turns: Turns with a sampled token.
        entropy_mean: Mean entropy of the sampled tokens in nats, a scalar; None where no loss needs it.
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
    """Return mean and unbiased standard deviation of `count` sampled tokens, 0 where there are too few."""
    sampled = sampled.to(values.device)
    mean = mask(values.double(), sampled).sum() / max(count, 1)
    squares = mask(values.double() - mean, sampled).square().sum()
    return mean, (squares / max(count - 1, 1)).sqrt()


# Inputs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Inputs:
    """The checked tensors of one loss call, and how its numbers per token add up.

    Attributes:
        log_probs: float[B, T], nats.
        old_log_probs: float[B, T], nats.
        advantages: float[B, T], 0 where not sampled.
        turn_ids: int64[B, T].
        sampled: bool[B, T].
        lengths: float[B], sampled tokens of each branch.
        totals: Counts of the whole minibatch; None when this call is all of it.
        weights: float[B, T], which replace the aggregation; or None.
    """

    log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    turn_ids: Tensor
    sampled: Tensor
    lengths: Tensor
    totals: LossTotals | None
    weights: Tensor | None

    @property
    def tokens(self) -> Tensor | float:
        """Sampled tokens of the minibatch, at least 1."""
        if self.totals is None:
            return self.lengths.sum().clamp(min=1.0)
        return max(float(self.totals.tokens), 1.0)

    def aggregate(self, per_token: Tensor, *, by: Aggregation) -> Tensor:
        """Weigh a number per token, float[B, T] and 0 where not sampled, and add up to a scalar.

        `branch`: `sum_t x_t / (B |y_b|)`; `token`: `sum_t x_t / |tokens|`; B and |tokens| are those of the
        whole minibatch. Explicit weights replace both: `sum_t w_t x_t`.

        Raises:
            ValueError: Another aggregation, or weights of another shape.
        """
        if by not in get_args(Aggregation):
            raise ValueError(f"aggregation must be one of {get_args(Aggregation)}, got {by!r}")
        if self.weights is not None:
            if self.weights.shape != per_token.shape:
                raise ValueError(
                    f"weights must have shape {list(per_token.shape)}, got {list(self.weights.shape)}"
                )
            return (per_token * mask(self.weights.to(per_token.dtype), self.sampled)).sum()
        if by == "token":
            return per_token.sum() / self.tokens
        branches = self.lengths.shape[0] if self.totals is None else self.totals.branches
        return (per_token.sum(dim=1) / (self.lengths.clamp(min=1.0) * branches)).sum()


def prepare(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    turn_ids: Tensor,
    totals: LossTotals | None = None,
    weights: Tensor | None = None,
) -> Inputs:
    """Check the common contract of the losses and mask the advantages.

    Half precision is computed in float32.

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
        turn_ids=turn_ids,
        sampled=sampled,
        lengths=sampled.sum(dim=1, dtype=torch.int32).to(wide),
        totals=totals,
        weights=weights,
    )


def check_tokens(**tensors: Tensor) -> None:
    """Raise a `ValueError` unless all tensors are float[B, T] of one shape with B, T >= 1."""
    first, expected = "", (0, 0)
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"{name} must be [B, T] with B, T >= 1, got shape {list(shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
        if not first:
            first, expected = name, shape
        if shape != expected:
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


# Ratios ----------------------------------------------------------------------------------------------------


class Ratio(NamedTuple):
    """An importance ratio per token.

    Attributes:
        per_token: float[B, T] with gradient, 1 where not sampled.
        kl_sum: The k3 estimates of KL(old || new) of this ratio, added up over the sampled tokens.
    """

    per_token: Tensor
    kl_sum: Tensor


def token_ratio(inputs: Inputs) -> Ratio:
    """`r_t = exp(log pi_t - log pi_old_t)`."""
    with torch.no_grad():
        log_ratio = mask(inputs.log_probs - inputs.old_log_probs, inputs.sampled)
        log_ratio = log_ratio.clamp_(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        ratio = log_ratio.exp()
        kl_sum = k3(log_ratio, ratio).sum()
    return Ratio(_with_gradient(inputs.log_probs, ratio), kl_sum)


def turn_ratio(inputs: Inputs) -> Ratio:
    """`s_t = exp((1/|y_k|) sum_{t in k} (log pi_t - log pi_old_t))` for the tokens of turn k."""
    with torch.no_grad():
        segments = TurnSegments.of(inputs.turn_ids, inputs.lengths.dtype)
        log_ratio = segments.mean(inputs.log_probs - inputs.old_log_probs)  # [B, K]
        log_ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        per_turn = log_ratio.exp()
        ratio = segments.expand(per_turn, fill=1.0)
        kl_sum = (segments.counts * k3(log_ratio, per_turn)).sum()
    return Ratio(_with_gradient(inputs.log_probs, ratio), kl_sum)


def branch_ratio(inputs: Inputs) -> Ratio:
    """`s_t = exp((1/|y|) sum_t (log pi_t - log pi_old_t))` over the branch's sampled tokens."""
    with torch.no_grad():
        difference = mask(inputs.log_probs - inputs.old_log_probs, inputs.sampled)
        log_ratio = difference.sum(dim=1) / inputs.lengths.clamp(min=1.0)  # [B]
        log_ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        per_branch = log_ratio.exp()
        ratio = torch.where(inputs.sampled, per_branch[:, None], 1.0)
        kl_sum = (inputs.lengths * k3(log_ratio, per_branch)).sum()
    return Ratio(_with_gradient(inputs.log_probs, ratio), kl_sum)


def k3(log_ratio: Tensor, ratio: Tensor) -> Tensor:
    """Estimate KL(old || new) from one sample of old: `r - 1 - log r`, elementwise.

    References:
        Schulman, http://joschu.net/blog/kl-approx.html
    """
    return ratio - 1.0 - log_ratio


class _WithGradient(torch.autograd.Function):
    """Give a ratio the derivative `d ratio_t / d log pi_t = ratio_t`."""

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, ratio: Tensor) -> Tensor:  # noqa: ARG004  carries the gradient
        ctx.save_for_backward(ratio)
        return ratio.view_as(ratio)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (ratio,) = ctx.saved_tensors
        return grads[0] * ratio, None


def _with_gradient(log_probs: Tensor, ratio: Tensor) -> Tensor:
    attached: Tensor = _WithGradient.apply(log_probs, ratio)  # type: ignore[no-untyped-call]
    return attached


# Clipping --------------------------------------------------------------------------------------------------


def clipped_surrogate(
    ratio: Ratio,
    advantages: Tensor,
    *,
    low: float,
    high: float,
    ceiling: float | None = TURN_RATIO_LIMIT,
    soft_low: bool = False,
    soft_high: bool = False,
) -> Tensor:
    """`min(A r, A clip(r, 1 - low, 1 + high))`, the negative of the loss per token.

    For A > 0 only the upper bound can be active, for A < 0 only the lower one, so this is
    `A+ min(r, 1 + high) + A- max(r, 1 - low)` with A+ = max(A, 0) and A- = min(A, 0).

    Args:
        ratio: Positive ratios with gradient.
        advantages: float[B, T], 0 where not sampled.
        low: Distance of the lower bound from 1, at least 0.
        high: Distance of the upper bound from 1, at least 0.
        ceiling: For A < 0 nothing has a gradient above it: the dual clip c of token ratios
            (`max(., c A)`), e^10 for turn and branch ratios. More than 1, or None for none.
        soft_low: Keep the gradient below the lower bound, `(1 - low) / sg(r) * r`.
        soft_high: Keep the gradient above the upper bound, `(1 + high) / sg(r) * r`.

    Returns:
        float[B, T], 0 where the advantage is 0.
    """
    check_at_least(0.0, clip_low=low, clip_high=high)
    if ceiling is not None and not ceiling > 1.0:
        raise ValueError(f"dual_clip must be greater than 1 (or None), got {ceiling}")
    r = ratio.per_token
    rising = _soft_clamp(r, None, 1.0 + high) if soft_high else r.clamp(None, 1.0 + high)
    if soft_low:
        falling = _soft_clamp(r, 1.0 - low, None)
        falling = falling if ceiling is None else falling.clamp(max=ceiling)
    else:
        falling = r.clamp(1.0 - low, ceiling)
    return advantages.clamp(min=0.0) * rising + advantages.clamp(max=0.0) * falling


class _SoftClamp(torch.autograd.Function):
    """Clamp whose derivative is that of `clamp(r) / sg(r) * r`: the value is clipped, the gradient is not."""

    @staticmethod
    def forward(ctx: Any, ratio: Tensor, low: float | None, high: float | None) -> Tensor:
        clipped = ratio.clamp(low, high)
        ctx.save_for_backward(ratio, clipped)
        return clipped

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ratio, clipped = ctx.saved_tensors
        return grads[0] * clipped / ratio, None, None


def _soft_clamp(ratio: Tensor, low: float | None, high: float | None) -> Tensor:
    clamped: Tensor = _SoftClamp.apply(ratio, low, high)  # type: ignore[no-untyped-call]
    return clamped
