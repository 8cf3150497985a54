"""Low-rank adapters: what learns, what is sampled with, what is saved, and what is merged."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from helpers import learners
from helpers.guess_env import GuessEnv, SmallTokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from at2po_agent.agents.agent import Agent
from at2po_agent.agents.model import add_adapters, build_model, load_model, without_adapters
from at2po_agent.config.loading import load_config
from at2po_agent.config.sections import Config, LoraConfig
from at2po_agent.evaluation.target import evaluate_policy, evaluation_config, open_policy
from at2po_agent.integrations.export import export_run
from at2po_agent.learning.reference import FILE, reference_learner
from at2po_agent.policies.base import Request
from at2po_agent.policies.hf.policy import HFPolicy
from at2po_agent.policies.vllm import VLLMPolicy
from at2po_agent.policies.vllm.config import VLLMConfig
from at2po_agent.policies.weights import adapter_weights, base_weights, merged_weights
from at2po_agent.run import plan_run, run_training
from at2po_agent.runs.checkpoint import CheckpointError, load_checkpoint
from at2po_agent.runs.progress import Progress
from at2po_env.errors import ConfigError

SHAPE = replace(learners.SHAPE, layers=1)
IDS = torch.arange(2, 12)[None]


def adapted(config: LoraConfig | None = None, *, seed: int = 5, learnt: bool = False) -> Any:
    """A small model with adapters; learnt ones have a B of their own."""
    config = config or LoraConfig(rank=2)
    model = add_adapters(build_model(SHAPE, seed=3, eos_id=SmallTokenizer.eos_id), config, seed=seed)
    if learnt:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in adapter_weights(model).values():
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=IDS).logits
    return result


# The model -------------------------------------------------------------------------------------------------


def test_fresh_adapters_change_nothing_and_they_alone_learn():
    before = torch.random.get_rng_state()
    model = adapted()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(logits(model), logits(build_model(SHAPE, seed=3)))
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {name for name, _ in model.named_parameters() if ".lora_" in name}
    # 7 matrices in the only layer: 4 of attention, 3 of the feed-forward layer; A and B of each.
    assert len(learning) == 2 * 7
    same, other = adapter_weights(adapted()), adapter_weights(adapted(seed=6))
    for name, tensor in adapter_weights(model).items():
        assert torch.equal(tensor, same[name])
        assert torch.equal(tensor, other[name]) == ("lora_B" in name)


def test_merged_weights_are_those_of_the_formula_and_of_peft():
    model = adapted(LoraConfig(rank=2, alpha=3.0, targets=["q_proj", "up_proj"]), learnt=True)
    base, own, merged = base_weights(model), adapter_weights(model), merged_weights(model)
    assert merged.keys() == base.keys()
    for name, weight in merged.items():
        if ".q_proj." not in name and ".up_proj." not in name:
            assert torch.equal(weight, base[name])
            continue
        a, b = (own[f"base_model.model.{name.removesuffix('.weight')}.lora_{one}.weight"] for one in "AB")
        product = 3.0 / 2 * b.double() @ a.double()  # W + alpha / rank * B A
        torch.testing.assert_close(weight.double(), base[name].double() + product, atol=1e-6, rtol=1e-6)
        assert float(product.abs().max()) > 0.01
    expected = logits(model)
    plain = build_model(SHAPE, seed=3)
    plain.load_state_dict(merged, strict=False)
    torch.testing.assert_close(logits(plain), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(build_model(SHAPE, seed=3)), expected, atol=1e-2)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ["qq_proj"],
            r"got \['qq_proj'\], expected all-linear or names of linear layers: down_proj, gate_proj",
        ),
        (["q_proj", "lm_head"], "which has an embedding"),
        (["embed_tokens"], "which has an embedding"),
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_targets_that_take_no_adapters_are_refused(targets, message):
    with pytest.raises(ConfigError, match=message):
        adapted(LoraConfig(targets=targets))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["model.lora.rank=8", "model.vllm.lora_rank=4"],
            r"vllm\.lora_rank \(4\) is smaller than lora\.rank \(8\)",
        ),
        (
            ["model.lora.rank=8", "model.vllm.lora_rank=8", "cold_start.steps=3"],
            "cold_start changes the weights",
        ),
        (["model.lora.rank=0"], r"model\.lora\.rank.*got 0"),
        (["model.lora.rnk=8"], r"model\.lora\.rnk.*unknown key"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        load_config("quickstart", ["cold_start.steps=0", *settings])


def test_the_plan_counts_what_learns():
    small = ["model.path=null", "model.lora.rank=4", "model.lora.targets=[q_proj]"]
    plan = plan_run(load_config("quickstart", [*small, "model.dtype=bfloat16"]))
    # 3 layers, q_proj 128 x 128: A and B of rank 4.
    assert plan["trained_parameters"] == 3 * 4 * (128 + 128)
    assert plan["gradients_gb"] < plan["weights_gb"] or plan["weights_gb"] == 0.0
    assert plan["parameters"] > 100 * plan["trained_parameters"]


# Learning and sampling -------------------------------------------------------------------------------------


def test_the_sampler_uses_the_adapters():
    model = adapted(learnt=True)
    requests = [Request((3 + n, 4, 5), 6, seed=n) for n in range(4)]
    found = HFPolicy(model, SmallTokenizer(), slots=4).generate(requests)
    with torch.no_grad():
        for request, generation in zip(requests, found, strict=True):
            ids = torch.tensor([[*request.prefix_ids, *generation.ids]])
            start, chosen = len(request.prefix_ids) - 1, torch.tensor(generation.ids)[:, None]
            for given, same in ((model, True), (build_model(SHAPE, seed=3), False)):
                expected = given(input_ids=ids).logits[0, start:-1].log_softmax(-1).gather(1, chosen)[:, 0]
                assert np.allclose(generation.log_probs, expected.numpy(), atol=1e-4) == same


def gradient(config: LoraConfig, *, seed: int = 0) -> torch.Tensor:
    batch = learners.sampled_batch(advantages="group")
    one = learners.learner(adapted(config, learnt=True))
    old = one.log_probs(batch)
    assert torch.equal(old, one.log_probs(batch))  # nothing is left out where nothing learns
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        one.backward(batch, old)
    assert not one.model.training
    assert torch.equal(old, one.log_probs(batch))
    return torch.cat([p.grad.flatten() for p in one.model.parameters() if p.grad is not None])


def test_every_setting_of_adapters_changes_the_gradient():
    plain = gradient(LoraConfig(rank=2))
    assert torch.equal(gradient(LoraConfig(rank=2), seed=1), plain)
    assert gradient(LoraConfig(rank=3)).shape != plain.shape
    assert gradient(LoraConfig(rank=2, targets=["v_proj"])).shape != plain.shape
    assert not torch.allclose(gradient(LoraConfig(rank=2, alpha=5.0)), plain)
    left_out = LoraConfig(rank=2, dropout=0.5)
    dropped = gradient(left_out)
    assert not torch.allclose(dropped, plain)
    assert torch.equal(gradient(left_out), dropped)
    assert not torch.allclose(gradient(left_out, seed=1), dropped)


def test_the_reference_is_the_same_model_without_its_adapters(tmp_path):
    batch = learners.sampled_batch()
    one = learners.learner(adapted(learnt=True))
    frozen = reference_learner(one, tmp_path, started=False)
    assert frozen.model is one.model  # no second copy of the weights
    assert not (tmp_path / FILE).exists()
    expected = learners.learner(build_model(SHAPE, seed=3)).log_probs(batch)
    assert torch.equal(frozen.log_probs(batch), expected)
    own = one.log_probs(batch)
    assert not torch.allclose(own, expected, atol=1e-2)
    one.update(batch, own, frozen.log_probs(batch))
    assert not torch.equal(one.log_probs(batch), own)
    assert torch.equal(frozen.log_probs(batch), expected)
    assert all(p.requires_grad == (".lora_" in name) for name, p in one.model.named_parameters())


def test_engines_of_vllm_get_merged_weights_unless_they_serve_adapters():
    policy, sent, model = VLLMPolicy.__new__(VLLMPolicy), dict[str, torch.Tensor](), adapted(learnt=True)
    policy.model, policy._send_weights = model, sent.update
    policy.config = VLLMConfig()
    policy._send()
    expected = merged_weights(model)
    assert sent.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in sent.items())
    sent.clear()
    folders: list[set[str]] = []
    policy.config = VLLMConfig(lora_rank=2)
    policy._send_adapter = lambda path: folders.append({file.name for file in Path(path).iterdir()})
    policy._send()
    assert not sent
    assert {"adapter_config.json", "adapter_model.safetensors"} <= folders[0]


# Runs ------------------------------------------------------------------------------------------------------


def make_agent(config: Config) -> Agent:
    assert config.model.lora is not None
    model = add_adapters(
        build_model(SHAPE, seed=config.run.seed, eos_id=SmallTokenizer.eos_id), config.model.lora, seed=1
    )
    return Agent(model, HFPolicy(model, SmallTokenizer(), slots=32))


def settings(folder: Path, **train: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"dir": str(folder), "name": "guess", "seed": 1},
            "env": {"id": "GuessEnv"},
            "eval": {"questions": 4},
            "model": {"lora": {"rank": 2, "dropout": 0.2}},
            "algorithm": {"kl_weight": 0.05},
            "rollout": {
                "chains": 4,
                "forks": 2,
                "rounds": 1,
                "max_turn_tokens": 2,
                "max_response_tokens": 60,
            },
            "optimizer": {"lr": 3e-2},
            "train": {"steps": 4, "questions": 4, "minibatch_questions": 2, "save_every": 1, **train},
        }
    )


def train(config: Config, **options: Any) -> dict[str, Any]:
    return run_training(config, agent=make_agent, env=GuessEnv(), eval_env=GuessEnv(), **options)


def steps(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in one.items() if not key.startswith("seconds")} for one in found]


class Killed(BaseException):
    """Ends a run as a kill does."""


class KillAfter(Progress):
    def __init__(self, step: int) -> None:
        self._last = step

    def step(self, record):
        if record["step"] == self._last:
            raise Killed


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(settings(folder))
    return folder


def test_a_run_trains_and_saves_its_adapters_alone(whole_run):
    assert not (whole_run / FILE).exists()
    checkpoint = whole_run / "checkpoints" / "step_000004"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert "model.safetensors" not in names
    base, first = load_file(whole_run / "base" / "model.safetensors"), build_model(SHAPE, seed=1).state_dict()
    assert all(torch.equal(tensor, first[name]) for name, tensor in base.items())
    learnt = load_file(checkpoint / "adapter_model.safetensors")
    assert all(float(tensor.abs().max()) > 0 for tensor in learnt.values())
    summary = json.loads((whole_run / "summary.json").read_text())
    assert summary["trained_parameters"] == sum(tensor.numel() for tensor in learnt.values())
    assert summary["parameters"] - summary["trained_parameters"] == sum(t.numel() for t in base.values())
    # Old log-probs are recomputed: in all steps the sampler agrees with the learner, adapters included.
    trained = [record for record in steps(whole_run) if record["kind"] == "train"]
    assert all(record["mismatch/max_difference"] < 1e-4 for record in trained)
    assert trained[-1]["ref_kl"] > 1e-6


@pytest.mark.parametrize("packing", ["rows", "tree"])
def test_a_resumed_run_is_the_uninterrupted_one(whole_run, tmp_path, packing):
    whole = whole_run
    if packing == "rows":
        whole = tmp_path / "whole"
        train(settings(whole, packing="rows"))
    stopped = tmp_path / "stopped"
    with pytest.raises(Killed):
        train(settings(stopped, packing=packing), progress=KillAfter(3))
    train(settings(stopped, packing=packing), resume=True)
    file = Path("checkpoints") / "step_000004" / "adapter_model.safetensors"
    assert (stopped / file).read_bytes() == (whole / file).read_bytes()
    assert steps(stopped) == steps(whole)


def test_a_changed_base_or_another_shape_is_refused(whole_run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(whole_run, copy)
    checkpoint, base = copy / "checkpoints" / "step_000004", copy / "base" / "model.safetensors"
    model = adapted()
    load_checkpoint(checkpoint, model=model)  # a run that was moved
    first = build_model(SHAPE, seed=1).state_dict()
    assert all(torch.equal(tensor, first[name]) for name, tensor in base_weights(model).items())
    with pytest.raises(CheckpointError, match="do not fit this model"):
        load_checkpoint(checkpoint, model=adapted(LoraConfig(rank=3)))
    with pytest.raises(CheckpointError, match="do not fit this model"):
        load_checkpoint(checkpoint, model=build_model(SHAPE, seed=1))
    damaged = bytearray(base.read_bytes())
    damaged[-1] ^= 1
    base.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"base/model\.safetensors: its content has changed"):
        load_checkpoint(checkpoint, model=adapted())
    base.unlink()
    with pytest.raises(CheckpointError, match=r"base/model\.safetensors: missing"):
        load_checkpoint(checkpoint, model=adapted())


SMALL = [
    *("cold_start.steps=30", "cold_start.demonstrations=60", "train.steps=2", "train.questions=2"),
    *("train.minibatch_questions=1", "train.save_every=1", "eval.questions=4", "eval.every=0"),
    *("rollout.chains=2", "rollout.forks=1", "rollout.rounds=1", "rollout.max_turn_tokens=8"),
    *("model.hidden_size=32", "model.layers=1", "model.ffn_size=32", "run.threads=1"),
    *("optimizer.lr=0.05", "rollout.overlong_share=0.99"),  # rewards differ by length, so that it learns
]
LORA = ["model.lora.rank=4", "model.lora.targets=[q_proj,down_proj]"]


@pytest.fixture(scope="module")
def cold_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cold") / "run"
    run_training(load_config("quickstart", [*SMALL, *LORA, f"run.dir={folder}"]))
    return folder


@pytest.mark.slow
def test_a_cold_start_trains_all_weights_as_without_adapters(cold_run, tmp_path):
    run_training(load_config("quickstart", [*SMALL, "train.steps=0", f"run.dir={tmp_path / 'full'}"]))
    full = load_file(tmp_path / "full" / "checkpoints" / "step_000000" / "model.safetensors")
    base = load_file(cold_run / "base" / "model.safetensors")
    assert base.keys() == full.keys()
    assert all(torch.equal(tensor, full[name]) for name, tensor in base.items())


@pytest.mark.slow
def test_a_run_with_a_cold_start_resumes_from_its_own_base(cold_run, tmp_path):
    config = load_config("quickstart", [*SMALL, *LORA, f"run.dir={tmp_path / 'run'}"])
    with pytest.raises(Killed):
        run_training(config, progress=KillAfter(2))
    run_training(config, resume=True)
    assert steps(tmp_path / "run") == steps(cold_run)
    file = Path("checkpoints") / "step_000002" / "adapter_model.safetensors"
    assert all(float(tensor.abs().max()) > 0 for tensor in load_file(cold_run / file).values())
    assert (tmp_path / "run" / file).read_bytes() == (cold_run / file).read_bytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_exports_and_evaluations_have_the_adapters_merged(cold_run, tmp_path):
    checkpoint = cold_run / "checkpoints" / "step_000002"
    folder = export_run(cold_run, tmp_path / "model").folder
    assert not list(folder.glob("adapter*"))
    given: Any = AutoModelForCausalLM.from_pretrained(folder)
    base: Any = AutoModelForCausalLM.from_pretrained(cold_run / "base")
    with_adapters = peft.PeftModel.from_pretrained(base, str(checkpoint))
    torch.testing.assert_close(logits(given), logits(with_adapters), atol=1e-5, rtol=1e-5)
    with with_adapters.disable_adapter():
        assert not torch.allclose(logits(given), logits(with_adapters), atol=1e-2)

    config = evaluation_config(str(cold_run), [])
    assert config.model.lora is None
    with open_policy(config) as policy:
        assert type(policy.model).__name__ == "Qwen3ForCausalLM"
        figures = evaluate_policy(config, policy, Progress())
    measured = [record for record in steps(cold_run) if record["kind"] == "eval" and record["step"] == 2]
    for record in measured:
        for name in ("questions", "f1", "reward", "tokens"):
            assert figures[record["mode"]][name] == pytest.approx(record[name])
    assert {record["mode"] for record in measured} == {"greedy", "sampled"}


@pytest.mark.slow
def test_a_run_from_a_model_keeps_no_copy_of_it(cold_run, tmp_path):
    start = export_run(cold_run, tmp_path / "start").folder
    own = [f"model.path={start}", "model.special_tokens=[]", "cold_start.steps=0", "train.steps=1"]
    run = tmp_path / "run"
    run_training(load_config("quickstart", [*SMALL, *LORA, *own, f"run.dir={run}"]))
    assert not (run / "base").exists()
    checkpoint = run / "checkpoints" / "step_000001"
    assert json.loads((checkpoint / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        start
    )
    # transformers and peft find the model by themselves, and load_model merges.
    theirs: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
    merged = load_model(checkpoint)
    torch.testing.assert_close(logits(merged), logits(theirs), atol=1e-5, rtol=1e-5)
    assert not torch.equal(logits(merged), logits(load_model(start)))


def test_without_adapters_gives_the_model_itself_or_its_base():
    plain, model = build_model(SHAPE, seed=3), adapted(learnt=True)
    with without_adapters(plain) as same:
        assert same is plain
    with without_adapters(model) as base:
        assert torch.equal(logits(base), logits(plain))
        learning = {name for name, parameter in base.named_parameters() if parameter.requires_grad}
        assert learning == {name for name, _ in base.named_parameters() if ".lora_" not in name}
    assert not torch.allclose(logits(model), logits(plain), atol=1e-2)
    assert all(p.requires_grad == (".lora_" in name) for name, p in model.named_parameters())
