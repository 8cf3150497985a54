"""Drawing tokens: inverse CDF of given uniforms, so that a draw depends on its own row alone.

Pure tensor functions; no state, no generator.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_LARGEST_UNIFORM = 1.0 - 2.0**-22  # below the sum of a float32 CDF whatever its rounding
_BLOCK = 1024


class Draw(NamedTuple):
    """tokens: int64[B]; log_probs: float32[B], nats."""

    tokens: Tensor
    log_probs: Tensor


def distribution(logits: Tensor, temperature: Tensor | None = None) -> Tensor:
    """Log-probs of the next token at each row's temperature.

    Args:
        logits: float[B, V].
        temperature: float32[B]; a greedy row (0) and None mean 1.

    Returns:
        float32[B, V], nats.
    """
    scores = logits.float()
    if temperature is not None:
        scores = scores / torch.where(temperature > 0, temperature, 1.0).unsqueeze(-1)
    return torch.log_softmax(scores, dim=-1)


def draw(
    log_probs: Tensor,
    uniforms: Tensor,
    *,
    greedy: Tensor | None = None,
    top_p: Tensor | None = None,
    forced: Tensor | None = None,
) -> Draw:
    """Choose one token per row; its log-prob is that of the whole distribution, not of the top-p set.

    Args:
        log_probs: float32[B, V] from `distribution`.
        uniforms: float64[B] in [0, 1).
        greedy: bool[B], rows that take the most likely token.
        top_p: float32[B]; rows below 1 keep the smallest set of likely tokens with at least this mass.
        forced: int64[B], the token of a row, or -1 to sample it.
    """
    tokens = _inverse_cdf(log_probs.exp(), uniforms)
    if top_p is not None:
        rows = (top_p < 1).nonzero().squeeze(-1)
        tokens[rows] = _draw_top_p(log_probs[rows].exp(), uniforms[rows], top_p[rows])
    if greedy is not None:
        tokens = torch.where(greedy, log_probs.argmax(dim=-1), tokens)
    if forced is not None:
        tokens = torch.where(forced >= 0, forced, tokens)
    return Draw(tokens, log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1))


def entropy(log_probs: Tensor) -> Tensor:
    """Shannon entropy of each row in nats: -sum p log p."""
    return -(log_probs.exp() * log_probs).nan_to_num(0.0).sum(dim=-1)


def _inverse_cdf(probs: Tensor, uniforms: Tensor) -> Tensor:
    """The first index whose running sum exceeds uniform * total: never one of probability 0.

    Large vocabularies are searched by block first: sums stay short, so float32 does not lose the tail.
    """
    size = probs.shape[-1]
    uniforms = uniforms.clamp(max=_LARGEST_UNIFORM).float().unsqueeze(-1)
    if size <= _BLOCK:
        return _search(probs.cumsum(dim=-1), uniforms).squeeze(-1)
    blocks = F.pad(probs, (0, -size % _BLOCK)).view(len(probs), -1, _BLOCK)
    sums = blocks.sum(dim=-1)
    ends = sums.cumsum(dim=-1)
    block = _search(ends, uniforms)
    mass = sums.gather(-1, block)
    rest = (uniforms * ends[:, -1:] - (ends.gather(-1, block) - mass)) / mass
    inner = blocks.gather(1, block.unsqueeze(-1).expand(-1, 1, _BLOCK)).squeeze(1)
    return (block * _BLOCK + _search(inner.cumsum(dim=-1), rest.clamp(0.0, _LARGEST_UNIFORM))).squeeze(-1)


def _search(cdf: Tensor, uniforms: Tensor) -> Tensor:
    found = torch.searchsorted(cdf, uniforms * cdf[:, -1:], right=True)
    return found.clamp(max=cdf.shape[-1] - 1)  # only a row of NaN exceeds it


def _draw_top_p(probs: Tensor, uniforms: Tensor, top_p: Tensor) -> Tensor:
    sorted_probs, order = probs.sort(dim=-1, descending=True, stable=True)
    before = sorted_probs.cumsum(dim=-1) - sorted_probs
    kept = torch.where(before < top_p.unsqueeze(-1), sorted_probs, 0.0)
    return order.gather(-1, _inverse_cdf(kept, uniforms).unsqueeze(-1)).squeeze(-1)
