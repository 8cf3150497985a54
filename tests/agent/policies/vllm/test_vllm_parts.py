"""What of the vLLM policy needs no vLLM: config, routing, places, weights, and the error without it."""

import importlib
import os
import random
import resource
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from pydantic import ValidationError

from at2po_agent.agents.agent import build_agent, engine_config
from at2po_agent.agents.model import ModelShape, build_model
from at2po_agent.config.loading import load_config
from at2po_agent.policies.vllm import VLLMPolicy
from at2po_agent.policies.vllm.config import VLLMConfig
from at2po_agent.policies.vllm.exact_prefixes import shares_to_the_token
from at2po_agent.policies.vllm.routing import Router
from at2po_agent.policies.vllm.spec import (
    EngineGPUs,
    EngineSpec,
    attends_to_all,
    engine_arguments,
    prepare_environment,
    share_out,
)
from at2po_agent.policies.vllm.weights import SharedSender, save_model, view
from at2po_agent.policies.weights import named_weights
from at2po_env.errors import ConfigError, MissingExtraError, PolicyError


@pytest.fixture
def no_vllm(monkeypatch):
    """As where vLLM is not installed."""
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "vllm", None)


@pytest.mark.usefixtures("no_vllm")
def test_without_vllm_the_error_names_the_extra():
    for module in ("policy", "engine", "process", "weights", "spec"):
        importlib.import_module(f"at2po_agent.policies.vllm.{module}")
    with pytest.raises(MissingExtraError, match=r"pip install 'at2po\[vllm\]'"):
        VLLMPolicy("nowhere", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'at2po\[vllm\]'"):
        build_agent(load_config("qwen3-4b-multihop"))  # before any weight is loaded


@pytest.mark.parametrize(
    ("choice", "version", "attends", "expected"),
    [
        ("auto", "0.32.0", True, True),
        ("auto", "0.32.0+cpu", True, True),
        ("auto", "0.32.1", True, False),  # its internals may be others
        ("auto", "0.32.0", False, False),
        (True, "0.33.0", True, True),  # an explicit choice holds
        (False, "0.32.0", True, False),
    ],
)
def test_exact_prefixes_are_for_tested_versions(choice, version, attends, expected):
    assert shares_to_the_token(choice, version=version, attends_to_all=attends) is expected


# Routing ----------------------------------------------------------------------------------------------------


def test_branches_follow_their_prompt_and_questions_are_spread():
    router, rng = Router(3), random.Random(0)
    shared = tuple(rng.randrange(100) for _ in range(50))
    questions = [(*shared, 1000 + n, *(rng.randrange(100) for _ in range(n))) for n in range(9)]
    homes = [router.route(question) for question in questions]
    assert sorted(homes) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for _ in range(40):
        question = rng.randrange(9)
        longer = questions[question] + tuple(rng.randrange(100) for _ in range(rng.randrange(30)))
        assert router.route(longer) == homes[question]


def test_a_new_question_goes_where_the_least_is_open():
    router = Router(2)
    first = router.route((1, 2))
    assert [router.route((1, 2, n)) for n in range(5)] == [first] * 5
    assert [router.route((9, n)) for n in range(6)] == [1 - first] * 6
    for _ in range(6):
        router.done(first)
    assert router.open == [0, 6]
    assert router.route((10, 1)) == first


def test_forgetting_lets_questions_move():
    router = Router(2)
    home = router.route((1, 2))
    router.forget()
    assert router.route((1, 2, 3)) == 1 - home  # the other one has nothing to do


# Places -----------------------------------------------------------------------------------------------------

FOUR = ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("visible", "learner", "engines", "each", "expected"),
    [
        (FOUR, 0, 0, 1, [EngineGPUs(("1",), False), EngineGPUs(("2",), False), EngineGPUs(("3",), False)]),
        (FOUR, 0, 1, 2, [EngineGPUs(("1", "2"), False)]),
        (FOUR, 0, 2, 2, [EngineGPUs(("1", "2"), False), EngineGPUs(("3", "0"), True)]),
        (FOUR, None, 2, 2, [EngineGPUs(("0", "1"), False), EngineGPUs(("2", "3"), False)]),
        (["5"], 0, 0, 1, [EngineGPUs(("5",), True)]),
        (["GPU-a", "GPU-b"], 1, 0, 1, [EngineGPUs(("GPU-a",), False)]),
    ],
)
def test_engines_take_the_gpus_beside_the_learner_first(visible, learner, engines, each, expected):
    assert share_out(visible, learner, engines=engines, each=each) == expected


def test_too_few_gpus_are_an_error():
    with pytest.raises(PolicyError, match=r"2 engines of 4 GPUs need 8, but 4 are visible"):
        share_out(FOUR, 0, engines=2, each=4)


# Settings ---------------------------------------------------------------------------------------------------


def test_several_engines_need_processes():
    with pytest.raises(ValidationError, match="asynchronous"):
        VLLMConfig(engines=2, asynchronous=False)
    with pytest.raises(ConfigError, match="asynchronous"):
        load_config("quickstart", ["model.vllm.engines=0", "model.vllm.asynchronous=false"])


