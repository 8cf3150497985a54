"""A model that vLLM can serve on a CPU; what its samples must agree with is `policy_reference`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from at2po_agent.policies.vllm.config import VLLMConfig
from at2po_agent.types import Generation
from helpers.policy_reference import VOCABULARY, ids, reference_log_probs, tiny_tokenizer, worst_error
from helpers.policy_reference import tiny_model as reference_tiny_model

__all__ = [
    "POSITIONS",
    "SMALL",
    "VOCABULARY",
    "drain",
    "ids",
    "reference_log_probs",
    "running",
    "tiny_model",
    "tiny_tokenizer",
    "worst_error",
]

POSITIONS = 1024
SMALL = VLLMConfig(kv_cache_gb=0.05, threads=1, start_timeout_s=280, stall_timeout_s=60)


def tiny_model(*, seed: int) -> Any:
    """Heads of 32, the smallest that vLLM's CPU attention takes."""
    sizes = {"hidden_size": 64, "heads": 2, "kv_heads": 1, "head_dim": 32, "ffn_size": 64}
    return reference_tiny_model(seed=seed, init_std=0.2, max_positions=POSITIONS, **sizes)


@contextlib.contextmanager
def running(model: Any, *, slots: int = 16, **config: Any) -> Iterator[Any]:
    """A policy on engines of `SMALL`, with some settings changed; closed at the end."""
    from at2po_agent.policies.vllm import VLLMPolicy

    policy = VLLMPolicy(model, tiny_tokenizer(), config=SMALL.model_copy(update=config), slots=slots)
    with contextlib.closing(policy):
        yield policy


def drain(policy: Any, tickets: set[int]) -> dict[int, Generation]:
    done: dict[int, Generation] = {}
    while tickets - done.keys():
        done.update(policy.poll())
    return done
