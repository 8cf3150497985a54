"""The clipped surrogate per token, shared by all losses that clip.

For A > 0 only the upper bound of `max(-A r, -A clip(r, 1 - e_low, 1 + e_high))` can be active, for A < 0
only the lower one, so the loss is `-(A+ min(r, 1 + e_high) + A- max(r, 1 - e_low))` with A+ = max(A,
0), A- = min(A, 0). A dual clip c bounds the ratio of A- from above: `min(., -c A)` for A < 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from at2po_agent.losses.base import (
    TURN_RATIO_LIMIT,
    Inputs,
    LossTotals,
    Metrics,
    check_at_least,
    mask,
    token_count,
)


@dataclass(frozen=True)
class Clip:
    """How ratios are bounded.

    Attributes:
        low: e_low >= 0, the lower bound is 1 - e_low.
        high: e_high >= 0, the upper bound is 1 + e_high.
        ceiling: Above it nothing has a gradient: the dual clip c of token ratios, e^10 of turn ratios.
        soft_low: Keep the gradient below the lower bound, `(1 - e_low) / sg(r) * r`.
        soft_high: Keep the gradient above the upper bound, `(1 + e_high) / sg(r) * r`.
    """

    low: float
    high: float
    ceiling: float | None = TURN_RATIO_LIMIT
    soft_low: bool = False
    soft_high: bool = False

    def __post_init__(self) -> None:
        check_at_least(0.0, clip_low=self.low, clip_high=self.high)
        if self.ceiling is not None and not self.ceiling > 1.0:
            raise ValueError(f"dual_clip must be greater than 1 (or None), got {self.ceiling}")


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


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip: Clip) -> Tensor:
    """`min(A r, A clip(r))`, the negative of the loss per token, with hard or soft bounds and a ceiling.

    Args:
        ratio: float[B, T] with gradient, positive.
        advantages: float[B, T], 0 where not sampled.
        clip: The bounds.

    Returns:
        float[B, T], 0 where the advantage is 0.
    """
    rising = _clamp(ratio, None, 1.0 + clip.high, soft=clip.soft_high)
    if clip.soft_low:
        falling = _clamp(ratio, 1.0 - clip.low, None, soft=True)
        falling = falling if clip.ceiling is None else falling.clamp(max=clip.ceiling)
    else:
        falling = ratio.clamp(1.0 - clip.low, clip.ceiling)
    return advantages.clamp(min=0.0) * rising + advantages.clamp(max=0.0) * falling


def _clamp(ratio: Tensor, low: float | None, high: float | None, *, soft: bool) -> Tensor:
    if not soft:
        return ratio.clamp(low, high)
    clamped: Tensor = _SoftClamp.apply(ratio, low, high)  # type: ignore[no-untyped-call]
    return clamped


@torch.no_grad()
def ratio_metrics(inputs: Inputs, ratio: Tensor, kl_sum: Tensor, totals: LossTotals | None) -> Metrics:
    """Metrics that every loss reports; the pieces of a minibatch add up to its values.

    Args:
        inputs: The checked inputs.
        ratio: float[B, T], 1 where not sampled.
        kl_sum: Sum of the k3 estimates over the sampled tokens, from the loss's own ratio.
        totals: Counts of the whole minibatch; None when this call is all of it.

    Returns:
        ratio_mean, approx_kl, surprisal (mean -log pi in nats, a one-sample estimate of the entropy): each a
        mean over the sampled tokens.
    """
    tokens = token_count(inputs, totals)
    return {
        "ratio_mean": ((ratio - 1.0).sum() + inputs.lengths.sum()) / tokens,
        "approx_kl": kl_sum / tokens,
        "surprisal": -mask(inputs.log_probs, inputs.sampled).sum() / tokens,
    }


@torch.no_grad()
def clip_metrics(inputs: Inputs, ratio: Tensor, surrogate: Tensor, totals: LossTotals | None) -> Metrics:
    """Which share of the sampled tokens is bounded.

    Args:
        inputs: The checked inputs.
        ratio: float[B, T].
        surrogate: float[B, T], of `clipped_surrogate`.
        totals: Counts of the whole minibatch; None when this call is all of it.

    Returns:
        clip_fraction (beyond e_low or e_high), dual_clip_fraction (beyond the ceiling).
    """
    tokens = token_count(inputs, totals)
    bounded = (inputs.advantages * ratio - surrogate).sign_()
    return {
        "clip_fraction": bounded.clamp(min=0.0).sum() / tokens,
        "dual_clip_fraction": -bounded.clamp_(max=0.0).sum() / tokens,
    }


def k3(log_ratio: Tensor, ratio: Tensor) -> Tensor:
    """Schulman's estimate of KL(old || new) from one sample of old, `r - 1 - log r`, elementwise.

    References:
        http://joschu.net/blog/kl-approx.html
    """
    return ratio - 1.0 - log_ratio
