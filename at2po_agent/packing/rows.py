"""Trees -> training rows: one row per leaf, padded on the right.

Alignment: entry t of every tensor belongs to token t, and log_probs[:, t] is the log-prob of token t given
the tokens before it; so position 0 is never trained. Turn ids count the turns of the row's branch, 0 to K-1,
and are -1 on everything that the policy did not sample: prompt, observations, forced tokens, padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, Self, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from at2po_agent.tree import Tree
from at2po_agent.types import Float32Array, FloatArray, IntArray, Turn

Overflow: TypeAlias = Literal["error", "truncate", "drop"]


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one or more trees; every field is a tensor [B, T].

    Attributes:
        input_ids: int64, padding included.
        attention_mask: int64, 1 on tokens, 0 on padding.
        position_ids: int64, 0, 1, ... in each row; padding repeats the last.
        turn_ids: int64, -1 where not trained.
        advantages: float32, 0 where not trained.
        sampled_log_probs: float32, nats, as sampled; 0 where not trained.
        places: Not [B, T] but int64[S]: places of the trained tokens in the flattened rows, where they are
            known. `to` finds them on the host: elsewhere that would wait for the device.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    turn_ids: Tensor
    advantages: Tensor
    sampled_log_probs: Tensor
    places: Tensor | None = None

    def __post_init__(self) -> None:
        shapes = {name: tuple(getattr(self, name).shape) for name in _PER_TOKEN}
        if len(set(shapes.values())) != 1 or self.input_ids.ndim != 2:
            raise ValueError(f"all tensors of a batch must be [B, T], got {shapes}")

    @property
    def lengths(self) -> Tensor:
        """int64[B]: tokens of each row without padding."""
        return self.attention_mask.sum(dim=1)

    def micro_batches(self, max_tokens: int, *, rows: Tensor | None = None) -> Iterator[tuple[Tensor, Batch]]:
        """`iter_micro_batches` of this batch."""
        return iter_micro_batches(self, max_tokens, rows=rows)

    def select(self, rows: Tensor, length: int | None = None) -> Self:
        """Some rows in a given order, cut after `length` positions."""
        return type(self)(*(getattr(self, name)[rows, :length] for name in _PER_TOKEN))

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device, without waiting for it."""
        tensors = [getattr(self, name) for name in _PER_TOKEN]
        return type(self)(*(move(tensor, device) for tensor in (*tensors, self.find_places())))

    def find_places(self) -> Tensor:
        """`places`, whether they are known or not."""
        if self.places is not None:
            return self.places
        trained = self.turn_ids >= 0
        trained[:, 0] = False
        return torch.nonzero(trained.flatten()).flatten()


_PER_TOKEN = tuple(field.name for field in fields(Batch) if field.name != "places")


