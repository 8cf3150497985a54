"""Tree attention on a CPU: a fused attention call per chain and per segment, merged exactly.

`softmax` over the keys of several calls is a mean of the calls' outputs weighted by their normalisers:
`o = (1 - w) o_1 + w o_2`, `w = sigmoid(lse_2 - lse_1)`, `lse = log(exp lse_1 + exp lse_2)`. The backward pass
of each call needs only the merged `o` and `lse`, since it makes its probabilities as `exp(score - lse)`: the
kernel's own backward pass is exact with them. Gradients of keys and values are added up in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from at2po_agent.packing.tree_attention.plan import Call, TreePlan

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def tree_attention_cpu(
    query: Tensor, key: Tensor, value: Tensor, plan: TreePlan, *, scale: float | None = None
) -> Tensor:
    """Attention of every token of a packed tree to its ancestors and itself.

    Args:
        query: float[1, heads, P, width].
        key: float[1, kv heads, P, width]; kv heads divides heads.
        value: float[1, kv heads, P, width].
        plan: The calls.
        scale: Factor of the scores; None means 1 / sqrt(width).

    Returns:
        float[1, heads, P, width].
    """
    out: Tensor = _TreeAttention.apply(query, key, value, plan, scale)  # type: ignore[no-untyped-call]
    return out


class _TreeAttention(torch.autograd.Function):
    """All calls of one layer as one node of the graph."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: TreePlan, scale: float | None
    ) -> Tensor:
        wide = torch.promote_types(query.dtype, torch.float32)
        out = _empty_like(query, wide)
        lse = query.new_empty(query.shape[:3], dtype=wide)
        for call in plan.chains:
            part, norm = _attend(query, key, value, call, scale, causal=True)
            _at(out, call)[...] = part
            lse[:, :, call.begin : call.end] = norm
        for call in plan.segments:
            part, norm = _attend(query, key, value, call, scale, causal=False)
            own = lse[:, :, call.begin : call.end]
            _at(out, call).lerp_(part.to(wide), torch.sigmoid(norm - own).unsqueeze(-1))
            torch.logaddexp(own, norm, out=own)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        wide = torch.promote_types(query.dtype, torch.float32)
        grads = [_empty_like(tensor, wide) for tensor in (query, key, value)]
        for calls, causal in ((ctx.plan.chains, True), (ctx.plan.segments, False)):
            for call in calls:
                parts = _backward(
                    _at(grad, call),
                    _at(query, call),
                    key[:, :, call.first : call.stop],
                    value[:, :, call.first : call.stop],
                    _at(out, call),
                    lse[:, :, call.begin : call.end],
                    0.0,
                    causal,
                    scale=ctx.scale,
                )
                keys = slice(call.first, call.stop)
                places = (slice(call.begin, call.end), keys, keys)
                for total, part, place in zip(grads, parts, places, strict=True):
                    # The chains' calls come first and touch every token once.
                    if causal:
                        total[:, :, place] = part
                    else:
                        total[:, :, place] += part
        return (*(total.to(query.dtype) for total in grads), None, None)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, call: Call, scale: float | None, *, causal: bool
) -> tuple[Tensor, Tensor]:
    keys, values = key[:, :, call.first : call.stop], value[:, :, call.first : call.stop]
    part, norm = _forward(_at(query, call), keys, values, 0.0, causal, scale=scale)
    return part, norm


def _at(tensor: Tensor, call: Call) -> Tensor:
    return tensor[:, :, call.begin : call.end]


def _empty_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """[1, heads, P, width] that lies in memory as [1, P, heads, width], as models make and want it."""
    batch, heads, tokens, width = tensor.shape
    return tensor.new_empty((batch, tokens, heads, width), dtype=dtype).transpose(1, 2)
