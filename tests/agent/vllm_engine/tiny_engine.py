"""A model that vLLM can serve on a CPU, and what its samples must agree with."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import Any

import torch

from at2po_agent.model import ModelShape, build_model, train_tokenizer
from at2po_agent.policies.base import Request
from at2po_agent.policies.tokenizer import HFTokenizer
from at2po_agent.policies.vllm.settings import VLLMSettings
from at2po_agent.types import Generation

VOCABULARY = 300
POSITIONS = 1024
SMALL = VLLMSettings(kv_cache_gb=0.05, threads=1, start_timeout_s=280, stall_timeout_s=60)


@functools.cache
def tiny_tokenizer() -> HFTokenizer:
    texts = ["<search> who directed the river </search>", "Ann Bell was born in Oslo."] * 20
    return train_tokenizer(texts, vocab_size=VOCABULARY, special_tokens=["<search>", "</search>"])


def tiny_model(*, seed: int) -> Any:
    """A random model whose logits are far from uniform."""
    shape = ModelShape(
        vocab_size=VOCABULARY,
        hidden_size=64,
        layers=2,
        heads=2,
        kv_heads=1,
        head_dim=32,
        ffn_size=64,
        max_positions=POSITIONS,
        init_std=0.2,
    )
    model = build_model(shape, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # norms are constant after the usual initialisation: they would hide mistakes
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def ids(rng: random.Random, length: int) -> tuple[int, ...]:
    """Random ids without the end-of-sequence id 0."""
    return tuple(rng.randrange(1, VOCABULARY) for _ in range(length))


@torch.no_grad()
def reference_log_probs(model: Any, request: Request, generation: Generation) -> torch.Tensor:
    """float32[T] of the generated ids under one plain forward pass, at the request's temperature."""
    sequence = torch.tensor([[*request.prefix_ids, *generation.ids]])
    logits = model(input_ids=sequence).logits[0, len(request.prefix_ids) - 1 : -1].float()
    log_probs = (logits / (request.temperature or 1.0)).log_softmax(dim=-1)
    return log_probs.gather(-1, sequence[0, len(request.prefix_ids) :, None])[:, 0]


def worst_error(model: Any, requests: Sequence[Request], generations: Sequence[Generation]) -> float:
    """Largest difference between the policy's log-probs and the reference's."""
    worst = 0.0
    for request, generation in zip(requests, generations, strict=True):
        own = torch.from_numpy(generation.log_probs.copy())
        if len(own):
            worst = max(worst, float((own - reference_log_probs(model, request, generation)).abs().max()))
    return worst


def drain(policy: Any, tickets: set[int]) -> dict[int, Generation]:
    done: dict[int, Generation] = {}
    while tickets - done.keys():
        done.update(policy.poll())
    return done
