"""Runs a transformers model on a packed batch, through its attention interface.

The model runs without a cache of its own: the attention function registered here gets the keys and values of
every layer, stores them in their seats and attends there. Any decoder whose attention goes through
transformers' `AttentionInterface` works unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from at2po_agent.policies.hf.attention import PackedAttention, rows_for
from at2po_agent.policies.hf.slots import LayerShape
from at2po_env.errors import PolicyError

_ATTENTION = "at2po_slots"


class ModelDecoder:
    """Any supported model.

    Args:
        model: The model.

    Attributes:
        shapes: Heads and widths of each layer's keys and values.

    Raises:
        PolicyError: The model keeps something else than keys and values of every token, or does not take its
            attention from transformers' interface.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        if not model._supports_attention_backend:
            raise PolicyError(
                f"{type(model).__name__} does not use transformers' attention interface, which the sampler "
                "needs; use a decoder that does (Qwen, Llama, Mistral, ...)"
            )
        # Run one token and look at what the model keeps of it.
        with torch.no_grad():
            tokens = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
            cache = model(input_ids=tokens, use_cache=True).past_key_values
        layers = cache.layers if isinstance(cache, DynamicCache) else []
        self.shapes = [
            LayerShape(
                (layer.keys.shape[1], layer.keys.shape[3]), (layer.values.shape[1], layer.values.shape[3])
            )
            for layer in layers
            if isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None
        ]
        if not layers or len(self.shapes) != len(layers):
            raise PolicyError(
                f"{type(model).__name__} keeps other state than keys and values of every token "
                f"({sorted({type(layer).__name__ for layer in layers})}); the sampler does not support it"
            )

    def refresh(self) -> None:
        """The weights have changed; nothing is kept of them here."""

    def forward(self, tokens: Tensor, positions: Tensor, batch: PackedAttention) -> Tensor:
        """Run a packed batch of N tokens; returns the logits [n, V] after each seat's newest token."""
        model, config = self._model, self._model.config
        training, implementation = model.training, config._attn_implementation
        try:
            if training:
                model.eval()  # type: ignore[no-untyped-call]
            config._attn_implementation = _ATTENTION
            output = model(
                input_ids=tokens[None],
                position_ids=positions[None],
                use_cache=False,
                logits_to_keep=rows_for(batch.live),
                packed_batch=batch,
            )
        finally:
            config._attn_implementation = implementation
            if training:
                model.train()
        logits: Tensor = output.logits[0, -batch.live :]
        return logits


def _attend_in_slots(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, with float[1, heads, N, width] of a layer's new tokens."""
    del mask  # the packed batch knows who sees whom
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise PolicyError("attention with soft-capped scores or sinks is not supported by the sampler")
    batch: PackedAttention = kwargs["packed_batch"]
    attended = batch.attend(
        int(module.layer_idx),  # type: ignore[arg-type]
        *(states[0].transpose(0, 1) for states in (query, key, value)),
        scale=kwargs.get("scaling"),
        window=kwargs.get("sliding_window"),
    )
    return attended.unsqueeze(0), None


AttentionInterface.register(_ATTENTION, _attend_in_slots)