def move(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on another device; the host goes on at once, also when it comes from the host."""
    where = torch.device(device)
    if where.type != "cuda" or tensor.is_cuda:
        return tensor.to(where)
    return tensor.pin_memory().to(where, non_blocking=True)


def pack_rows(
    trees: Sequence[Tree],
    advantages: Sequence[ArrayLike],
    *,
    pad_id: int = 0,
    max_length: int | None = None,
    overflow: Overflow = "error",
) -> Batch:
    """Write each branch of each tree into a row of its own.

    Args:
        trees: Trees with at least one leaf in all.
        advantages: One array per tree: float[N] per node, float[L] per branch (leaves in order of creation),
            or float[L, N] per node and branch.
        pad_id: What padding is filled with.
        max_length: Longest row allowed; None for no limit.
        overflow: What happens to a longer one: `error`; `truncate` its end (the tokens beyond are not
            trained, the rest keeps its advantages); `drop` it.

    Returns:
        Rows in the order of the trees and their leaves.

    Raises:
        ValueError: No rows, a row that is too long, or advantages of the wrong shape or not finite on a
            branch.
    """
    return _pad(limit_rows(branch_rows(trees, advantages), max_length, overflow), pad_id)


def branch_rows(trees: Sequence[Tree], advantages: Sequence[ArrayLike]) -> list[Row]:
    """The branches of trees, in the order of the trees and their leaves; arguments as `pack_rows`."""
    if len(trees) != len(advantages):
        raise ValueError(
            f"need one array of advantages per tree: got {len(advantages)} for {len(trees)} trees"
        )
    return [row for tree, given in zip(trees, advantages, strict=True) for row in _tree_rows(tree, given)]


def limit_rows(rows: list[Row], max_length: int | None, overflow: Overflow) -> list[Row]:
    """Apply a limit to the length of rows; arguments and errors as `pack_rows`."""
    if overflow not in get_args(Overflow):
        raise ValueError(f"overflow must be one of {get_args(Overflow)}, got {overflow!r}")
    if max_length is not None:
        rows = _apply_limit(rows, max_length, overflow)
    if not any(len(row.ids) for row in rows):
        raise ValueError(
            "nothing to pack: no tree has a leaf with tokens, or every row was dropped as too long"
        )
    return rows


def length_order(batch: Batch) -> Tensor:
    """int64[B]: rows by decreasing length, ties in their order, so that neighbours need little padding."""
    return torch.argsort(batch.lengths, descending=True, stable=True)


def iter_micro_batches(
    batch: Batch, max_tokens: int, *, rows: Tensor | None = None
) -> Iterator[tuple[Tensor, Batch]]:
    """Cut a batch into pieces of similar length, each of at most `max_tokens` positions with its padding.

    Losses divide by the counts of the whole minibatch (`losses.LossTotals`), so the cut changes nothing.

    Args:
        batch: The rows.
        max_tokens: Budget of a piece; a longer row goes alone.
        rows: int64[R], the rows to use; None means all.

    Yields:
        int64[G] indices of rows, and these rows cut to the longest.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    order = length_order(batch)
    if rows is not None:
        order = rows[torch.argsort(batch.lengths[rows], descending=True, stable=True)]
    sizes = batch.lengths[order].tolist()
    start = 0
    while start < len(sizes):
        longest = max(int(sizes[start]), 1)
        chosen = order[start : start + max(1, max_tokens // longest)]
        yield chosen, batch.select(chosen, longest)
        start += len(chosen)


class _Piece(NamedTuple):
    """One node's tokens: ids, which were sampled, their log-probs (0 elsewhere)."""

    ids: IntArray
    sampled: NDArray[np.bool_]
    log_probs: Float32Array


class Row(NamedTuple):
    """One branch before padding: ids, turn ids (-1 where not trained), advantages, sampled log-probs."""

    ids: IntArray
    turn_ids: IntArray
    advantages: Float32Array
    log_probs: Float32Array

    def cut(self, end: int) -> Row:
        """The first `end` tokens."""
        return Row(self.ids[:end], self.turn_ids[:end], self.advantages[:end], self.log_probs[:end])


def _tree_rows(tree: Tree, advantages: ArrayLike) -> Iterator[Row]:
    leaves = tree.leaves()
    per_branch = _per_branch(advantages, len(leaves), len(tree))
    pieces = [_piece(tree.turns[node], tree.prompt_ids) for node in range(len(tree))]
    for leaf, given in zip(leaves, per_branch, strict=True):
        path = tree.path(leaf)
        if not np.isfinite(given[path[1:]]).all():
            raise ValueError(
                f"advantages must be finite on every turn of a branch; branch of node {leaf}: {given}"
            )
        yield _row([pieces[node] for node in path], given[path])


def _per_branch(advantages: ArrayLike, leaves: int, nodes: int) -> FloatArray:
    """float[L, N] from any of the three shapes; L < N always, since the root is no leaf."""
    given = np.asarray(advantages, dtype=np.float64)
    if given.shape == (leaves,):
        given = given[:, None]
    elif given.shape != (nodes,) and given.shape != (leaves, nodes):
        raise ValueError(
            f"advantages of a tree with {nodes} nodes and {leaves} leaves must have shape ({nodes},), "
            f"({leaves},) or ({leaves}, {nodes}), got {given.shape}"
        )
    return np.broadcast_to(given, (leaves, nodes))


def _piece(turn: Turn | None, prompt_ids: tuple[int, ...]) -> _Piece:
    if turn is None:
        empty = np.zeros(len(prompt_ids), dtype=np.float32)
        return _Piece(np.array(prompt_ids, dtype=np.int64), empty.astype(np.bool_), empty)
    observed = len(turn.observation_ids)
    sampled = np.concatenate([np.zeros(observed, dtype=np.bool_), turn.sampled_mask])
    log_probs = np.concatenate([np.zeros(observed, dtype=np.float32), turn.sampled_log_probs])
    return _Piece(np.array(turn.ids, dtype=np.int64), sampled, np.where(sampled, log_probs, np.float32(0)))


def _row(pieces: Sequence[_Piece], advantages: FloatArray) -> Row:
    sampled = np.concatenate([piece.sampled for piece in pieces])
    sampled[:1] = False
    lengths = [len(piece.ids) for piece in pieces]
    turn = np.repeat(np.arange(-1, len(pieces) - 1), lengths)
    spread = np.repeat(advantages, lengths)
    log_probs = np.concatenate([piece.log_probs for piece in pieces])
    return Row(
        ids=np.concatenate([piece.ids for piece in pieces]),
        turn_ids=np.where(sampled, turn, -1),
        advantages=np.where(sampled, spread, 0.0).astype(np.float32),
        log_probs=np.where(sampled, log_probs, np.float32(0)),
    )


def _apply_limit(rows: Sequence[Row], max_length: int, overflow: Overflow) -> list[Row]:
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    if overflow == "drop":
        return [row for row in rows if len(row.ids) <= max_length]
    if overflow == "truncate":
        return [row.cut(max_length) for row in rows]
    longest = max((len(row.ids) for row in rows), default=0)
    if longest > max_length:
        count = sum(len(row.ids) > max_length for row in rows)
        raise ValueError(
            f"{count} of {len(rows)} rows are longer than max_length {max_length} (the longest has {longest} "
            "tokens); shorten the rollout, raise max_length, or choose overflow='truncate' or 'drop'"
        )
    return list(rows)


def _pad(rows: Sequence[Row], pad_id: int) -> Batch:
    shape = (len(rows), max(len(row.ids) for row in rows))
    lengths = np.array([len(row.ids) for row in rows])
    positions = np.arange(shape[1])
    ids = np.full(shape, pad_id, dtype=np.int64)
    turn_ids = np.full(shape, -1, dtype=np.int64)
    advantages = np.zeros(shape, dtype=np.float32)
    log_probs = np.zeros(shape, dtype=np.float32)
    for index, row in enumerate(rows):
        end = len(row.ids)
        ids[index, :end], turn_ids[index, :end] = row.ids, row.turn_ids
        advantages[index, :end], log_probs[index, :end] = row.advantages, row.log_probs
    return Batch(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy((positions < lengths[:, None]).astype(np.int64)),
        position_ids=torch.from_numpy(np.minimum(positions, np.maximum(lengths[:, None] - 1, 0))),
        turn_ids=torch.from_numpy(turn_ids),
        advantages=torch.from_numpy(advantages),
        sampled_log_probs=torch.from_numpy(log_probs),
    )
