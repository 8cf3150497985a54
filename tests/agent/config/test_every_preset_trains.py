"""Each algorithm takes real steps: rollout, credit, packing, loss, reference, checkpoint, resume."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import learners
from helpers.guess_env import GuessEnv, SmallTokenizer

from at2po_agent.agents.agent import Agent
from at2po_agent.agents.model import build_model
from at2po_agent.config.loading import load_config
from at2po_agent.config.presets import PRESETS
from at2po_agent.learning.reference import FILE
from at2po_agent.policies.hf.policy import HFPolicy
from at2po_agent.run import run_training

SHAPE = replace(learners.SHAPE, layers=1)

CONFIG = """
env: {id: GuessEnv}
eval: {questions: 0}
rollout: {chains: 2, forks: 2, rounds: 2, max_turn_tokens: 2, max_response_tokens: 60}
optimizer: {lr: 0.01}
train: {steps: 2, questions: 6, minibatch_questions: 2, save_every: 1, save_trees_every: 1}
"""


class CountedTokenizer(SmallTokenizer):
    def __len__(self) -> int:
        return len(self.alphabet)


def guessing_model(seed: int) -> torch.nn.Module:
    """Mostly writes a digit and then the mark, so that episodes have several turns and differ."""
    model = build_model(SHAPE, seed=seed, eos_id=SmallTokenizer.eos_id)
    ids = SmallTokenizer.alphabet.index
    bias = torch.full((SHAPE.vocab_size,), -9.0)
    bias[[ids(digit) for digit in "0123456789"]] = 0.0
    bias[ids("!")] = 2.0
    model.lm_head = torch.nn.Linear(SHAPE.hidden_size, SHAPE.vocab_size)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(seed))
        model.lm_head.bias.copy_(bias)
    return model


def make_agent(config) -> Agent:
    model = guessing_model(config.run.seed)
    return Agent(model, HFPolicy(model, CountedTokenizer(), slots=32))


def train(tmp_path, *lines: str, resume: bool = False):
    file = tmp_path / "c.yaml"
    file.write_text(CONFIG)
    config = load_config(file, [f"run.dir={tmp_path / 'run'}", *lines])
    run_training(config, agent=make_agent, env=GuessEnv(), eval_env=GuessEnv(), resume=resume)
    text = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, text) if record["kind"] == "train"]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains(name, tmp_path):
    records = train(tmp_path, f"algorithm={name}")
    assert [record["step"] for record in records] == [1, 2]
    assert any(record.get("grad_norm", 0.0) > 0 for record in records)
    assert ((tmp_path / "run" / FILE).exists()) == (PRESETS[name].kl_weight > 0)


@pytest.mark.parametrize(
    "lines",
    [
        ["algorithm=grpo", "algorithm.loss=atpo"],
        ["algorithm=gigpo", "algorithm.loss=gspo", "rollout.expansion=entropy"],
        ["algorithm=arpo", "algorithm.credit=tree", "algorithm.loss=atpo"],
        ["algorithm=tree_grpo", "algorithm.loss=aepo"],
        ["algorithm=at2po", "algorithm.keep=informative", "rollout.overlong_share=0.5"],
        ["algorithm=at2po", "algorithm.kl_weight=0.1", "algorithm.kl_place=reward"],
        ["algorithm=at2po", "rollout.resampling.enabled=true", "algorithm.kl_weight=0.1"],
    ],
    ids=lambda lines: " ".join(lines),
)
def test_parts_of_different_algorithms_train_together(lines, tmp_path):
    assert any(record.get("grad_norm", 0.0) > 0 for record in train(tmp_path, *lines))


def test_a_resumed_run_measures_its_kl_from_the_same_reference(tmp_path):
    lines = ["algorithm=grpo", "algorithm.kl_weight=1.0"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    expected = train(whole, *lines)
    train(parts, *lines, "train.steps=1")
    resumed = train(parts, *lines, resume=True)
    assert resumed[1]["ref_kl"] == expected[1]["ref_kl"] > 0
