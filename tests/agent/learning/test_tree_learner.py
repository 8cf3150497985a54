"""A step's learning: where old log-probs come from, what is measured, and what waits for the device."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.forests import loss_learner, tiny_model
from helpers.guess_env import GuessEnv
from helpers.learners import SHAPE, SmallGuesses

from at2po_agent.agents.model import build_model
from at2po_agent.config.sections import Config
from at2po_agent.learning.learner import weight_change
from at2po_agent.learning.step import TreeLearner, give_credit, next_clip_scale
from at2po_agent.packing import trees as packing_trees
from at2po_agent.packing.prefixes import lay_out
from at2po_agent.packing.rows import pack_rows
from at2po_agent.packing.tree_attention.flex import block_mask
from at2po_agent.packing.trees import check_model, pack_trees
from at2po_agent.policies.hf.policy import HFPolicy
from at2po_agent.rollout import RolloutConfig, rollout
from at2po_agent.runs.progress import Clock
from at2po_agent.tree import Tree
from at2po_agent.types import Turn
from at2po_env.errors import ConfigError


class Imprecise(HFPolicy):
    """Reports other log-probs than it sampled with, as a sampler with other number formats would."""

    noise = 0.0

    def generate(self, requests):
        return [self.blur(generation) for generation in super().generate(requests)]

    def poll(self):
        return [(ticket, self.blur(generation)) for ticket, generation in super().poll()]

    def blur(self, generation):
        rng = np.random.default_rng(generation.ids)
        noise = self.noise * rng.normal(size=len(generation.ids)).astype(np.float32)
        return type(generation)(
            generation.ids, generation.log_probs + noise, generation.stop_reason, generation.sampled
        )


def learn(tmp_path: Path, *, noise: float, steps: int = 1, reward: float | None = None, **train):
    """Figures of some steps on the same trees, and what a person was told."""
    model = build_model(SHAPE, seed=3)
    policy = Imprecise(model, SmallGuesses.tokenizer, slots=32)
    policy.noise = noise
    shape = RolloutConfig(chains=8, forks=2, rounds=1, max_turn_tokens=2, max_response_tokens=60)
    trees = rollout([{"index": i} for i in range(10)], GuessEnv(), policy, shape, seed=1)
    if reward is not None:
        trees = [tree.with_leaf_rewards(np.full(len(tree.leaves()), reward)) for tree in trees]
    values = {"questions": 10, "minibatch_questions": 5, "old_log_probs": "recompute", **train}
    config = Config.model_validate(
        {"train": values, "optimizer": {"lr": 1e-9, "weight_decay": 0.0}, "algorithm": {"loss": "atpo"}}
    )
    credits = [give_credit(tree, config.algorithm) for tree in trees]
    said: list[str] = []
    one = TreeLearner(model, config, tmp_path, said.append)
    return [one.learn(trees, credits, step=step + 1, clock=Clock()) for step in range(steps)], said


@pytest.mark.parametrize("packing", ["tree", "rows"])
def test_an_exact_sampler_differs_by_rounding_alone(tmp_path, packing):
    for source in ("recompute", "sampler", "auto"):
        ((figures,), said) = learn(tmp_path, noise=0.0, old_log_probs=source, packing=packing)
        assert figures["mismatch/max_difference"] < 1e-4
        assert 0 <= figures["mismatch/kl_k3"] < 1e-9
        assert figures["mismatch/warning"] == 0
        assert said == []


@pytest.mark.parametrize("packing", ["tree", "rows"])
def test_the_mismatch_is_that_of_the_sampler_wherever_old_log_probs_come_from(tmp_path, packing):
    # noise N(0, s^2) in log pi_s: E[k3] = e^(s^2 / 2) - 1 = s^2 / 2 for small s, E|d| = s sqrt(2 / pi)
    figures = {
        source: learn(tmp_path, noise=0.2, old_log_probs=source, packing=packing)[0][0]
        for source in ("recompute", "sampler", "auto")
    }
    for found in figures.values():
        assert found["mismatch/kl_k3"] == pytest.approx(0.02, rel=0.4)
        assert found["mismatch/mean_difference"] == pytest.approx(0.16, rel=0.2)
    whole = figures["recompute"]["mismatch/tokens"]
    assert figures["auto"]["mismatch/tokens"] == whole  # a sampler that is off is recomputed
    # with `sampler`: branches of the first minibatch that have an advantage
    assert 0 < figures["sampler"]["mismatch/tokens"] <= whole / 2


def test_without_any_advantage_a_micro_batch_is_measured(tmp_path):
    ((figures,), _) = learn(tmp_path, noise=0.2, old_log_probs="sampler", reward=0.0)
    assert figures["mismatch/mean_difference"] == pytest.approx(0.16, rel=0.2)


def test_a_person_is_warned_once_and_the_metrics_every_time(tmp_path):
    figures, said = learn(tmp_path, noise=0.3, steps=3)
    assert [step["mismatch/warning"] for step in figures] == [1, 1, 1]
    assert len(said) == 1
    assert "step 1: sampler and learner differ by a KL of 0.0" in said[0]
    figures, said = learn(tmp_path, noise=0.3, mismatch_warning=1.0)
    assert (figures[0]["mismatch/warning"], said) == (0, [])


def test_importance_weights_change_the_step_where_the_sampler_is_off(tmp_path):
    plain, weighed, tight = (learn(tmp_path, noise=0.3, importance_cap=cap)[0][0] for cap in (None, 5.0, 1.0))
    assert "importance/mean" not in plain
    assert weighed["importance/capped"] == 0.0
    assert 0.2 < tight["importance/capped"] < 0.8
    assert tight["importance/mean"] < 1.0
    norms = {figures["grad_norm"] for figures in (plain, weighed, tight)}
    assert len(norms) == 3


def test_importance_weights_change_nothing_where_the_sampler_is_exact(tmp_path):
    plain, weighed = (
        learn(tmp_path, noise=0.0, importance_cap=cap, old_log_probs="auto")[0][0] for cap in (None, 1.0)
    )
    assert weighed["importance/mean"] == 1.0
    assert {name: value for name, value in weighed.items() if name in plain} == plain


def test_weights_need_recomputed_log_probs():
    with pytest.raises(ValueError, match="importance_cap compares recomputed"):
        Config.model_validate({"train": {"importance_cap": 2.0, "old_log_probs": "sampler"}})


# Nothing waits for the device ------------------------------------------------------------------------------


@pytest.fixture
def far_device(monkeypatch):
    """Tensors on `meta` have no data: whatever wants to read one (item, nonzero, a mask as index) fails."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # knows no meta
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    # What transformers itself reads in a forward pass of rows (`learner`'s docstring says so).
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda _: None)

    def model():
        made = tiny_model(dtype=torch.float32).to("meta")
        packing_trees._LINEAR_HEAD[made] = True
        return made

    return model


