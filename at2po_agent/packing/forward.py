"""A model's log-probs of a packed tree, and the proof that a model is fit for it.

The model is called as a whole (adapters, sharding and recomputation hook in there); only its output embedding
is exchanged for the duration of the call, so that logits exist where a token is trained and a chunk at a
time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from at2po_agent.packing.head import linear_log_probs
from at2po_agent.packing.log_probs import TokenStats, token_stats
from at2po_agent.packing.rows import Row
from at2po_agent.packing.tree_attention import TreePlan, attention_implementation, tree_attention
from at2po_agent.packing.trees import PackedPiece, pack_branches
from at2po_env.errors import ConfigError


class Fitness(NamedTuple):
    """How a model's packed log-probs are made.

    Attributes:
        fused_head: Whether its logits are nothing but the output embedding times the last hidden state.
    """

    fused_head: bool


_FITNESS: WeakKeyDictionary[nn.Module, Fitness] = WeakKeyDictionary()
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}


def packed_stats(
    model: nn.Module, piece: PackedPiece, *, temperature: float = 1.0, with_entropies: bool = False
) -> TokenStats:
    """Log-probs and entropies of a pack's trained tokens, in rows.

    Call it, and the backward pass if the model recomputes activations, within `tree_attention(model)`.

    Args:
        model: A causal language model of transformers, or a module around one.
        piece: A pack on the model's device.
        temperature: What the logits are divided by; 0 counts as 1.
        with_entropies: Whether entropies are wanted; else they are 0.

    Returns:
        Both float[G, T] in nats, 0 where not trained.

    Raises:
        ConfigError: The model mixes tokens in another way than by attention.
    """
    fitness = check_model(model)
    return _stats(model, piece, temperature or 1.0, with_entropies, fitness)


def check_model(model: nn.Module) -> Fitness:
    """Find out, once for each model, whether packed log-probs equal those of the plain model, and how.

    Two branches of five tokens that share two are computed both ways. A model that is no transformers model,
    ignores positions, or lets tokens meet elsewhere than in attention (a convolution, a recurrent state)
    fails.

    Raises:
        ConfigError: It fails; the message says what to set.
    """
    known = _FITNESS.get(model)
    if known is None:
        known = _FITNESS[model] = _examine(model)
    return known


def _examine(model: nn.Module) -> Fitness:
    advice = "set train.packing: rows"
    language_models = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    if not language_models or head_of(model) is None:
        raise ConfigError(f"{type(model).__name__} is no causal language model of transformers; {advice}")
    device = next(model.parameters()).device
    rows = [_row([3, 1, 4, 1, 2]), _row([3, 1, 2, 0, 4])]
    ((order, piece),) = pack_branches(rows).micro_batches(100)
    ids = torch.from_numpy(np.stack([rows[index].ids for index in order])).to(device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            with attention_implementation(model, "eager"):
                logits = model(input_ids=ids, use_cache=False).logits
            expected = token_stats(logits[:, :-1], ids[:, 1:]).log_probs
            tolerance = _TOLERANCE.get(expected.dtype, 1e-3) * (1.0 + float(expected.abs().max()))
            if next(model.parameters()).dtype not in _TOLERANCE:
                tolerance *= 100.0
            for fused in (True, False):
                fitness = Fitness(fused)
                with tree_attention(model):
                    got = _stats(model, piece.to(device), 1.0, False, fitness).log_probs
                if bool(((got - expected).abs() <= tolerance).all()):
                    return fitness
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{type(model).__name__} cannot be trained on packed trees ({error}); {advice}"
        ) from error
    finally:
        model.train(training)
    raise ConfigError(
        f"{type(model).__name__} gives other log-probs for a packed tree than for its branches: it mixes "
        f"tokens in another way than by attention, or ignores positions; {advice}"
    )


def _row(ids: list[int]) -> Row:
    zeros = np.zeros(len(ids), dtype=np.float32)
    return Row(np.array(ids, dtype=np.int64), np.arange(-1, len(ids) - 1), zeros, zeros)


def logits_at(model: nn.Module, select: Callable[[Tensor], Tensor], **inputs: Any) -> Tensor:
    """A model's logits at chosen places, and nowhere else.

    Args:
        model: A causal language model of transformers, or a module around one.
        select: Takes the chosen ones from the last hidden states float[B, T, D].
        inputs: What the model is called with.
    """
    head = head_of(model)
    assert head is not None
    ordinary = head.forward
    with _forward_of(head, lambda hidden: ordinary(select(hidden))):
        logits: Tensor = model(**inputs).logits
    return logits


def head_of(model: nn.Module) -> nn.Module | None:
    """The output embedding of a model; None where it has none that transformers knows."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = None if get_head is None else get_head()
    return head if isinstance(head, nn.Module) else None


def _stats(
    model: nn.Module, piece: PackedPiece, temperature: float, with_entropies: bool, fitness: Fitness
) -> TokenStats:
    inputs = {
        "input_ids": piece.input_ids,
        "position_ids": piece.position_ids,
        "use_cache": False,
        "tree_plan": TreePlan.of(piece.layout),
    }
    head = head_of(model)
    if fitness.fused_head and isinstance(head, nn.Linear):
        found = _fused(model, head, piece, (temperature, with_entropies), inputs)
    else:
        logits = logits_at(model, lambda hidden: hidden[:, piece.predicts], **inputs)[0]
        found = token_stats(logits, piece.targets, temperature=temperature)
    return TokenStats(piece.to_rows(found.log_probs), piece.to_rows(found.entropies))


def _fused(
    model: nn.Module, head: nn.Linear, piece: PackedPiece, options: tuple[float, bool], inputs: dict[str, Any]
) -> TokenStats:
    """Let the output embedding return log-probs in the place of logits."""
    entropies: list[Tensor] = []
    temperature, with_entropies = options

    def log_probs(hidden: Tensor) -> Tensor:
        found = linear_log_probs(
            hidden[0, piece.predicts],
            head.weight,
            piece.targets,
            bias=head.bias,
            temperature=temperature,
            with_entropies=with_entropies,
        )
        entropies.append(found[1])
        return found[0]

    with _forward_of(head, log_probs):
        return TokenStats(model(**inputs).logits, entropies[0])


@contextmanager
def _forward_of(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Exchange what a module computes; its hooks stay in force."""
    own = module.__dict__.get("forward")
    module.forward = function
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
