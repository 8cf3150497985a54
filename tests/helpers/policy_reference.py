"""What the policy must agree with: one plain forward pass per sequence, no cache, no batch."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from at2po_agent.agents.model import Architecture, ModelShape, build_model, train_tokenizer
from at2po_agent.policies.base import Request
from at2po_agent.policies.hf.policy import HFPolicy
from at2po_agent.transcripts.tokenizer import HFTokenizer
from at2po_agent.types import Generation

VOCABULARY = 300
TOLERANCE = 1e-4


@functools.cache
def tiny_tokenizer() -> HFTokenizer:
    texts = ["<search> who directed the river </search>", "Ann Bell was born in Oslo."] * 20
    tokenizer = train_tokenizer(texts, vocab_size=VOCABULARY, special_tokens=["<search>", "</search>"])
    assert len(tokenizer) <= VOCABULARY
    return tokenizer


def tiny_model(architecture: Architecture = "qwen3", *, seed: int = 0, **sizes: Any) -> Any:
    """A random model whose logits are far from uniform."""
    shape = ModelShape(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "layers": 2,
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 8,
            "ffn_size": 48,
            "max_positions": 1024,
            "architecture": architecture,
            "init_std": 0.3,
            **sizes,
        }
    )
    model = build_model(shape, seed=seed)
    with (
        torch.no_grad()
    ):  # norms and biases are constant after the usual initialisation: they would hide mistakes
        generator = torch.Generator().manual_seed(seed)
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


def make_policy(model: Any, **options: Any) -> HFPolicy:
    return HFPolicy(model, tiny_tokenizer(), **options)


def ragged_requests(rng: random.Random, number: int) -> list[Request]:
    """Prefixes of 1 to 240 ids that share beginnings, some equal, some the beginning of another."""
    trunk = ids(rng, 200)
    requests = []
    for seed in range(number):
        prefix = trunk[: rng.randrange(1, 201)] + ids(rng, rng.choice([0, 0, 1, 40]))
        if requests and seed % 4 == 0:
            prefix = rng.choice(requests).prefix_ids
        requests.append(Request(prefix, rng.randrange(1, 24), seed=seed))
    return requests


def drain(policy: HFPolicy, tickets: set[int]) -> dict[int, Any]:
    done: dict[int, Any] = {}
    while tickets - done.keys():
        done.update(policy.poll())
    return done


def assert_same(generations: Sequence[Generation], expected: Sequence[Generation]) -> None:
    """Equal to the last bit."""
    for one, other in zip(generations, expected, strict=True):
        assert (one.ids, one.stop_reason) == (other.ids, other.stop_reason)
        np.testing.assert_array_equal(one.log_probs, other.log_probs)


def stop_id(text: str) -> int:
    (token,) = tiny_tokenizer().encode(text)
    return token
