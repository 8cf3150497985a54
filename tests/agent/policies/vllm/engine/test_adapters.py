from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.vllm_tiny_engine import running, tiny_model, worst_error

from at2po_agent.policies.base import Request
from at2po_env.errors import PolicyError

TOLERANCE = 1e-4
REQUESTS = [Request((n + 1, 2, 3), 10, seed=n) for n in range(6)]


def adapted(seed: int) -> Any:
    """The tiny model with an adapter that changes its log-probs a lot."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"])
    model = peft.get_peft_model(tiny_model(seed=4), config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def learner() -> Any:
    return adapted(seed=0)


@pytest.fixture(scope="module")
def engine(learner: Any) -> Iterator[Any]:
    with running(learner, lora_rank=4) as policy:
        yield policy


def test_the_learners_adapter_is_sampled_with_and_follows_its_updates(engine, learner):
    engine.weights_changed()
    first = engine.generate(REQUESTS)
    assert worst_error(learner, REQUESTS, first) < TOLERANCE
    other = dict(adapted(seed=1).named_parameters())
    with torch.no_grad():
        for name, parameter in learner.named_parameters():
            parameter.copy_(other[name])
    engine.weights_changed()
    second = engine.generate(REQUESTS)
    assert worst_error(learner, REQUESTS, second) < TOLERANCE
    assert worst_error(learner, REQUESTS, first) > 100 * TOLERANCE
    assert {one.version for one in second} == {engine.version}


def test_an_adapter_of_a_folder_can_be_used_and_left(engine, tmp_path: Path):
    model = adapted(seed=2)
    model.save_pretrained(tmp_path)
    engine.use_adapter(tmp_path)
    assert worst_error(model, REQUESTS, engine.generate(REQUESTS)) < TOLERANCE
    engine.use_adapter(None)
    assert worst_error(tiny_model(seed=4), REQUESTS, engine.generate(REQUESTS)) < TOLERANCE


def test_engines_that_serve_no_adapters_sample_with_merged_weights(learner):
    with running(learner) as policy:
        policy.weights_changed()
        assert worst_error(learner, REQUESTS, policy.generate(REQUESTS)) < TOLERANCE


def test_engines_without_room_for_adapters_refuse_them(shared_policy, tmp_path: Path):
    with pytest.raises(PolicyError, match="lora_rank"):
        shared_policy.use_adapter(tmp_path)
