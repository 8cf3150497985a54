"""Tree attention as an attention implementation of transformers, under the name `at2po_tree`.

Any decoder whose attention goes through transformers' `AttentionInterface` works unchanged. Outside of
attention a decoder must not mix tokens; `trees.check_model` finds out whether it does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from at2po_agent.packing.prefixes import Layout
from at2po_agent.packing.tree_attention.cpu import tree_attention_cpu, tree_attention_plain

NAME = "at2po_tree"


def tree_attention(model: nn.Module) -> AbstractContextManager[None]:
    """Let a model attend along trees until the end of the block, the backward pass included.

    A model that recomputes activations runs its layers again in the backward pass, so that must lie in the
    block too.

    Args:
        model: A transformers model, or a module that contains one (an adapter, say).
    """
    return attention_implementation(model, NAME)


@contextmanager
def attention_implementation(model: nn.Module, name: str) -> Iterator[None]:
    """Let a model use a registered attention implementation until the end of the block."""
    configs = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = name
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree_layout: Layout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Take the way that the device and the model's options need; signature and result are transformers'."""
    del module, attention_mask
    if tree_layout is None:
        raise ValueError(f"attention {NAME!r} needs the keyword tree_layout with every call of the model")
    if dropout:
        raise ValueError("tree attention has no dropout: set the model's attention_dropout to 0")
    if others.get("s_aux") is not None or others.get("position_bias") is not None:
        raise ValueError("tree attention knows neither attention sinks nor biases; use train.packing: rows")
    # Under autocast, rotary embeddings make float32 of queries and keys, and values stay in half precision.
    query, key = query.to(value.dtype), key.to(value.dtype)
    window = None if sliding_window is None or sliding_window >= tree_layout.longest else sliding_window
    if query.device.type == "cuda":
        # Imported where it is used: it brings the compiler.
        from at2po_agent.packing.tree_attention.flex import tree_attention_flex

        out = tree_attention_flex(
            query, key, value, tree_layout, scale=scaling, softcap=softcap, window=window
        )
    elif softcap is None and window is None and query.shape[-1] == value.shape[-1]:
        out = tree_attention_cpu(query, key, value, tree_layout, scale=scaling)
    else:
        out = tree_attention_plain(
            query, key, value, tree_layout, scale=scaling, softcap=softcap, window=window
        )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attend)
