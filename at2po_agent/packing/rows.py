"""The plain form of a minibatch: one row per branch, padded on the right.

It costs every shared token once per branch, and works with any causal model. Rows are padded on the right, so
such a model needs no mask: no token sees padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn import functional

from at2po_agent.packing.batch import move
from at2po_agent.packing.branches import Overflow, tree_branches
from at2po_agent.packing.log_probs import head_of, logits_at
from at2po_agent.tree import Tree
from at2po_env.errors import ConfigError


@dataclass(frozen=True, eq=False)
class RowBatch:
    """Rows of one or more trees, a `Batch` as well as a `MicroBatch`; every field is a tensor [B, T].

    Attributes:
        input_ids: int64, padding included.
        attention_mask: int64, 1 on tokens, 0 on padding.
        position_ids: int64, 0, 1, ... in each row; padding repeats the last.
        turn_ids: int64, -1 where not trained.
        advantages: float32, 0 where not trained.
        sampled_log_probs: float32, nats, as sampled; 0 where not trained.
        places: Not [B, T] but int64[S]: places of the trained tokens in the flattened rows, or None. `to`
            finds them on the host: on another device that would wait for it.
        of_trees: Not [B, T] but int64[B]: the tree of each row, or None where each is a tree of its own.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    turn_ids: Tensor
    advantages: Tensor
    sampled_log_probs: Tensor
    places: Tensor | None = None
    of_trees: Tensor | None = None

    def __post_init__(self) -> None:
        shapes = {name: tuple(getattr(self, name).shape) for name in _PER_TOKEN}
        if len(set(shapes.values())) != 1 or self.input_ids.ndim != 2:
            raise ValueError(f"all tensors of a batch must be [B, T], got {shapes}")

    @property
    def lengths(self) -> Tensor:
        """int64[B]: tokens of each row without padding."""
        return self.attention_mask.sum(dim=1)

    @property
    def trees(self) -> Tensor:
        """int64[B]: the tree of each row."""
        return torch.arange(len(self.input_ids)) if self.of_trees is None else self.of_trees

    def tokens(self, rows: Tensor) -> int:
        """Tokens of some rows, without padding."""
        return int(self.lengths[rows].sum())

    def with_advantages(self, advantages: Tensor) -> Self:
        """The same rows with other advantages."""
        return replace(self, advantages=advantages)

    def select(self, rows: Tensor, length: int | None = None) -> Self:
        """Some rows in a given order, cut after `length` positions."""
        return type(self)(*(getattr(self, name)[rows, :length] for name in _PER_TOKEN))

    def micro_batches(self, max_tokens: int, *, rows: Tensor | None = None) -> Iterator[tuple[Tensor, Self]]:
        """Cut the rows by decreasing length, ties in their order, so that neighbours need little padding.

        Each micro-batch is as wide as its longest row and has at most `max_tokens` positions; a longer row
        goes alone. Arguments, results and errors as `Batch.micro_batches`.
        """
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        order = torch.arange(len(self.input_ids)) if rows is None else rows
        order = order[torch.argsort(self.lengths[order], descending=True, stable=True)]
        lengths = self.lengths[order].tolist()
        start = 0
        while start < len(lengths):
            longest = max(int(lengths[start]), 1)
            chosen = order[start : start + max(1, max_tokens // longest)]
            yield chosen, self.select(chosen, longest)
            start += len(chosen)

    def attention(self, model: nn.Module) -> AbstractContextManager[None]:
        """Rows need no attention but the model's own."""
        del model
        return nullcontext()

    def to(self, device: torch.device | str) -> Self:
        """The same rows on another device; the host does not wait for the transfer."""
        tensors = [getattr(self, name) for name in _PER_TOKEN]
        return type(self)(*(move(tensor, device) for tensor in (*tensors, self.find_places())))

    def find_places(self) -> Tensor:
        """`places`, found if they are None."""
        if self.places is not None:
            return self.places
        trained = self.turn_ids >= 0
        trained[:, 0] = False
        return torch.nonzero(trained.flatten()).flatten()

    def log_probs(self, model: nn.Module, *, temperature: float = 1.0) -> Tensor:
        """Log-probs of the trained tokens, float32[B, T]; arguments as `MicroBatch.log_probs`.

        The model may be any module that takes `input_ids` and whose output has `logits`.
        """
        places = self.find_places()
        logits = self._logits_before(model, places, temperature)
        chosen = -functional.cross_entropy(logits, self.input_ids.flatten()[places], reduction="none")
        return self._in_rows(chosen, places)

    def entropies(self, model: nn.Module, *, temperature: float = 1.0) -> Tensor:
        """Entropies of the distributions of the trained tokens, float32[B, T] in nats."""
        places = self.find_places()
        log_probs = self._logits_before(model, places, temperature).log_softmax(dim=-1)
        values = -(log_probs.exp() * log_probs).nan_to_num(0.0).sum(dim=-1)
        return self._in_rows(values, places)

    def _logits_before(self, model: nn.Module, places: Tensor, temperature: float) -> Tensor:
        """Logits float32[S, V] of the tokens before the given places, which predict those there."""
        logits: Tensor
        if head_of(model) is None:
            logits = model(input_ids=self.input_ids).logits.flatten(0, 1)[places - 1]
        else:
            logits = logits_at(
                model,
                lambda hidden: hidden.flatten(0, 1)[places - 1],
                input_ids=self.input_ids,
                use_cache=False,
            )
        logits = logits.float()
        return logits if temperature == 1.0 else logits / temperature

    def _in_rows(self, per_token: Tensor, places: Tensor) -> Tensor:
        """Write numbers float[S] to their places in rows float[B, T] of zeros."""
        out = torch.zeros(self.input_ids.numel(), dtype=per_token.dtype, device=per_token.device)
        return out.index_put((places,), per_token).view(self.input_ids.shape)


_PER_TOKEN = tuple(field.name for field in fields(RowBatch) if field.name not in ("places", "of_trees"))


def pack_rows(
    trees: Sequence[Tree],
    advantages: Sequence[ArrayLike],
    *,
    pad_id: int = 0,
    max_length: int | None = None,
    overflow: Overflow = "error",
) -> RowBatch:
    """Write each branch of each tree into a row of its own.

    Args:
        trees: As in `tree_branches`, like all arguments but the next, and the errors.
        advantages: Per node, per branch, or per both.
        pad_id: Padding is filled with it.
        max_length: Longest row allowed; None for no limit.
        overflow: What happens to a longer one: `error`, `truncate` or `drop`.

    Returns:
        Rows in the order of the trees and their leaves.

    Raises:
        ConfigError: Turns have prompts of their own.
    """
    branches = tree_branches(trees, advantages, max_length=max_length, overflow=overflow)
    if any(len(branch.starts) > 1 for branch in branches):
        raise ConfigError(
            "train.packing: rows hold one sequence per branch, and under model.transcript=window a branch "
            "has one per turn. Fix: train.packing=tree"
        )
    lengths = np.array([len(branch.ids) for branch in branches])
    shape = (len(branches), int(lengths.max()))
    positions = np.arange(shape[1])
    ids = np.full(shape, pad_id, dtype=np.int64)
    turn_ids = np.full(shape, -1, dtype=np.int64)
    given = np.zeros(shape, dtype=np.float32)
    log_probs = np.zeros(shape, dtype=np.float32)
    for row, branch in enumerate(branches):
        end = lengths[row]
        ids[row, :end], turn_ids[row, :end] = branch.ids, branch.turn_ids
        given[row, :end], log_probs[row, :end] = branch.advantages, branch.log_probs
    return RowBatch(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy((positions < lengths[:, None]).astype(np.int64)),
        position_ids=torch.from_numpy(np.minimum(positions, np.maximum(lengths[:, None] - 1, 0))),
        turn_ids=torch.from_numpy(turn_ids),
        advantages=torch.from_numpy(given),
        sampled_log_probs=torch.from_numpy(log_probs),
        of_trees=torch.tensor([branch.tree for branch in branches]),
    )
