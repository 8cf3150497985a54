"""Log-probs and entropies of chosen tokens, without copies of the vocabulary's softmax.

Logits are the largest tensor of a training step (tokens x vocabulary). `token_stats` reads given logits in
chunks and keeps nothing of their size for the backward pass but the logits themselves; `trained_stats` never
makes them except where a token is trained, a chunk at a time, and makes them again in the backward pass. All
results are nats, computed in float32 at least.

Alignment: the logits at position t - 1 predict token t, and results are stored at t; position 0 has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_CHUNK_LOGITS = 1 << 20
_LOWEST = -1e30


class TokenStats(NamedTuple):
    """Numbers per token.

    Attributes:
        log_probs: float[...], nats, with gradient.
        entropies: float[...], Shannon entropy of the distribution in nats, without gradient.
    """

    log_probs: Tensor
    entropies: Tensor


def token_stats(logits: Tensor, ids: Tensor, *, temperature: float = 1.0) -> TokenStats:
    """`log softmax(z / temperature)[ids]` and the entropy of `softmax(z / temperature)`.

    Args:
        logits: z, float[..., V]. Those of -inf have probability 0.
        ids: int64[...], the tokens whose log-probs are wanted.
        temperature: At which they were sampled.

    Returns:
        Both, shaped as `ids`.

    Raises:
        ValueError: Shapes that do not fit, or a temperature that is not positive.
    """
    log_probs, entropies = _gather(logits, ids, temperature, with_entropies=True)
    return TokenStats(log_probs, entropies)


def gather_log_probs(logits: Tensor, ids: Tensor, *, temperature: float = 1.0) -> Tensor:
    """`log softmax(z / temperature)[ids]` alone; arguments and errors are those of `token_stats`."""
    return _gather(logits, ids, temperature, with_entropies=False)[0]


def trained_stats(
    hidden: Tensor,
    weight: Tensor,
    input_ids: Tensor,
    turn_ids: Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> TokenStats:
    """Log-probs and entropies of the trained tokens straight from a model's last hidden states.

    Only positions with a turn id are multiplied with the output embedding. With more than one chunk the
    logits are made again in the backward pass, so at most one chunk of them exists at a time.

    Args:
        hidden: float[B, T, D], last hidden states.
        weight: float[V, D], output embedding.
        input_ids: int64[B, T].
        turn_ids: int64[B, T], -1 where not trained; position 0 never is.
        temperature: At which the tokens were sampled.
        chunk_tokens: How many positions are taken at a time.

    Returns:
        Both [B, T], 0 where not trained.

    Raises:
        ValueError: Shapes that do not fit, or a temperature that is not positive.
    """
    if hidden.shape[:-1] != input_ids.shape or turn_ids.shape != input_ids.shape:
        raise ValueError(
            f"hidden [B, T, D], input_ids and turn_ids [B, T] must agree, got {list(hidden.shape)}, "
            f"{list(input_ids.shape)}, {list(turn_ids.shape)}"
        )
    _check_temperature(temperature)
    rows, columns = torch.nonzero(turn_ids[:, 1:] >= 0, as_tuple=True)
    states = torch.split(hidden[rows, columns], chunk_tokens)
    wanted = torch.split(input_ids[rows, columns + 1], chunk_tokens)
    again = len(states) > 1 and torch.is_grad_enabled()
    parts: list[tuple[Tensor, Tensor]] = []
    for state, ids in zip(states, wanted, strict=True):
        arguments = (state, weight, ids, temperature)
        parts.append(checkpoint(_head, *arguments, use_reentrant=False) if again else _head(*arguments))
    empty = torch.zeros(input_ids.shape, dtype=parts[0][0].dtype, device=hidden.device)
    where = (rows, columns + 1)
    return TokenStats(
        empty.index_put(where, torch.cat([log_probs for log_probs, _ in parts])),
        empty.index_put(where, torch.cat([entropies for _, entropies in parts])),
    )


def _head(states: Tensor, weight: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = torch.nn.functional.linear(states, weight)
    return _gather(logits, ids, temperature, with_entropies=True)


def _gather(
    logits: Tensor, ids: Tensor, temperature: float, *, with_entropies: bool
) -> tuple[Tensor, Tensor]:
    if not logits.is_floating_point() or logits.ndim == 0 or ids.shape != logits.shape[:-1]:
        raise ValueError(
            f"need float[..., V] and ids [...], got {logits.dtype}{list(logits.shape)} and {list(ids.shape)}"
        )
    _check_temperature(temperature)
    flat, wanted = logits.reshape(-1, logits.shape[-1]), ids.reshape(-1)
    log_probs, entropies = _GatherLogProbs.apply(  # type: ignore[no-untyped-call]
        flat, wanted, temperature, with_entropies
    )
    return log_probs.view(ids.shape), entropies.view(ids.shape)


class _GatherLogProbs(torch.autograd.Function):
    """Log-prob and entropy per row; the backward pass writes `(onehot - softmax) * grad`, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ids: Tensor, temperature: float, with_entropies: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logits, ids)
        ctx.temperature = temperature
        log_probs = torch.zeros(len(ids), dtype=_wide(logits.dtype), device=logits.device)
        entropies = torch.zeros_like(log_probs)
        for part in _chunks(logits):
            log_softmax = _scaled(logits[part], temperature).log_softmax(dim=-1)
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
        for part in _chunks(logits):
            grad = _scaled(logits[part], ctx.temperature).softmax(dim=-1).mul_(-scale[part])
            result[part] = grad.scatter_add_(-1, ids[part, None], scale[part])
        return result, None, None, None


def _chunks(logits: Tensor) -> Iterator[slice]:
    """Rows that together hold about a million logits: small enough to stay in a cache."""
    size = max(1, _CHUNK_LOGITS // max(logits.shape[1], 1))
    return (slice(start, start + size) for start in range(0, len(logits), size))


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    wide = logits.to(_wide(logits.dtype))
    return wide if temperature == 1.0 else wide / temperature


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(
            f"temperature must be positive, got {temperature} (greedy decoding has no log-probs)"
        )
