"""Trees -> one sequence per pack that holds every unique token once.

The published way writes one row per leaf and repeats what branches share. Here branches that begin with the
same ids share their tokens: a tree's prompt and turns, the observation of sibling turns, and whatever
siblings happen to write alike. What a token's log-prob is depends on the ids before it alone, so this is
exact.

Losses see rows. The log-probs of the packed tokens, each made once, are gathered into one row per branch that
holds the branch's trained tokens in order; then any loss runs on them as it is. So the weight of a shared
token is the sum over the branches through it whatever the loss, ratios per turn are those of the branch's
turn, and advantages that differ between branches on shared tokens (tree_grpo, group credit) need no rule of
their own. A row costs as many numbers as the branch has trained tokens; the model never sees it.

Packs are cut between branches (`prefixes.cut_rows`). Each branch lies whole in one pack, and losses divide by
the counts of the whole minibatch (`losses.LossTotals`), so the gradient does not depend on the cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from at2po_agent.packing.prefixes import Layout, SortedRows, cut_rows, lay_out, sort_rows
from at2po_agent.packing.rows import Overflow, Row, branch_rows, limit_rows, move
from at2po_agent.tree import Tree
from at2po_agent.types import IntArray


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Branches of one or more trees, ready to be cut into packs. Lives on the host.

    Attributes:
        turn_ids: int64[B, T], one row per branch, T its trained tokens at most; -1 beyond them.
        advantages: float32[B, T].
        sampled_log_probs: float32[B, T], nats.
        prefixes: What the branches share.
    """

    turn_ids: Tensor
    advantages: Tensor
    sampled_log_probs: Tensor
    prefixes: SortedRows
    _rows: tuple[Row, ...]

    @property
    def unique_tokens(self) -> int:
        """Tokens when every shared one counts once."""
        return self.prefixes.unique_tokens

    @property
    def flattened_tokens(self) -> int:
        """Tokens of all branches."""
        return int(self.prefixes.lengths.sum())

    def micro_batches(
        self, max_tokens: int, *, rows: Tensor | None = None
    ) -> Iterator[tuple[Tensor, PackedPiece]]:
        """Cut the batch into packs of at most `max_tokens` tokens.

        Args:
            max_tokens: Budget of a pack; a longer branch makes a longer pack.
            rows: int64[R], the branches to use; None means all.

        Yields:
            int64[G] indices of branches, and their pack.
        """
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        chosen = self.prefixes if rows is None else self.prefixes.keep(rows.cpu().numpy())
        for cut in cut_rows(chosen, max_tokens) if len(chosen.order) else ():
            part = SortedRows(*(field[cut] for field in chosen))
            yield torch.from_numpy(part.order), self._piece(part)

    def _piece(self, part: SortedRows) -> PackedPiece:
        layout = lay_out(part.lengths, part.shared)
        ids = np.empty(len(layout.last), dtype=np.int64)
        trained = []
        for row, path in zip(part.order, layout.paths, strict=True):
            ids[path] = self._rows[row].ids
            trained.append(np.flatnonzero(self._rows[row].turn_ids >= 0))
        slots, places, before = _slots(layout.paths, trained)
        width = max(slots.shape[1], int(self.turn_ids[part.order].max()) + 1)
        return PackedPiece(
            input_ids=torch.from_numpy(ids)[None],
            position_ids=torch.from_numpy(layout.positions)[None],
            predicts=torch.from_numpy(before),
            targets=torch.from_numpy(ids[places]),
            slots=torch.from_numpy(
                np.pad(slots, ((0, 0), (0, width - slots.shape[1])), constant_values=len(places))
            ),
            turn_ids=self.turn_ids[part.order, :width],
            advantages=self.advantages[part.order, :width],
            sampled_log_probs=self.sampled_log_probs[part.order, :width],
            layout=layout,
        )


@dataclass(frozen=True, eq=False)
class PackedPiece:
    """One pack of P tokens: G branches of which S unique tokens are trained.

    Attributes:
        input_ids: int64[1, P].
        position_ids: int64[1, P], depth in the tree.
        predicts: int64[S], place of the token before each trained token: its state predicts it.
        targets: int64[S], ids of the trained tokens.
        slots: int64[G, T], which of the S log-probs stands where in the rows; S where none does.
        turn_ids: int64[G, T], -1 where not trained.
        advantages: float32[G, T].
        sampled_log_probs: float32[G, T], nats.
        layout: Which token descends from which; stays on the host.
    """

    input_ids: Tensor
    position_ids: Tensor
    predicts: Tensor
    targets: Tensor
    slots: Tensor
    turn_ids: Tensor
    advantages: Tensor
    sampled_log_probs: Tensor
    layout: Layout

    def to(self, device: torch.device | str) -> Self:
        """The same pack on another device, without waiting for it."""
        tensors: dict[str, Any] = {
            name: move(value, device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)

    def to_rows(self, per_token: Tensor) -> Tensor:
        """Write a number per trained token, float[S], into the rows, float[G, T]; 0 where none is trained."""
        return torch.nn.functional.pad(per_token, (0, 1))[self.slots]


def pack_trees(
    trees: Sequence[Tree],
    advantages: Sequence[ArrayLike],
    *,
    max_length: int | None = None,
    overflow: Overflow = "error",
) -> PackedBatch:
    """Pack trees so that each unique token is computed once; arguments and errors as `pack_rows`."""
    return pack_branches(limit_rows(branch_rows(trees, advantages), max_length, overflow))


def pack_branches(rows: Sequence[Row]) -> PackedBatch:
    """Pack any rows that share prefixes, such as branches of trees.

    Args:
        rows: At least one with tokens.
    """
    trained = [np.flatnonzero(row.turn_ids >= 0) for row in rows]
    width = max(
        [1, *(len(places) for places in trained), *(int(row.turn_ids.max(initial=-1)) + 1 for row in rows)]
    )
    turn_ids = np.full((len(rows), width), -1, dtype=np.int64)
    advantages, log_probs = (np.zeros((len(rows), width), dtype=np.float32) for _ in range(2))
    for index, (row, places) in enumerate(zip(rows, trained, strict=True)):
        end = len(places)
        turn_ids[index, :end] = row.turn_ids[places]
        advantages[index, :end], log_probs[index, :end] = row.advantages[places], row.log_probs[places]
    return PackedBatch(
        torch.from_numpy(turn_ids),
        torch.from_numpy(advantages),
        torch.from_numpy(log_probs),
        sort_rows([row.ids for row in rows]),
        tuple(rows),
    )


def _slots(paths: Sequence[IntArray], trained: Sequence[IntArray]) -> tuple[IntArray, IntArray, IntArray]:
    """Number the unique trained tokens.

    Returns:
        slots int64[G, T], padded with S; places int64[S] of the tokens; places int64[S] of those before them.
    """
    flat = np.concatenate([path[depth] for path, depth in zip(paths, trained, strict=True)])
    before = np.concatenate([path[depth - 1] for path, depth in zip(paths, trained, strict=True)])
    places, first, numbers = np.unique(flat, return_index=True, return_inverse=True)
    counts = np.array([len(depth) for depth in trained])
    slots = np.full((len(paths), max(1, counts.max())), len(places), dtype=np.int64)
    slots[np.arange(slots.shape[1]) < counts[:, None]] = numbers
    return slots, places, before[first]
