"""Tree attention on a GPU: FlexAttention with a block mask made from the tree's intervals.

Token j is visible to token i exactly if `j <= i < last[j]`. For blocks of tokens that needs only the least
and the greatest `last` of each block of keys, so the block mask costs (P / 128)^2 comparisons on the host and
no tensor of size P x P. Lengths are padded to a few sizes (`bucket`), and the kernel is compiled once for
each; the intervals are its input, so another tree of the same bucket compiles nothing.

The block mask and the visibility are tested on a CPU against the plain implementation. The compiled kernels
have not been run on a GPU by the project's tests; `benchmarks.packing` does so where there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from at2po_agent.packing.batch import move
from at2po_agent.packing.prefixes import Layout
from at2po_agent.types import BoolArray, IntArray

BLOCK = 128


def tree_attention_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention of every token of a packed tree to its ancestors and itself; arguments as the plain one's.

    Returns:
        float[1, heads, P, width of the values].
    """
    # The mask is made for the first layer that asks; the others find it until the pack is gone.
    masks = _masks.setdefault(layout, {})
    which = (str(query.device), window)
    if which not in masks:
        masks[which] = block_mask(layout, query.device, window=window)
    mask = masks[which]
    tokens = query.shape[2]
    more = int(mask.seq_lengths[0]) - tokens
    padded = [pad(tensor, (0, 0, 0, more)) for tensor in (query, key, value)]
    attend = _compiled() if query.device.type == "cuda" else flex_attention
    out: Tensor = attend(*padded, score_mod=_soft_cap(softcap), block_mask=mask, scale=scale, enable_gqa=True)
    return out[:, :, :tokens]


_masks: WeakKeyDictionary[Layout, dict[tuple[str, int | None], BlockMask]] = WeakKeyDictionary()


@lru_cache(maxsize=1)
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)


@lru_cache(maxsize=8)  # the same function object each time, or the kernel would be compiled again
def _soft_cap(softcap: float | None) -> Callable[..., Tensor] | None:
    if softcap is None:
        return None

    def capped(score: Tensor, *place: Tensor) -> Tensor:
        del place
        return softcap * torch.tanh(score / softcap)

    return capped


def block_mask(layout: Layout, device: torch.device, *, window: int | None = None) -> BlockMask:
    """The block mask of a packed tree, padded to its bucket; padding sees itself alone.

    Args:
        layout: Which tokens descend from which.
        device: Where it is used.
        window: How many positions back a query sees, itself included; None for all.
    """
    tokens = len(layout.last)
    size = bucket(tokens)
    last = np.concatenate([layout.last, np.arange(tokens + 1, size + 1)])
    some, whole = block_visibility(last)
    if window is not None and window < layout.longest:
        # A window may hide any pair of tokens, so every block is looked at token by token.
        whole = np.zeros_like(whole)
    ends = move(torch.from_numpy(last.astype(np.int32)), device)
    positions = move(torch.from_numpy(np.pad(layout.positions, (0, size - tokens)).astype(np.int32)), device)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del batch, head
        seen = (key <= query) & (query < ends[key])
        return seen if window is None else seen & (positions[query] - positions[key] < window)

    # FlexAttention skips blocks that are in neither list, asks `visible` for each pair of tokens in those of
    # the first, and asks nothing in those of the second.
    return BlockMask.from_kv_blocks(
        *_listed(some & ~whole, device),
        *_listed(whole, device),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(size, size),
    )


def bucket(tokens: int) -> int:
    """The padded length: a multiple of 128 with at most four significant bits, so at most 12.5% too long."""
    blocks = max(1, -(-tokens // BLOCK))
    step = 1 << max(0, blocks.bit_length() - 4)
    return -(-blocks // step) * step * BLOCK


def block_visibility(last: IntArray) -> tuple[BoolArray, BoolArray]:
    """Which blocks of keys some query of a block sees, and which all of its queries see whole.

    Args:
        last: int64[P], one past the last descendant of each token; P is a multiple of 128.

    Returns:
        some and all, bool[P / 128, P / 128], queries by keys.
    """
    blocks = last.reshape(-1, BLOCK)
    first = np.arange(len(blocks)) * BLOCK
    below = first[:, None] > first
    # In the blocks before its own, a query sees a key whose `last` is greater than the query's place. The
    # first query of a block is seen by the most keys, and the last one by the fewest.
    some = (below & (blocks.max(axis=1) > first[:, None])) | np.eye(len(blocks), dtype=np.bool_)
    whole = below & (blocks.min(axis=1) >= first[:, None] + BLOCK)
    return some, whole


def _listed(blocks: BoolArray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Number and indices of the blocks of keys of each block of queries, as BlockMask wants them."""
    counts = blocks.sum(axis=1).astype(np.int32)
    indices = np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)
    return move(torch.from_numpy(counts)[None, None], device), move(
        torch.from_numpy(indices)[None, None], device
    )
