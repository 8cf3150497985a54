"""Tree attention on a CPU: one fused attention call per run and per segment of ancestors, merged exactly.

Every token attends to the tokens before it in its own run, and to the segments of ancestors in the runs
above. Keys and queries of each such call are slices of the packed sequence (`prefixes.Layout`), and only
calls within a run are causal: nothing is gathered and no mask is made.

`tree_attention_plain` does the same from plain tensor operations, slower: it knows soft caps and sliding
windows, and the fused calls are tested against it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from at2po_agent.packing.prefixes import Layout

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def tree_attention_cpu(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, *, scale: float | None = None
) -> Tensor:
    """Attention of every token of a packed tree to its ancestors and itself.

    Args:
        query: float[1, heads, P, width].
        key: float[1, kv heads, P, width]; kv heads divides heads.
        value: float[1, kv heads, P, width].
        layout: Which tokens are ancestors of which.
        scale: Factor of the scores; None means 1 / sqrt(width).

    Returns:
        float[1, heads, P, width].
    """
    out: Tensor = _TreeAttention.apply(query, key, value, layout, scale)  # type: ignore[no-untyped-call]
    return out


class _TreeAttention(torch.autograd.Function):
    """All calls of one layer as one node of the graph."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float | None
    ) -> Tensor:
        wide = torch.promote_types(query.dtype, torch.float32)
        out = _empty_like(query, wide)
        lse = query.new_empty(query.shape[:3], dtype=wide)
        # First each run attends to itself. A call returns its output and, for every query, the logarithm of
        # the sum of its exponentiated scores, by which the softmax was normalised.
        for run in layout.runs:
            part, norm = _forward(query[:, :, run], key[:, :, run], value[:, :, run], 0.0, True, scale=scale)
            out[:, :, run] = part
            lse[:, :, run] = norm
        # Then all descendants of a segment attend to it, all to all. A softmax over the keys of two calls is
        # the mean of their outputs, weighted by their normalisers:
        #     o = (1 - w) o_1 + w o_2,  w = sigmoid(lse_2 - lse_1),  lse = log(exp lse_1 + exp lse_2).
        for keys, queries in layout.segments:
            part, norm = _forward(
                query[:, :, queries], key[:, :, keys], value[:, :, keys], 0.0, False, scale=scale
            )
            own = lse[:, :, queries]
            out[:, :, queries].lerp_(part.to(wide), torch.sigmoid(norm - own).unsqueeze(-1))
            torch.logaddexp(own, norm, out=own)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        wide = torch.promote_types(query.dtype, torch.float32)
        grads = [_empty_like(tensor, wide) for tensor in (query, key, value)]
        # The backward pass of a call makes its probabilities as exp(score - lse). Given the merged output and
        # lse instead of the call's own, these are the shares of its keys in the whole softmax, so the
        # kernel's own backward pass is exact for the merged result. Gradients of the calls add up.
        calls = [(run, run, True) for run in ctx.layout.runs]
        calls += [(queries, keys, False) for keys, queries in ctx.layout.segments]
        for queries, keys, causal in calls:
            parts = _backward(
                grad[:, :, queries],
                query[:, :, queries],
                key[:, :, keys],
                value[:, :, keys],
                out[:, :, queries],
                lse[:, :, queries],
                0.0,
                causal,
                scale=ctx.scale,
            )
            for total, part, places in zip(grads, parts, (queries, keys, keys), strict=True):
                # The calls of the runs come first and touch every token once, so nothing has to be zeroed.
                if causal:
                    total[:, :, places] = part
                else:
                    total[:, :, places] += part
        return (*(total.to(query.dtype) for total in grads), None, None)


def _empty_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """[1, heads, P, width] that lies in memory as [1, P, heads, width], as models make and want it."""
    batch, heads, tokens, width = tensor.shape
    return tensor.new_empty((batch, tokens, heads, width), dtype=dtype).transpose(1, 2)


def tree_attention_plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention of every token of a packed tree to its ancestors and itself, a run at a time.

    Scores exist for one run and its ancestors at a time, never for all pairs of tokens.

    Args:
        query: float[1, heads, P, width].
        key: float[1, kv heads, P, width]; kv heads divides heads.
        value: float[1, kv heads, P, width of the values].
        layout: Which tokens are ancestors of which.
        scale: Factor of the scores; None means 1 / sqrt(width).
        softcap: Scores become `softcap * tanh(score / softcap)`; None leaves them.
        window: How many positions back a query sees, itself included; None for all.

    Returns:
        float[1, heads, P, width of the values].
    """
    groups = query.shape[1] // key.shape[1]
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(query.dtype, torch.float32)
    parts = []
    for run in layout.runs:
        # A token before the end of the run is in it or above it if its descendants reach that end.
        visible = np.flatnonzero(layout.last[: run.stop] >= run.stop)
        hidden = visible > np.arange(run.start, run.stop)[:, None]
        if window is not None:
            back = layout.positions[run, None] - layout.positions[visible]
            hidden |= back >= window
        places = torch.from_numpy(visible).to(query.device)
        keys = key[:, :, places].repeat_interleave(groups, dim=1)
        values = value[:, :, places].repeat_interleave(groups, dim=1)
        scores = (query[:, :, run] @ keys.transpose(-1, -2)).to(wide) * factor
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(torch.from_numpy(hidden).to(query.device), float("-inf"))
        parts.append(scores.softmax(dim=-1).to(values.dtype) @ values)
    return torch.cat(parts, dim=2)
