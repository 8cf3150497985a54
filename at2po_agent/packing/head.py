"""Output embedding and log-softmax as one operation, a chunk of tokens at a time.

`log softmax(h W' / temperature)[id]` of tokens x vocabulary numbers needs only one number per token. The
logits exist for a chunk of tokens at a time; the backward pass makes them again, unless all of them are few
(`keep_logits`): then what is kept is one tensor of their size, `exp(z - max)`, and no second product is
needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_CHUNK_LOGITS = 1 << 21
_FEWEST_TOKENS = 256
KEEP_LOGITS = 1 << 24


def linear_log_probs(
    states: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    with_entropies: bool = False,
    keep_logits: int = KEEP_LOGITS,
) -> tuple[Tensor, Tensor]:
    """Log-probs of tokens straight from hidden states.

    Args:
        states: float[S, D], the hidden states that predict the tokens.
        weight: float[V, D], output embedding.
        ids: int64[S], the tokens.
        bias: float[V], or None.
        temperature: What the logits are divided by, positive.
        with_entropies: Whether entropies are wanted; else they are 0.
        keep_logits: Most logits that are kept for the backward pass instead of being made again.

    Returns:
        log_probs float[S], nats, with gradient; entropies float[S] of the distributions, without. Both in
        float32 at least; products are made in autocast's number format where that is on.
    """
    if torch.is_autocast_enabled(states.device.type):
        narrow = torch.get_autocast_dtype(states.device.type)
        states, weight = states.to(narrow), weight.to(narrow)
        bias = None if bias is None else bias.to(narrow)
    else:
        states = states.to(weight.dtype)
    options = (1.0 / temperature, with_entropies, keep_logits)
    with torch.autocast(states.device.type, enabled=False):
        result: tuple[Tensor, Tensor] = _LinearLogProbs.apply(  # type: ignore[no-untyped-call]
            states, weight, bias, ids, options
        )
    return result


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        options: tuple[float, bool, int],
    ) -> tuple[Tensor, Tensor]:
        scale, with_entropies, keep_logits = options
        wide = torch.promote_types(states.dtype, torch.float32)
        log_probs = torch.empty(len(ids), dtype=wide, device=states.device)
        entropies, normalisers = torch.zeros_like(log_probs), torch.empty_like(log_probs)
        few = len(ids) * len(weight) <= keep_logits and any(ctx.needs_input_grad)
        kept = []
        for part in _chunks(len(ids), len(weight)):
            z = _scaled(states[part], weight, bias, scale)
            z -= z.amax(dim=-1, keepdim=True)
            log_probs[part] = z.gather(-1, ids[part, None])[:, 0]
            if with_entropies:
                shifted = z.clone()
            e = z.exp_()
            normalisers[part] = e.sum(dim=-1)
            if with_entropies:
                mean = (e * shifted.clamp_(min=-1e30)).sum(dim=-1) / normalisers[part]
                entropies[part] = normalisers[part].log() - mean
            if few:
                kept.append(e)
        log_probs -= normalisers.log()
        ctx.save_for_backward(states, weight, bias, ids, normalisers, *kept)
        ctx.scale = scale
        ctx.mark_non_differentiable(entropies)
        return log_probs, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias, ids, normalisers, *kept = ctx.saved_tensors
        needs_states, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_states = torch.empty_like(states) if needs_states else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        grad_bias = torch.zeros_like(bias) if needs_bias else None
        scaled = (grad * ctx.scale)[:, None]
        for number, part in enumerate(_chunks(len(ids), len(weight))):
            if kept:
                # A copy, so that a second backward pass of a retained graph finds what it needs.
                g = kept[number] * (-scaled[part] / normalisers[part, None])
            else:
                z = _scaled(states[part], weight, bias, ctx.scale)
                g = z.sub_(z.amax(dim=-1, keepdim=True)).exp_()
                g *= -scaled[part] / normalisers[part, None]
            g.scatter_add_(-1, ids[part, None], scaled[part])
            g = g.to(states.dtype)
            if grad_states is not None:
                torch.mm(g, weight, out=grad_states[part])
            if grad_weight is not None:
                grad_weight.addmm_(g.t(), states[part])
            if grad_bias is not None:
                grad_bias += g.sum(dim=0)
        return grad_states, grad_weight, grad_bias, None, None


def _scaled(states: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """`(h W' + b) * scale`, in float32 at least, in memory of its own."""
    z = torch.nn.functional.linear(states, weight, bias)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return z if scale == 1.0 else z.mul_(scale)


def _chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    """A few million logits each, and enough tokens that the weights are not read too often."""
    size = max(_FEWEST_TOKENS, _CHUNK_LOGITS // max(vocabulary, 1))
    return (slice(start, start + size) for start in range(0, tokens, size))