def forest():
    trees = []
    for seed in range(3):
        rng, tree = np.random.default_rng(seed), Tree([1, 2, 3])
        first = tree.add(0, Turn((), (4, 5), np.array([-1.0, -2.0]), None, "", "", 1.5, "stop"))
        for reward in (0.0, 1.0):
            ids = tuple(rng.integers(3, 10, size=3).tolist())
            mask = np.array([True, False, True])
            tree.close(tree.add(first, Turn((6,), ids, -rng.random(3), mask, "", "", 0.5, "stop")), reward)
        trees.append(tree)
    return trees, [np.array([0.0, 0.5, 1.0, -1.0])] * 3


@pytest.mark.parametrize("pack", [pack_rows, pack_trees])
@pytest.mark.parametrize("name", ["atpo", "grpo", "gspo", "sapo", "aepo"])
def test_an_update_reads_nothing_from_the_device(far_device, pack, name):
    trees, advantages = forest()
    batch, one = pack(trees, advantages), loss_learner(far_device(), name, 20)
    assert len(list(batch.micro_batches(20))) > 1
    old = batch.sampled_log_probs
    figures = one.backward(batch, old, old)
    assert all(figure.device.type == "meta" for figure in figures.values())
    assert all(parameter.grad is not None for parameter in one.model.parameters())
    assert one.log_probs(batch).device.type == "meta"
    norm = torch.nn.utils.clip_grad_norm_(one.model.parameters(), 1.0)
    assert norm.device.type == "meta"
    weights = list(one.model.parameters())
    assert weight_change([weight.detach().clone() for weight in weights], weights).device.type == "meta"


def test_a_loss_that_does_read_is_caught(far_device):
    trees, advantages = forest()

    def reading_loss(log_probs, old_log_probs, advantages, turn_ids, *, totals=None):
        del old_log_probs, totals
        return -(advantages * log_probs)[turn_ids >= 0].sum(), {}

    one = loss_learner(far_device(), "atpo", 20)
    one.objective = one.objective._replace(loss=reading_loss, kl_weight=0.0)
    batch = pack_trees(trees, advantages)
    with pytest.raises(NotImplementedError, match="nonzero"):
        one.backward(batch, batch.sampled_log_probs)


def test_the_mask_of_a_gpu_is_made_on_the_host():
    layout = lay_out(np.array([200, 180, 150]), np.array([0, 100, 50]))
    assert block_mask(layout, torch.device("meta")).kv_num_blocks.device.type == "meta"


def test_rows_on_the_device_know_their_trained_tokens_from_the_host():
    trees, advantages = forest()
    batch = pack_rows(trees, advantages)
    places = batch.to("meta").places
    assert places is not None
    assert places.shape == (int((batch.turn_ids >= 0).sum()),)
    flat = batch.find_places()
    assert (batch.turn_ids.flatten()[flat] >= 0).all()


def test_an_unfit_model_says_why_rows_are_taken(tmp_path):
    class Opaque(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build_model(SHAPE, seed=3)

        def forward(self, input_ids):
            return self.inner(input_ids=input_ids)

    said: list[str] = []
    TreeLearner(Opaque(), Config(), tmp_path, said.append)
    assert said
    assert said[0].startswith("training on rows: ")
    with pytest.raises(ConfigError):
        check_model(Opaque())


@pytest.mark.parametrize(
    ("clipped", "scale"),
    [(0.1, 2.0), (0.2, 2.0 * 2**0.5), (0.05, 2.0 / 2**0.5), (0.9, 4.0), (0.0, 1.0)],
)
def test_bounds_move_towards_the_share_at_most_twofold(clipped, scale):
    assert next_clip_scale(2.0, clipped, 0.1) == pytest.approx(scale)
