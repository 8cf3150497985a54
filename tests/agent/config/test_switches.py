"""A switch that changes nothing is a bug: every option of every part is turned, and something must move."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.guess_env import GuessEnv
from helpers.learners import SHAPE, SmallGuesses, learner, sampled_batch
from helpers.watched_policy import WatchedPolicy

from at2po_agent.agents.model import build_model
from at2po_agent.collect import collect_trees
from at2po_agent.config.loading import load_config
from at2po_agent.config.sections import AlgorithmConfig
from at2po_agent.credit.registry import Credit, credit_rules
from at2po_agent.environments import TaskOrder
from at2po_agent.learning.learner import Objective
from at2po_agent.learning.reference import FILE, reference_learner, with_kl_in_reward
from at2po_agent.learning.step import give_credit
from at2po_agent.losses import get_loss, loss_names, make_loss
from at2po_agent.losses.base import LossTotals
from at2po_agent.packing.rows import pack_rows
from at2po_agent.packing.trees import pack_trees
from at2po_agent.rollout import RolloutConfig, rollout
from at2po_agent.runs.checkpoint import CheckpointError

TURNED = {
    "clip_low": 0.05,
    "clip_high": 0.05,
    "dual_clip": 1.1,
    "tau_positive": 0.3,
    "tau_negative": 0.3,
    "entropy_weight": 0.9,
}
CREDIT_TURNED = [
    ("tree", {"normalize": False}),
    *(("tree", {"value_mode": mode}) for mode in ("child_mean", "child_linear", "leaf_mean")),
    *(
        ("tree", {"advantage_mode": mode})
        for mode in ("diff_parent", "diff_global", "diff_localglobal", "group")
    ),
    ("group", {"normalization": "mean"}),
    ("group_shared", {"normalization": "mean"}),
    ("gigpo", {"gamma": 0.5}),
    ("gigpo", {"step_weight": 0.0}),
    ("gigpo", {"normalization": "mean"}),
    ("surprisal", {"beyond": 0.9}),
    ("surprisal", {"cap": 0.1}),
]


def value_and_gradient(name: str, options: dict[str, float]) -> list[float]:
    """Loss and gradient on tokens far from the old policy, with advantages of both signs."""
    generator = torch.Generator().manual_seed(0)
    shape = (4, 12)
    log_probs = (-torch.rand(shape, generator=generator)).requires_grad_()
    old = log_probs.detach() + 1.5 * torch.randn(shape, generator=generator)
    advantages = torch.randn(shape, generator=generator)
    turn_ids = torch.arange(12).div(4, rounding_mode="floor").repeat(4, 1)
    turn_ids[0, 6:] = -1  # branches of different lengths
    entropies = torch.rand(shape, generator=generator)
    extra = {}
    if get_loss(name).requires:
        extra = {"entropies": entropies, "totals": LossTotals.of(turn_ids, entropies)}
    loss, _ = make_loss(name, options)(log_probs, old, advantages, turn_ids, **extra)
    loss.backward()
    assert log_probs.grad is not None
    return [loss.item(), *log_probs.grad.flatten().tolist()]


BUILT_IN = [name for name in loss_names() if get_loss(name).function.__module__.startswith("at2po_agent.")]


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name in BUILT_IN for option in get_loss(name).options]
)
def test_every_option_of_every_loss_changes_it(name, option):
    other = {"token": "branch", "branch": "token"}
    turned = other[get_loss(name).options[option]] if option == "aggregation" else TURNED[option]
    assert value_and_gradient(name, {option: turned}) != value_and_gradient(name, {})


def tree():
    shape = RolloutConfig(chains=4, forks=3, rounds=2)
    grown = rollout([{"index": 4}], GuessEnv(), WatchedPolicy(), shape, seed=3)[0]
    assert len(set(grown.leaf_reward[grown.is_leaf])) > 1
    return grown


@pytest.mark.parametrize(("name", "options"), CREDIT_TURNED)
def test_every_option_of_every_credit_rule_changes_it(name, options):
    grown = tree()
    plain, turned = (credit_rules()[name](grown, **o).advantages for o in ({}, options))
    assert plain.shape != turned.shape or not np.allclose(plain[1:], turned[1:], atol=1e-9)


def test_all_credit_rules_differ():
    grown = tree()
    found = []
    for name in ("tree", "group", "group_shared", "gigpo", "surprisal"):
        credit = give_credit(grown, AlgorithmConfig(credit=name))
        found.append(pack_rows([grown], [credit.advantages]).advantages)
    for number, one in enumerate(found):
        assert all(not torch.allclose(one, other, atol=1e-5) for other in found[:number])


# KL to the reference ---------------------------------------------------------------------------------------


def kl_learner(**settings):
    chosen = Objective.of(AlgorithmConfig(loss="grpo", **settings))
    one = learner(build_model(SHAPE, seed=3))
    one.objective = chosen
    return one


def first_gradient(one, batch, ref):
    one.backward(batch, batch.sampled_log_probs, ref)
    return torch.cat([parameter.grad.flatten() for parameter in one.model.parameters()])


def test_a_kl_term_changes_the_gradient_and_its_estimator_counts():
    batch = sampled_batch(advantages="group")
    ref = batch.sampled_log_probs - 0.3
    plain = first_gradient(kl_learner(), batch, ref)
    found = [
        first_gradient(kl_learner(kl_weight=0.5, kl_estimator=estimator), batch, ref)
        for estimator in ("k1", "k2", "k3")
    ]
    for gradient in found:
        assert float((gradient - plain).norm() / plain.norm()) > 1e-3
    assert not torch.allclose(found[0], found[1])
    assert not torch.allclose(found[1], found[2])


def test_kl_in_the_loss_reaches_rows_without_advantage():
    assert Objective.of(AlgorithmConfig(loss="grpo")).needs_advantage
    assert not Objective.of(AlgorithmConfig(loss="grpo", kl_weight=0.1)).needs_advantage
    rewarded = Objective.of(AlgorithmConfig(loss="grpo", kl_weight=0.1, kl_place="reward"))
    assert rewarded.needs_advantage
    assert rewarded.kl_weight == 0.0


def test_kl_in_the_reward_is_the_sum_over_the_branch(tmp_path):
    shape = RolloutConfig(expansion="chains", chains=3, forks=0, rounds=0)
    trees = rollout([{"index": 1}, {"index": 2}], GuessEnv(), SmallGuesses(), shape, seed=0)
    frozen = reference_learner(kl_learner(), tmp_path, started=False)
    shaped = with_kl_in_reward(trees, frozen, weight=0.1, estimator="k1")
    batch = pack_rows(trees, [np.zeros(3), np.zeros(3)])
    ref = frozen.log_probs(batch)
    row = 0
    for before, after in zip(trees, shaped, strict=True):
        for leaf in before.leaves():
            trained = batch.turn_ids[row] >= 0
            kl = float((batch.sampled_log_probs[row] - ref[row])[trained].double().sum())
            assert after.leaf_reward[leaf] == pytest.approx(before.leaf_reward[leaf] - 0.1 * kl, abs=1e-5)
            assert kl != 0.0
            row += 1


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_in_the_reward_is_the_same_on_packs(tmp_path, estimator):
    shape = RolloutConfig(chains=4, forks=2, rounds=1)
    trees = rollout([{"index": 1}, {"index": 2}], GuessEnv(), SmallGuesses(), shape, seed=0)
    frozen = reference_learner(kl_learner(), tmp_path, started=False)
    by_row, by_pack = (
        with_kl_in_reward(trees, frozen, weight=0.1, estimator=estimator, pack=pack)
        for pack in (pack_rows, pack_trees)
    )
    for tree, row, pack in zip(trees, by_row, by_pack, strict=True):
        leaves = tree.is_leaf
        np.testing.assert_allclose(pack.leaf_reward[leaves], row.leaf_reward[leaves], atol=1e-5)
        assert (np.abs(pack.leaf_reward - tree.leaf_reward)[leaves] > 1e-3).all()


def test_the_reference_stays_where_training_began(tmp_path):
    one = kl_learner()
    frozen = reference_learner(one, tmp_path, started=False)
    batch = sampled_batch(advantages="group")
    before = frozen.log_probs(batch)
    one.update(batch, batch.sampled_log_probs)
    assert torch.equal(frozen.log_probs(batch), before)
    assert not torch.equal(one.log_probs(batch), before)
    again = reference_learner(one, tmp_path, started=True)  # a resumed run reads it
    assert torch.equal(again.log_probs(batch), before)
    (tmp_path / FILE).unlink()
    with pytest.raises(CheckpointError, match="restore the file"):
        reference_learner(one, tmp_path, started=True)


def opinionated_model():
    """Entropies that vary: among those of random weights, which do not, a z-score would amplify rounding."""
    model = build_model(SHAPE, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)
    return model


def test_entropy_and_kl_terms_do_not_depend_on_the_cut_into_micro_batches():
    batch = sampled_batch(advantages="group")
    old = learner(opinionated_model()).log_probs(batch)
    noise = torch.randn(old.shape, generator=torch.Generator().manual_seed(0))
    batch = replace(batch, sampled_log_probs=old + 0.01 * noise)
    found = []
    for budget in (10**6, 300, 100, 1):
        chosen = Objective.of(AlgorithmConfig(loss="aepo", kl_weight=0.5))
        one = learner(opinionated_model(), budget=budget)
        one.objective = chosen
        found.append(first_gradient(one, batch, old - 0.3 * noise))
    for cut in found[1:]:
        assert float((cut - found[0]).norm() / found[0].norm()) < 1e-6


# Filters and shaping ---------------------------------------------------------------------------------------


def collected(**algorithm):
    config = load_config("quickstart").model_copy(
        update={
            "algorithm": AlgorithmConfig(**algorithm),
            "rollout": RolloutConfig(expansion="chains", chains=2, forks=0, rounds=0),
            "train": load_config("quickstart").train.model_copy(update={"questions": 5}),
        }
    )
    order = TaskOrder(range(10), 0)
    return collect_trees(order, 0, GuessEnv(), WatchedPolicy(), config, step=1, on_leaf=lambda: None)


def test_dynamic_sampling_drops_what_teaches_nothing_and_asks_for_more():
    plain, informative = collected(), collected(keep="informative")
    assert len(plain.trees) == len(plain.sampled) == 5
    assert all(len(set(tree.leaf_reward[tree.is_leaf])) > 1 for tree in informative.trees)
    assert 5 < len(informative.sampled) <= 15
    assert len(collected(keep="informative", oversampling=1).sampled) == 5
    assert informative.tokens > plain.tokens  # what is dropped was paid for


def test_overlong_shaping_lowers_long_branches_only():
    shape = RolloutConfig(expansion="chains", chains=4, forks=0, rounds=0, max_response_tokens=30)
    tasks = [{"index": index} for index in range(4)]
    plain = rollout(tasks, GuessEnv(), WatchedPolicy(), shape, seed=0)
    for change in ({"overlong_share": 0.5}, {"overlong_share": 0.9, "overlong_factor": 3.0}):
        shaped = rollout(tasks, GuessEnv(), WatchedPolicy(), shape.model_copy(update=change), seed=0)
        lowered = [
            (len(a.branch_ids(leaf)) - len(a.prompt_ids), a.leaf_reward[leaf] - b.leaf_reward[leaf])
            for a, b in zip(plain, shaped, strict=True)
            for leaf in a.leaves()
        ]
        start = 30 - round(change["overlong_share"] * 30)
        assert any(drop > 0 for _, drop in lowered)
        assert all((drop > 0) == (length > start) for length, drop in lowered)


# Bad inputs ------------------------------------------------------------------------------------------------


def test_a_group_of_one_keeps_its_reward_and_is_refused_before_training(tmp_path):
    one = RolloutConfig(expansion="chains", chains=1, forks=0, rounds=0)
    (grown,) = rollout([{"index": 4}], GuessEnv(), WatchedPolicy(), one, seed=0)
    credit: Credit = credit_rules()["group"](grown)
    assert credit.advantages.tolist() == grown.leaf_reward[grown.is_leaf].tolist()
    file = tmp_path / "c.yaml"
    file.write_text("algorithm: grpo\nrollout: {chains: 1}\n")
    with pytest.raises(Exception, match="at least 2 leaves"):
        load_config(file)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_a_kl_weight_must_be_a_number_of_at_least_0(value):
    with pytest.raises(ValueError, match="kl_weight"):
        AlgorithmConfig(kl_weight=value)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["rollout.expansion=tree_grpo", "rollout.chains=4", "rollout.forks=3"],
            "multiple of rollout.chains",
        ),
        (["algorithm.credit=tree_grpo"], "use rollout.expansion=tree_grpo"),
        (["rollout.expansion=arpo", "rollout.rounds=0"], "no leaf left to branch for"),
        (["rollout.expansion_options.penalti=paper"], "did you mean penalty"),
        (
            ["rollout.expansion=chains", "algorithm.credit_options.advantage_mode=diff_parent"],
            "whose turns have one value",
        ),
        (["algorithm.loss_options.clip_low=-0.1"], "at least 0"),
        (["algorithm.kl_estimator=k4"], "'k1', 'k2' or 'k3'"),
        (["algorithm.loss=gppp"], "did you mean gppo"),
        (["rollout.signal.kind=both"], "'paper' or 'released'"),
    ],
)
def test_senseless_settings_are_refused_with_a_reason(lines, message):
    with pytest.raises(Exception, match=message):
        load_config("quickstart", lines)


def test_a_preset_of_the_command_line_takes_the_files_switches_off(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "algorithm: t2po\nrollout: {overlong_share: 0.5, max_turn_tokens: 77, "
        "thinking: {enabled: true, window: 7}, resampling: {enabled: true}}\n"
    )
    own, other = load_config(file).rollout, load_config(file, ["algorithm=grpo"]).rollout
    assert own.thinking.enabled
    assert own.resampling.enabled
    assert not other.thinking.enabled
    assert not other.resampling.enabled
    assert (own.overlong_share, other.overlong_share) == (0.5, 0.0)
    assert (other.max_turn_tokens, other.thinking.window) == (77, 7)


def test_a_preset_of_the_command_line_keeps_the_number_of_leaves():
    for name, shape in {"tree_grpo": (4, 8, 1), "arpo": (6, 6, 1), "grpo": (6, 3, 2)}.items():
        rolled = load_config("quickstart", [f"algorithm={name}"]).rollout
        assert (rolled.chains, rolled.forks, rolled.rounds) == shape
        assert rolled.leaves == 12
