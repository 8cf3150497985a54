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

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from at2po_agent.packing.rows import move
from at2po_agent.packing.tree_attention.plan import TreePlan
from at2po_agent.types import BoolArray, IntArray

BLOCK = 128


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
    diagonal = np.eye(len(blocks), dtype=np.bool_)
    some = (below & (blocks.max(axis=1) > first[:, None])) | diagonal
    whole = below & (blocks.min(axis=1) >= first[:, None] + BLOCK)
    return some, whole


def block_mask(plan: TreePlan, device: torch.device, *, window: int | None = None) -> BlockMask:
    """The block mask of a packed tree, padded to its bucket; padding sees itself alone.

    Args:
        plan: The descendants of each token.
        device: Where it is used.
        window: How many positions back a query sees, itself included; None for all.
    """
    tokens = len(plan.last)
    size = bucket(tokens)
    last = np.concatenate([plan.last, np.arange(tokens + 1, size + 1)])
    some, whole = block_visibility(last)
    if window is not None and window < plan.longest:
        whole = np.zeros_like(whole)
    ends = move(torch.from_numpy(last.astype(np.int32)), device)
    places = move(torch.from_numpy(np.pad(plan.positions, (0, size - tokens)).astype(np.int32)), device)
    return BlockMask.from_kv_blocks(
        *_ordered(some & ~whole, device),
        *_ordered(whole, device),
        BLOCK_SIZE=BLOCK,
        mask_mod=_visible(ends, places, window),
        seq_lengths=(size, size),
    )


def tree_attention_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: TreePlan,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention of every token of a packed tree to its ancestors and itself.

    Args:
        query: float[1, heads, P, width].
        key: float[1, kv heads, P, width].
        value: float[1, kv heads, P, width of the values].
        plan: The descendants of each token.
        scale: Factor of the scores; None means 1 / sqrt(width).
        softcap: Scores become `softcap * tanh(score / softcap)`.
        window: How many positions back a query sees, itself included.

    Returns:
        float[1, heads, P, width of the values].
    """
    mask = _mask_of(plan, query.device, window)
    tokens = query.shape[2]
    more = int(mask.seq_lengths[0]) - tokens
    padded = [pad(tensor, (0, 0, 0, more)) for tensor in (query, key, value)]
    attend = _compiled() if query.device.type == "cuda" else flex_attention
    out: Tensor = attend(*padded, score_mod=_soft_cap(softcap), block_mask=mask, scale=scale, enable_gqa=True)
    return out[:, :, :tokens]


_masks: dict[tuple[int, str, int | None], tuple[TreePlan, BlockMask]] = {}


def _mask_of(plan: TreePlan, device: torch.device, window: int | None) -> BlockMask:
    """The mask of the plan in use, made once for all layers; those of earlier plans are dropped."""
    key = (id(plan), str(device), window)
    if key not in _masks:
        for old in [old for old, (other, _) in _masks.items() if other is not plan]:
            del _masks[old]
        _masks[key] = (plan, block_mask(plan, device, window=window))
    return _masks[key][1]


def _ordered(blocks: BoolArray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Number and indices of the blocks of keys of each block of queries, as BlockMask wants them."""
    counts = blocks.sum(axis=1).astype(np.int32)
    indices = np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)
    pair = torch.from_numpy(counts)[None, None], torch.from_numpy(indices)[None, None]
    return move(pair[0], device), move(pair[1], device)


def _visible(ends: Tensor, places: Tensor, window: int | None) -> Callable[..., Tensor]:
    def of_ancestors(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del batch, head
        seen = (key <= query) & (query < ends[key])
        return seen if window is None else seen & (places[query] - places[key] < window)

    return of_ancestors


@lru_cache(maxsize=8)
def _soft_cap(softcap: float | None) -> Callable[..., Tensor] | None:
    if softcap is None:
        return None

    def capped(score: Tensor, *place: Tensor) -> Tensor:
        del place
        return softcap * torch.tanh(score / softcap)

    return capped


@lru_cache(maxsize=1)
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)