def test_engines_are_as_long_as_the_rollout_needs_and_compute_as_the_learner_does():
    published = load_config("qwen3-4b-multihop")
    assert (published.model.sampler, published.model.vllm.engines) == ("vllm", 0)
    config = engine_config(published, most=40_960)
    assert (config.max_model_len, config.dtype) == (8192, "bfloat16")
    assert engine_config(published, most=4096).max_model_len == 4096
    other = load_config("qwen3-4b-multihop", ["model.vllm.max_model_len=99", "model.vllm.dtype=float16"])
    assert engine_config(other, most=4096) == other.model.vllm


def test_arguments_of_the_engine():
    spec = EngineSpec(model="m", config=VLLMConfig(dtype="float32"), max_sequences=7, eos_ids=(0,))
    cpu, gpu = engine_arguments(spec, on_cpu=True), engine_arguments(spec, on_cpu=False)
    assert (cpu["block_size"], cpu["enforce_eager"], cpu["kv_cache_memory_bytes"]) == (32, True, 1 << 30)
    assert (gpu["block_size"], gpu["enforce_eager"], gpu["kv_cache_memory_bytes"]) == (16, False, None)
    assert (gpu["gpu_memory_utilization"], gpu["enable_sleep_mode"]) == (0.9, False)
    # What the contract of the log-probs and of interventions stands on.
    assert gpu["logprobs_mode"] == "processed_logits"
    assert gpu["enable_chunked_prefill"] is False
    shared = EngineSpec(model="m", config=VLLMConfig(), max_sequences=7, eos_ids=(0,), shared=True)
    both = engine_arguments(shared, on_cpu=False)
    assert (both["gpu_memory_utilization"], both["enable_sleep_mode"]) == (0.35, True)


# Weights ----------------------------------------------------------------------------------------------------


def tied_model():
    return build_model(ModelShape(vocab_size=300, hidden_size=16, layers=1, heads=2, head_dim=8), seed=0)


def test_tied_weights_are_named_once():
    weights = named_weights(tied_model())
    assert "model.embed_tokens.weight" in weights
    assert "lm_head.weight" not in weights


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_workers_find_every_weight_in_the_shared_file(dtype):
    received = {}

    class Receiver:
        def begin(self, method, path, size, places):
            assert method == "load_file"
            whole = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
            received.update({place.name: view(whole, place).clone() for place in places})

        def end(self):
            return None

    sender, weights = SharedSender([Receiver()], dtype), named_weights(tied_model())
    for scale in (1.0, 3.0):  # the file is written again
        wanted = {name: weight * scale for name, weight in weights.items()}
        sender.send(wanted)
        assert received.keys() == wanted.keys()
        for name, weight in wanted.items():
            assert torch.equal(received[name], weight if dtype is None else weight.to(dtype))


@pytest.mark.parametrize(
    ("differs", "expected"),
    [
        ({}, True),
        ({"layers": None}, True),
        ({"layers": ["full_attention", "sliding_attention"]}, False),
        ({"window": 4096}, False),
        ({"is_hybrid": True}, False),
        ({"is_attention_free": True}, False),
        ({"is_encoder_decoder": True}, False),
    ],
    ids=str,
)
def test_prefixes_are_exact_by_themselves_only_where_every_layer_attends_to_all(differs, expected):
    layers, window = differs.pop("layers", ["full_attention"] * 2), differs.pop("window", None)
    kinds = dict.fromkeys(("is_hybrid", "is_attention_free", "is_encoder_decoder"), False)
    model = SimpleNamespace(
        hf_text_config=SimpleNamespace(layer_types=layers),
        get_sliding_window=lambda: window,
        **{**kinds, **differs},
    )
    assert attends_to_all(model) is expected


def test_vllm_logs_errors_to_standard_error_where_nobody_says_otherwise():
    with mock.patch.dict(os.environ, {"VLLM_LOGGING_LEVEL": "DEBUG"}):
        os.environ.pop("VLLM_LOGGING_STREAM", None)
        prepare_environment()
        assert os.environ["VLLM_LOGGING_STREAM"] == "ext://sys.stderr"
        assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
        del os.environ["VLLM_LOGGING_LEVEL"]
        prepare_environment()
        assert os.environ["VLLM_LOGGING_LEVEL"] == "ERROR"


def test_a_full_disk_is_an_error_and_the_next_update_works():
    sent = []

    class Receiver:
        def begin(self, method, path, size, places):
            del method, places
            sent.append((path, size, os.stat(path).st_blocks * 512 >= size))

        def end(self):
            return None

    sender, weights = SharedSender([Receiver()], None), {"w": torch.zeros(1_000_000)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))  # as a disk with one megabyte left
    try:
        with pytest.raises(PolicyError, match=r"no room for new weights: 4 MB in .*TMPDIR"):
            sender.send(weights)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    sender.send({"w": weights["w"][:10]})
    sender.send(weights)  # larger than the file so far
    assert [(size, roomy) for _, size, roomy in sent] == [(40, True), (4_000_000, True)]


def test_a_saved_model_is_one_of_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tied_model()
    save_model(model, str(tmp_path))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    for (name, weight), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(weight, other), name
    with pytest.raises(PolicyError, match="sampler=hf"):
        save_model(torch.nn.Linear(2, 2), str(tmp_path))
