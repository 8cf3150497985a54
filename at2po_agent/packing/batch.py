"""Declares the methods that both forms of a minibatch offer to the learner.

A minibatch is a `rows.RowBatch` (one padded row per branch) or a `trees.PackedBatch` (every token that
branches share once). The learner cuts it into micro-batches and asks each of them for log-probs or entropies;
it never asks which form it holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol, Self

import torch
from torch import Tensor, nn


class BranchRows(Protocol):
    """B branches as losses read them, one row per branch; T differs between the forms."""

    @property
    def turn_ids(self) -> Tensor:
        """int64[B, T]: turns of the branch, from 0; -1 where not trained."""

    @property
    def advantages(self) -> Tensor:
        """float32[B, T]: 0 where not trained."""

    @property
    def sampled_log_probs(self) -> Tensor:
        """float32[B, T]: nats, as sampled; 0 where not trained."""


class MicroBatch(BranchRows, Protocol):
    """Branches that go through the model at once."""

    def to(self, device: torch.device | str) -> Self:
        """The same branches on another device; the host does not wait for the transfer."""

    def log_probs(self, model: nn.Module, *, temperature: float = 1.0) -> Tensor:
        """Log-probs of the trained tokens under a model on the same device.

        Args:
            model: A causal language model of transformers, or a module around one.
            temperature: Logits are divided by it; positive.

        Returns:
            float[B, T] in nats with gradient, 0 where not trained.
        """

    def entropies(self, model: nn.Module, *, temperature: float = 1.0) -> Tensor:
        """Entropies, float[B, T] in nats, of the distributions that trained tokens were drawn from."""


class Batch(BranchRows, Protocol):
    """A minibatch on the host."""

    @property
    def trees(self) -> Tensor:
        """int64[B]: the tree of each branch."""

    def tokens(self, rows: Tensor) -> int:
        """How many tokens the model computes for some branches, int64[R], that go through it at once."""

    def with_advantages(self, advantages: Tensor) -> Self:
        """The same branches with other advantages, float32[B, T]."""

    def micro_batches(
        self, max_tokens: int, *, rows: Tensor | None = None
    ) -> Iterator[tuple[Tensor, MicroBatch]]:
        """Cut the batch into micro-batches of at most `max_tokens` tokens, padding included.

        Losses divide by the counts of the whole minibatch (`losses.LossTotals`), so the cut changes nothing.

        Args:
            max_tokens: Budget; a longer branch goes alone or with branches that lie within it.
            rows: int64[R], indices of the branches to use; None means all.

        Yields:
            int64[G] indices of branches, and these branches. Their rows may be narrower than those of the
            batch: the columns that are missing hold no trained token.

        Raises:
            ValueError: The budget is below 1.
        """

    def attention(self, model: nn.Module) -> AbstractContextManager[None]:
        """Let a model attend as the micro-batches need it, within the block; the backward pass belongs there.

        Raises:
            ConfigError: The model cannot be trained on batches of this form.
        """


def move(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on another device; the host goes on at once, also when it comes from the host."""
    where = torch.device(device)
    if where.type != "cuda" or tensor.is_cuda:
        return tensor.to(where)
    return tensor.pin_memory().to(where, non_blocking=True)
