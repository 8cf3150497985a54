"""Log-probs and entropies of chosen tokens, without copies of the vocabulary's softmax.

Logits are the largest tensor of a training step: tokens x vocabulary. Four functions keep them small.
`logits_at` makes a model's logits at chosen tokens only. `token_stats` reads given logits a chunk at a time
and keeps nothing of their size for the backward pass but the logits themselves. `linear_log_probs` takes
hidden states and the output embedding instead, so that logits exist for one chunk at a time.
`exchanged_forward` puts it into a model.

All results are nats, computed in float32 at least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_CHUNK_LOGITS = 1 << 20
"""Logits that `token_stats` reads at a time: about as many as stay in a cache."""
_HEAD_CHUNK_LOGITS = 1 << 21
_HEAD_CHUNK_TOKENS = 256
"""Tokens that `linear_log_probs` takes at a time, at least: fewer would read the weights too often."""
KEEP_LOGITS = 1 << 24
_LOWEST = -1e30
"""Stands for a log-prob of -inf, so that its product with probability 0 is 0 and not nan."""


class TokenStats(NamedTuple):
    """Numbers per token.

    Attributes:
        log_probs: float[...], nats, with gradient.
        entropies: float[...], Shannon entropy of the distribution in nats, without gradient.
    """

    log_probs: Tensor
    entropies: Tensor


# From logits -----------------------------------------------------------------------------------------------


def token_stats(
    logits: Tensor, ids: Tensor, *, temperature: float = 1.0, with_entropies: bool = True
) -> TokenStats:
    """`log softmax(z / temperature)[ids]` and the entropy of `softmax(z / temperature)`.

    Args:
        logits: z, float[..., V]. Those of -inf have probability 0.
        ids: int64[...], the tokens whose log-probs are wanted.
        temperature: At which they were sampled.
        with_entropies: Whether entropies are wanted; else they are 0.

    Returns:
        Both, shaped as `ids`.

    Raises:
        ValueError: Shapes that do not fit, or a temperature that is not positive.
    """
    if not logits.is_floating_point() or logits.ndim == 0 or ids.shape != logits.shape[:-1]:
        raise ValueError(
            f"need float[..., V] and ids [...], got {logits.dtype}{list(logits.shape)} and {list(ids.shape)}"
        )
    if not temperature > 0:
        raise ValueError(
            f"temperature must be positive, got {temperature} (greedy decoding has no log-probs)"
        )
    log_probs, entropies = _GatherLogProbs.apply(  # type: ignore[no-untyped-call]
        logits.reshape(-1, logits.shape[-1]), ids.reshape(-1), temperature, with_entropies
    )
    return TokenStats(log_probs.view(ids.shape), entropies.view(ids.shape))


class _GatherLogProbs(torch.autograd.Function):
    """Log-prob and entropy per row; the backward pass writes `(onehot - softmax) * grad`, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ids: Tensor, temperature: float, with_entropies: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logits, ids)
        ctx.temperature = temperature
        wide = torch.promote_types(logits.dtype, torch.float32)
        log_probs = torch.zeros(len(ids), dtype=wide, device=logits.device)
        entropies = torch.zeros_like(log_probs)
        for part in _chunks(len(ids), max(1, _CHUNK_LOGITS // max(logits.shape[1], 1))):
            log_softmax = _tempered(logits[part], temperature).log_softmax(dim=-1)
            log_probs[part] = log_softmax.gather(-1, ids[part, None])[:, 0]
            if with_entropies:
                surprisal = log_softmax.clamp(min=_LOWEST)
                entropies[part] = -log_softmax.exp_().mul_(surprisal).sum(dim=-1)
        ctx.mark_non_differentiable(entropies)
        return log_probs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logits, ids = ctx.saved_tensors
        scale = (grads[0] / ctx.temperature)[:, None]
        result = torch.empty_like(logits)
        for part in _chunks(len(ids), max(1, _CHUNK_LOGITS // max(logits.shape[1], 1))):
            grad = _tempered(logits[part], ctx.temperature).softmax(dim=-1).mul_(-scale[part])
            result[part] = grad.scatter_add_(-1, ids[part, None], scale[part])
        return result, None, None, None


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide if temperature == 1.0 else wide / temperature


def _chunks(tokens: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, tokens, size))


# From hidden states ----------------------------------------------------------------------------------------


def linear_log_probs(
    states: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    with_entropies: bool = False,
    keep_logits: int = KEEP_LOGITS,
) -> TokenStats:
    """Log-probs of tokens straight from hidden states: output embedding and log-softmax as one operation.

    `log softmax(h W' / temperature)[id]` needs only one number per token. The logits exist for a chunk of
    tokens at a time; the backward pass makes them again, unless all of them are few (`keep_logits`): then one
    tensor of their size is kept, `exp(z - max)`, and no second product is needed.

    Args:
        states: float[S, D], the hidden states that predict the tokens.
        weight: float[V, D], output embedding.
        ids: int64[S], the tokens.
        bias: float[V], or None.
        temperature: Logits are divided by it; positive.
        with_entropies: Whether entropies are wanted; else they are 0.
        keep_logits: Most logits that are kept for the backward pass instead of being made again.

    Returns:
        Both float[S], in float32 at least; products are made in autocast's number format where that is on.
    """
    if torch.is_autocast_enabled(states.device.type):
        narrow = torch.get_autocast_dtype(states.device.type)
        states, weight = states.to(narrow), weight.to(narrow)
        bias = None if bias is None else bias.to(narrow)
    else:
        states = states.to(weight.dtype)
    with torch.autocast(states.device.type, enabled=False):
        return TokenStats(
            *_LinearLogProbs.apply(  # type: ignore[no-untyped-call]
                states, weight, bias, ids, 1.0 / temperature, with_entropies, keep_logits
            )
        )


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        scale: float,
        with_entropies: bool,
        keep_logits: int,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(states.dtype, torch.float32)
        log_probs = torch.empty(len(ids), dtype=wide, device=states.device)
        entropies, normalisers = torch.zeros_like(log_probs), torch.empty_like(log_probs)
        few = len(ids) * len(weight) <= keep_logits and any(ctx.needs_input_grad)
        kept = []
        for part in _head_chunks(ids, weight):
            # With m = max z, e = exp(z - m) and n = sum e: log p = z[id] - m - log n. Everything happens in
            # the memory of z, except that entropies need z - m beside e: H = log n - sum e (z - m) / n.
            z = _scaled_logits(states[part], weight, bias, scale)
            z -= z.amax(dim=-1, keepdim=True)
            log_probs[part] = z.gather(-1, ids[part, None])[:, 0]
            if with_entropies:
                shifted = z.clone()
            e = z.exp_()
            normalisers[part] = e.sum(dim=-1)
            if with_entropies:
                mean = (e * shifted.clamp_(min=_LOWEST)).sum(dim=-1) / normalisers[part]
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
        for number, part in enumerate(_head_chunks(ids, weight)):
            # g = d loss / d (h W' + b) = grad * scale * (onehot - e / n), then the products of a linear
            # layer.
            if kept:
                # A copy, so that a second backward pass of a retained graph finds what it needs.
                g = kept[number] * (-scaled[part] / normalisers[part, None])
            else:
                z = _scaled_logits(states[part], weight, bias, ctx.scale)
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
        return grad_states, grad_weight, grad_bias, None, None, None, None


def _scaled_logits(states: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """`(h W' + b) * scale`, in float32 at least, in memory of its own."""
    z = torch.nn.functional.linear(states, weight, bias)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return z if scale == 1.0 else z.mul_(scale)


def _head_chunks(ids: Tensor, weight: Tensor) -> Iterator[slice]:
    return _chunks(len(ids), max(_HEAD_CHUNK_TOKENS, _HEAD_CHUNK_LOGITS // max(len(weight), 1)))


# Within a model --------------------------------------------------------------------------------------------


def head_of(model: nn.Module) -> nn.Module | None:
    """The output embedding of a model; None where it has none that transformers knows."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = None if get_head is None else get_head()
    return head if isinstance(head, nn.Module) else None


def logits_at(model: nn.Module, select: Callable[[Tensor], Tensor], **inputs: Any) -> Tensor:
    """A model's logits at chosen tokens, and nowhere else.

    Args:
        model: A causal language model of transformers, or a module around one.
        select: Takes the hidden states of the chosen tokens from the last ones, float[B, T, D].
        inputs: Keywords of the model's call.
    """
    head = head_of(model)
    assert head is not None
    ordinary = head.forward
    with exchanged_forward(head, lambda hidden: ordinary(select(hidden))):
        logits: Tensor = model(**inputs).logits
    return logits


@contextmanager
def exchanged_forward(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute another function within the block; its hooks stay in force.

    So a model can be called as a whole (adapters, sharding and recomputation hook in there), and only its
    output embedding does something else.
    """
    own = module.__dict__.get("forward")
    module.forward = function
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
