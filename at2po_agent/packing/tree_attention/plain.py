"""Tree attention from plain tensor operations, a chain at a time: any device, soft caps and sliding windows.

Slower than the fused calls, and what they are tested against. Scores exist for one chain and its ancestors at
a time, never for all pairs of tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from at2po_agent.packing.tree_attention.plan import TreePlan


def tree_attention_plain(
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
        key: float[1, kv heads, P, width]; kv heads divides heads.
        value: float[1, kv heads, P, width of the values].
        plan: The chains and the descendants of each token.
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
    for call in plan.chains:
        visible = np.flatnonzero(plan.last[: call.end] >= call.end)
        hidden = visible > np.arange(call.begin, call.end)[:, None]
        if window is not None:
            back = plan.positions[call.begin : call.end, None] - plan.positions[visible]
            hidden |= back >= window
        places = torch.from_numpy(visible).to(query.device)
        keys = key[:, :, places].repeat_interleave(groups, dim=1)
        values = value[:, :, places].repeat_interleave(groups, dim=1)
        scores = (query[:, :, call.begin : call.end] @ keys.transpose(-1, -2)).to(wide) * factor
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(torch.from_numpy(hidden).to(query.device), float("-inf"))
        parts.append(scores.softmax(dim=-1).to(values.dtype) @ values)
    return torch.cat(parts, dim=2)
