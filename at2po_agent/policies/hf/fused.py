"""The Qwen3, Qwen2 and Llama decoders written out, for small models where modules cost more than matrices.

Same mathematics as transformers' modules with fewer operations: norms folded into the matrices after them,
one matrix for queries, keys and values, one for gate and up; the last layer runs for the newest tokens only.
The fused copies cost the model's size once more and are made afresh when weights change.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedModel, Qwen2ForCausalLM, Qwen3ForCausalLM

from at2po_agent.policies.hf.attention import PackedAttention, rows_for

_FAMILIES = (Qwen3ForCausalLM, Qwen2ForCausalLM, LlamaForCausalLM)
_LARGEST = 50_000_000  # parameters; above, the matrices are what costs


class _Linear(NamedTuple):
    """weight: float[in, out]; bias: float[out] or None."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def fold(cls, modules: list[nn.Linear], norm: Tensor | None = None) -> _Linear:
        """Put linear layers side by side, and fold the weight of the norm before them in."""
        weight = torch.cat([module.weight for module in modules])
        weight = weight if norm is None else weight * norm
        bias = None
        if any(module.bias is not None for module in modules):
            parts = [torch.zeros(len(m.weight)) if m.bias is None else m.bias.detach() for m in modules]
            bias = torch.cat(parts)
        return cls(weight.t().contiguous(), bias)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.mm(x, self.weight) if self.bias is None else torch.addmm(self.bias, x, self.weight)

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        added = torch.addmm(residual, x, self.weight)
        return added if self.bias is None else added.add_(self.bias)


class _Layer(NamedTuple):
    qkv: _Linear
    qk_norm: Tensor | None
    out: _Linear
    gate_up: _Linear
    down: _Linear


def fits(model: PreTrainedModel) -> bool:
    """True if a model can run here: one of the families, small, float32, on a CPU, plain in every respect."""
    config = model.config
    return (
        type(model) in _FAMILIES
        and model.dtype == torch.float32
        and model.device.type == "cpu"
        and sum(parameter.numel() for parameter in model.parameters()) <= _LARGEST
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and config.hidden_act in ("silu", "swish")
        and "dynamic" not in config.rope_parameters["rope_type"]
        and config.rope_parameters["rope_type"] != "longrope"
        and not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        and all(
            type(module) is nn.Linear  # no adapter in its place
            for name, module in model.named_modules()
            if name.endswith(("_proj", "lm_head"))
        )
    )


class FusedDecoder:
    """A small model of a known family.

    Args:
        model: A model for which `fits` holds.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config: Any = model.config
        self._model: Any = model
        self._heads = int(config.num_attention_heads)
        self._kv_heads = int(config.num_key_value_heads)
        self._width = int(model.model.layers[0].self_attn.head_dim)
        self._eps = float(config.rms_norm_eps)
        self._rope = (torch.empty(0), torch.empty(0))
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the model's weights."""
        inner = self._model.model
        self._embedding: Tensor = inner.embed_tokens.weight.detach()
        self._head = _Linear.fold([self._model.lm_head], inner.norm.weight)
        self._layers = []
        for layer in inner.layers:
            attention, mlp, qk_norm = layer.self_attn, layer.mlp, None
            if hasattr(attention, "q_norm"):
                query, key = attention.q_norm.weight, attention.k_norm.weight
                qk_norm = torch.cat([query.expand(self._heads, -1), key.expand(self._kv_heads, -1)])
            projections = [attention.q_proj, attention.k_proj, attention.v_proj]
            self._layers.append(
                _Layer(
                    _Linear.fold(projections, layer.input_layernorm.weight),
                    qk_norm,
                    _Linear.fold([attention.o_proj]),
                    _Linear.fold([mlp.gate_proj, mlp.up_proj], layer.post_attention_layernorm.weight),
                    _Linear.fold([mlp.down_proj]),
                )
            )

    def forward(self, tokens: Tensor, positions: Tensor, batch: PackedAttention) -> Tensor:
        """Run a packed batch of N tokens; returns the logits [n, V] after each seat's newest token."""
        x = F.embedding(tokens, self._embedding)
        cos, sin = self._rotation(positions)
        rotated = self._heads + self._kv_heads
        for number, layer in enumerate(self._layers):
            qkv = layer.qkv(self._norm(x)).view(-1, rotated + self._kv_heads, self._width)
            qk = qkv[:, :rotated]
            if layer.qk_norm is not None:
                qk = self._norm(qk).mul_(layer.qk_norm)
            qk = torch.addcmul(qk * cos, qk.roll(self._width // 2, -1), sin)
            query, key, value = qk[:, : self._heads], qk[:, self._heads :], qkv[:, rotated:]
            attended = batch.attend(number, query, key, value).flatten(1)
            if number == len(self._layers) - 1:
                x, attended = x[-rows_for(batch.live) :], attended[-rows_for(batch.live) :]
            x = layer.out.added_to(x, attended)
            gate, up = layer.gate_up(self._norm(x)).chunk(2, dim=-1)
            x = layer.down.added_to(x, F.silu(gate).mul_(up))
        return self._head(self._norm(x))[-batch.live :]

    def _norm(self, x: Tensor) -> Tensor:
        """Root mean square norm, x / sqrt(mean x^2 + eps); its weight is folded into the next matrix."""
        return torch.rms_norm(x, x.shape[-1:], None, self._eps)

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines, float[N, 1, width]: rotating is x cos + roll(x) sin."""
        longest = int(positions.max()) + 1
        if longest > len(self._rope[0]):
            rows = torch.arange(2 * longest).unsqueeze(0)
            cos, sin = self._model.model.rotary_emb(self._embedding, rows)
            half = self._width // 2
            self._rope = (cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1))
        return self._rope[0][positions].unsqueeze(1), self._rope[1][positions].unsqueeze(1)
