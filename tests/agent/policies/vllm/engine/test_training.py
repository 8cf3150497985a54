"""Whole runs through the configuration: vLLM samples in its process, torch learns in this one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from at2po_agent.config.loading import load_config
from at2po_agent.credit.registry import Credit, register_credit
from at2po_agent.run import run_training

TINY = [
    "model.random_init=true",
    "model.device=cpu",
    "model.vocab_size=600",
    "model.hidden_size=64",
    "model.layers=2",
    "model.heads=2",
    "model.kv_heads=1",
    "model.head_dim=32",
    "model.ffn_size=64",
    "model.max_positions=4096",
    "model.init_std=0.1",
    "model.slots=64",
    "model.vllm.kv_cache_gb=0.1",
    "model.vllm.threads=1",
    "model.vllm.engines=1",
    "algorithm.credit=vllm_test_signs",  # a random model's answers are all as wrong as each other
    "rollout.chains=3",
    "rollout.forks=2",
    "rollout.rounds=1",
    "rollout.max_turn_tokens=24",
    "rollout.max_response_tokens=512",
    "env.kwargs.topk=1",
    "eval.questions=2",
    "train.steps=2",
    "train.questions=4",
    "train.minibatch_questions=2",
    "train.autocast=none",
    "train.gradient_checkpointing=false",
    "optimizer.lr=0.01",
    "run.threads=1",
]


def signs(tree: Any) -> Credit:
    """Advantages that move the weights, whatever was earned."""
    advantages = np.where(np.arange(len(tree)) % 2, 1.0, -1.0)
    return Credit(advantages=advantages, values=advantages)


register_credit("vllm_test_signs", signs)


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_the_published_configuration_trains_with_random_weights(tmp_path: Path, asynchronous: str) -> None:
    config = load_config(
        "qwen3-4b-multihop",
        [
            *TINY,
            "env.kwargs.retriever=bm25",
            f"run.dir={tmp_path / 'run'}",
            f"model.vllm.asynchronous={asynchronous}",
        ],
    )
    assert config.model.sampler == "vllm"
    summary = run_training(config)
    assert summary["steps"] == 2
    assert summary["sampled_tokens"] > 100
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert [step["step"] for step in steps] == [1, 2]
    # The second step was sampled with the weights that the first one made (at this rate they differ a lot).
    assert all(step["mismatch/max_difference"] < 1e-3 for step in steps)
    assert all(step["mismatch/tokens"] > 0 for step in steps)
    assert steps[1]["updates"] == 2
    assert all(step["grad_norm"] > 0 for step in steps)
