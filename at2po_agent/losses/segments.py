"""Sums over the turns of a batch, without a Python loop and without waiting for a device.

A turn is the set of positions of one row that share a turn id; ids are 0 to K-1 per row and -1 where the
policy did not sample the token. Such positions never enter a sum: a nan there stays there.

Two ways to the same numbers. On a CPU, equal neighbours are first merged into runs and NumPy reduces each
run: turns are contiguous spans, and scattering token by token (1.7 ms for half a million tokens, against 0.3
ms) is what makes a turn-level loss slower than a token-level one. Any arrangement of ids is right, spans are
fast. Elsewhere finding the runs would wait for the device, so every token is scattered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from at2po_agent.types import FloatArray, IntArray


class _Runs(NamedTuple):
    """Runs of equal turn ids within the rows: first position, length, slot in the [B, K + 1] table."""

    starts: IntArray
    lengths: IntArray
    slots: IntArray


@dataclass(frozen=True, eq=False)
class TurnSegments:
    """Where the turns of a batch lie, as a compact index that several reductions share.

    Attributes:
        shape: (B, T).
        counts: [B, K], sampled tokens of each turn, 0 where the row has no such turn. K is one more than the
            largest id on a CPU, and its bound T elsewhere.
    """

    shape: tuple[int, int]
    counts: Tensor
    _index: _Runs | Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, turn_ids: Tensor, dtype: torch.dtype = torch.float32) -> Self:
        """Index the turns of a batch.

        Args:
            turn_ids: int64[B, T], -1 where not sampled.
            dtype: Type of the counts and sums, float32 or float64.

        Raises:
            ValueError: On a CPU, ids outside -1 to T-1. (Checking elsewhere would wait for the device.)
        """
        if turn_ids.device.type != "cpu":
            return cls.scattered(turn_ids, dtype)
        batch, tokens = turn_ids.shape
        runs, turns = _find_runs(turn_ids)
        return cls((batch, tokens), _add_up(runs.lengths, runs, batch, turns, dtype), runs)

    @classmethod
    @torch.no_grad()
    def scattered(cls, turn_ids: Tensor, dtype: torch.dtype = torch.float32) -> Self:
        """Index the turns token by token, as is done where runs cannot be found without waiting."""
        batch, tokens = turn_ids.shape
        rows = torch.arange(batch, device=turn_ids.device)
        slots = (turn_ids + 1 + (rows * (tokens + 1))[:, None]).view(-1)
        ones = torch.ones((), dtype=dtype, device=turn_ids.device).expand(slots.shape)
        return cls((batch, tokens), _scatter(ones, slots, batch, tokens), slots)

    def sum(self, values: Tensor) -> Tensor:
        """Sum a [B, T] tensor over the sampled tokens of each turn, without gradient: [B, K]."""
        flat = values.detach().to(self.counts.dtype).reshape(-1)
        batch, turns = self.counts.shape
        if isinstance(self._index, Tensor):
            return _scatter(flat, self._index, batch, turns)
        with np.errstate(invalid="ignore", over="ignore"):
            sums = np.add.reduceat(flat.numpy(), self._index.starts)
            return _add_up(sums, self._index, batch, turns, self.counts.dtype)

    def mean(self, values: Tensor) -> Tensor:
        """Mean of a [B, T] tensor over each turn's sampled tokens, 0 where the row has no such turn."""
        return self.sum(values) / self.counts.clamp(min=1.0)

    def expand(self, per_turn: Tensor, fill: float) -> Tensor:
        """Give each token the entry of its turn: [B, K] to [B, T], `fill` where not sampled."""
        table = torch.nn.functional.pad(per_turn.detach(), (1, 0), value=fill).view(-1)
        if isinstance(self._index, Tensor):
            return table[self._index].view(self.shape)
        tokens = np.repeat(table.numpy()[self._index.slots], self._index.lengths)
        return torch.from_numpy(tokens).view(self.shape)


def _find_runs(turn_ids: Tensor) -> tuple[_Runs, int]:
    """Merge equal neighbours of each row; also K."""
    ids = turn_ids.numpy()
    batch, tokens = ids.shape
    begins = np.ones(ids.shape, dtype=np.bool_)
    np.not_equal(ids[:, 1:], ids[:, :-1], out=begins[:, 1:])
    starts = np.flatnonzero(begins)
    run_ids = ids.reshape(-1)[starts]
    lowest, highest = int(run_ids.min()), int(run_ids.max())
    if lowest < -1 or highest >= tokens:
        raise ValueError(
            f"turn_ids must lie between -1 (not sampled) and T-1 = {tokens - 1}, got {lowest} to {highest}"
        )
    turns = max(highest + 1, 1)
    slots = starts // tokens * (turns + 1) + run_ids + 1
    return _Runs(starts, np.diff(starts, append=batch * tokens), slots), turns


def _add_up(per_run: NDArray[Any], runs: _Runs, batch: int, turns: int, dtype: torch.dtype) -> Tensor:
    """[B, K] from one number per run; column 0, where unsampled positions went, is dropped."""
    table: FloatArray = np.bincount(runs.slots, weights=per_run, minlength=batch * (turns + 1)).astype(
        np.float64
    )
    return torch.from_numpy(table).to(dtype).view(batch, turns + 1)[:, 1:]


def _scatter(values: Tensor, slots: Tensor, batch: int, turns: int) -> Tensor:
    """Add values into [B, K + 1] and drop column 0, where unsampled positions went."""
    table = torch.zeros(batch * (turns + 1), dtype=values.dtype, device=values.device)
    return table.index_add_(0, slots, values).view(batch, turns + 1)[:, 1:]
