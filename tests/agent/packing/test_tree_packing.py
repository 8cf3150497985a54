from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.forests import (
    FAMILIES,
    as_rows,
    gradient,
    loss_learner,
    random_forest,
    tiny_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from at2po_agent.agents.model import add_adapters
from at2po_agent.config.sections import LoraConfig
from at2po_agent.learning.learner import checkpoint_activations
from at2po_agent.losses import loss_names, make_loss
from at2po_agent.packing.prefixes import Layout, lay_out
from at2po_agent.packing.rows import pack_rows
from at2po_agent.packing.tree_attention import tree_attention
from at2po_agent.packing.trees import check_model, pack_trees
from at2po_agent.policies.weights import adapter_weights
from at2po_agent.tree import Tree
from at2po_agent.types import Turn
from at2po_env.errors import ConfigError

SEEDS = st.integers(0, 10**6)


def make_turn(seen: tuple[int, ...], action: tuple[int, ...], sampled: list[bool] | None = None) -> Turn:
    mask = None if sampled is None else np.array(sampled)
    return Turn(seen, action, np.array(action) / -10, mask, "", "", 0.5, "stop")


def make_tree() -> Tree:
    """Prompt 1 2; turn 1 writes 3 4; then 5 is seen and 6 7 (7 forced), 6 8 or 9 is written."""
    tree = Tree([1, 2])
    first = tree.add(0, make_turn((), (3, 4)))
    for action, mask in (((6, 7), [True, False]), ((6, 8), None), ((9,), None)):
        tree.close(tree.add(first, make_turn((5,), action, mask)), 1.0)
    return tree


def test_both_forms_tell_the_tree_and_the_cost_of_branches():
    forest = [make_tree(), make_tree()]  # the second repeats the first, and is a tree of its own all the same
    given = [np.zeros(5)] * 2
    rows, packed = pack_rows(forest, given), pack_trees(forest, given)
    assert rows.trees.tolist() == packed.trees.tolist() == [0, 0, 0, 1, 1, 1]
    # Branches of 7, 7 and 6 tokens; 1 to 6 are shared by two of them, 1 to 5 by all three.
    for branches, as_rows_cost, as_tree_cost in (([0, 1, 2], 20, 9), ([3, 5], 13, 8), ([4], 7, 7)):
        assert rows.tokens(torch.tensor(branches)) == as_rows_cost
        assert packed.tokens(torch.tensor(branches)) == as_tree_cost


def test_a_tree_by_hand():
    # sorted: 1 2 3 4 5 6 7 | 8 | 9; siblings share what they saw, and the 6 that two of them wrote
    batch = pack_trees([make_tree()], [[0.0, 0.5, 1.0, 2.0, 3.0]])
    assert (batch.flattened_tokens, batch.unique_tokens) == (20, 9)
    assert batch.turn_ids.tolist() == [[0, 0, 1, -1], [0, 0, 1, 1], [0, 0, 1, -1]]
    assert batch.advantages.tolist() == [[0.5, 0.5, 1, 0], [0.5, 0.5, 2, 2], [0.5, 0.5, 3, 0]]
    ((rows, pack),) = batch.micro_batches(100)
    assert rows.tolist() == [0, 1, 2]
    assert pack.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert pack.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 6, 5]]
    # trained: 3 4 6 8 9, each predicted by the token before it in its branch; the forced 7 is not
    assert pack.targets.tolist() == [3, 4, 6, 8, 9]
    assert pack.predicts.tolist() == [1, 2, 4, 5, 4]
    assert pack.slots.tolist() == [[0, 1, 2, 5], [0, 1, 2, 3], [0, 1, 4, 5]]
    assert pack.to_rows(torch.tensor([3.0, 4, 6, 8, 9])).tolist() == [
        [3, 4, 6, 0],
        [3, 4, 6, 8],
        [3, 4, 9, 0],
    ]


def test_packs_keep_to_the_budget_and_hold_every_branch_once():
    forest, advantages = random_forest(1, trees=3, turns=12)
    batch = pack_trees(forest, advantages)
    for budget in (1, 30, 60, 10**6):
        found = list(batch.micro_batches(budget))
        assert sorted(torch.cat([rows for rows, _ in found]).tolist()) == list(range(len(batch.turn_ids)))
        longest = int(batch.prefixes.lengths.max())
        assert all(pack.input_ids.shape[1] <= max(budget, longest) for _, pack in found)
    with pytest.raises(ValueError, match="at least 1"):
        next(batch.micro_batches(0))


# The same gradient -----------------------------------------------------------------------------------------


def compare(model, seed: int, name: str, budget: int, **changes) -> float:
    """Relative norm of the difference of the gradients; also compares losses and metrics."""
    forest, advantages = random_forest(seed)
    packs, rows = pack_trees(forest, advantages), pack_rows(forest, advantages)
    noise = torch.Generator().manual_seed(seed)
    exact = loss_learner(model, name, 10**6)
    now = exact.log_probs(packs)
    old, reference = (now + 0.2 * torch.randn(now.shape, generator=noise) for _ in range(2))
    expected, figures = gradient(exact, rows, as_rows(packs, old, rows), as_rows(packs, reference, rows))
    got, packed_figures = gradient(loss_learner(model, name, budget, **changes), packs, old, reference)
    assert packed_figures == pytest.approx(figures, rel=1e-4, abs=1e-5)
    assert float(expected.norm()) > 1e-4
    return float((got - expected).norm() / expected.norm())


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.sampled_from(loss_names()), st.sampled_from([1, 20, 40, 10**6]))
def test_every_loss_has_the_gradient_of_rows_however_packs_are_cut(seed, name, budget):
    # Advantages differ per branch on shared tokens; a KL term is added. The model computes in float64, for in
    # float32 rounding alone can reach 2e-5 where a gradient nearly cancels; log-probs and losses are float32.
    assert compare(tiny_model(), seed, name, budget) < 2e-6


@pytest.mark.parametrize("name", loss_names())
def test_gradients_agree_in_float32_as_in_training(name):
    assert compare(tiny_model(dtype=torch.float32), 5, name, 40) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_models(family):
    model = tiny_model(family, dtype=torch.float32)
    assert compare(model, 5, "atpo", 40) < 1e-5
    assert check_model(model) == (family != "gemma2")  # its logits have a soft cap


def test_sliding_windows():
    windowed = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    assert compare(tiny_model("gemma3_text", dtype=torch.float32, **windowed), 5, "atpo", 40) < 1e-5
    assert compare(tiny_model("gemma2", dtype=torch.float32, **windowed), 5, "atpo", 40) < 1e-5


def test_recomputed_activations():
    model = tiny_model(dtype=torch.float32)
    checkpoint_activations(model)
    assert compare(model, 7, "atpo", 40, checkpointing=True) < 1e-5


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_low_rank_adapters():
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "lm_head"], init_lora_weights=False)
    for targets in (["q_proj", "v_proj"], ["q_proj", "lm_head"]):
        adapter.target_modules = set(targets)
        model = peft.get_peft_model(tiny_model(dtype=torch.float32), adapter)
        assert compare(model, 7, "atpo", 40) < 1e-5


def test_adapters_of_the_configuration():
    model = add_adapters(tiny_model(dtype=torch.float32), LoraConfig(rank=2), seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # fresh ones have B = 0, and no gradient would reach A
        for parameter in adapter_weights(model).values():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    check_model(model)
    assert compare(model, 7, "atpo", 40) < 1e-5
    checkpoint_activations(model)
    assert compare(model, 7, "grpo", 40, checkpointing=True) < 1e-5


def test_log_probs_and_entropies_of_branches_in_float64():
    model = tiny_model()
    forest, advantages = random_forest(3)
    packs, rows = pack_trees(forest, advantages), pack_rows(forest, advantages)
    trained = rows.turn_ids >= 0
    ((order, pack),) = packs.micro_batches(10**6)
    check_model(model)
    with torch.no_grad():
        expected = model(input_ids=rows.input_ids).logits[:, :-1].log_softmax(-1)
        with tree_attention(model):
            stats = pack.stats(model, with_entropies=True)
    chosen = expected.gather(-1, rows.input_ids[:, 1:, None])[..., 0][trained[:, 1:]]
    back = torch.argsort(order)
    here = (pack.turn_ids >= 0)[back]
    torch.testing.assert_close(stats.log_probs[back][here], chosen)
    entropy = -(expected.exp() * expected).sum(-1)[trained[:, 1:]]
    torch.testing.assert_close(stats.entropies[back][here], entropy)
    torch.testing.assert_close(rows.entropies(model)[trained].double(), entropy, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rows.log_probs(model)[trained].double(), chosen, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_autocast_stays_close_to_full_precision(family):
    model, (forest, advantages) = tiny_model(family, dtype=torch.float32), random_forest(3)
    packs = pack_trees(forest, advantages)
    full, half = loss_learner(model, "grpo", 40), loss_learner(model, "grpo", 40, autocast=torch.bfloat16)
    old = full.log_probs(packs)
    rough = half.log_probs(packs)
    assert 0 < float((rough - old).norm() / old.norm()) < 0.05
    expected, got = (gradient(one, packs, old, old)[0] for one in (full, half))
    assert float((got - expected).norm() / expected.norm()) < 0.2


# What must fail --------------------------------------------------------------------------------------------


def shift_position(layout: Layout) -> Layout:
    positions = layout.positions.copy()
    positions[len(positions) // 2 :] += 1
    return replace(layout, positions=positions)


def lose_ancestor(layout: Layout) -> Layout:
    keys, queries = layout.segments[0]
    fewer = (slice(keys.start + 1, keys.stop), queries)
    return replace(layout, segments=[fewer, *layout.segments[1:]])


@pytest.mark.parametrize("fault", [shift_position, lose_ancestor])
def test_a_wrong_layout_changes_the_gradient(fault, monkeypatch):
    model = tiny_model(dtype=torch.float32)
    check_model(model)
    monkeypatch.setattr(
        "at2po_agent.packing.trees.lay_out",
        lambda lengths, shared: fault(lay_out(lengths, shared)),
    )
    with pytest.raises(AssertionError):
        assert compare(model, 5, "atpo", 10**6) < 1e-5


def test_a_weight_of_one_on_shared_tokens_changes_the_gradient():
    model = tiny_model(dtype=torch.float32)
    forest, _ = random_forest(5)
    packs = pack_trees(forest, [np.ones(len(tree)) for tree in forest])
    check_model(model)

    def packed_gradient(first_branch_alone: bool) -> torch.Tensor:
        model.zero_grad()
        ((_, pack),) = packs.micro_batches(10**6)
        seen = np.zeros(len(pack.targets) + 1, dtype=bool)
        weights = torch.ones(pack.turn_ids.shape)
        for row in range(len(weights)) if first_branch_alone else ():
            slots = pack.slots[row].numpy()
            weights[row] = torch.from_numpy(~seen[slots]).float()
            seen[slots] = True
        with tree_attention(model):
            log_probs = pack.log_probs(model)
            loss, _ = make_loss("grpo")(
                log_probs, log_probs.detach(), pack.advantages, pack.turn_ids, weights=weights
            )
            loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    exact, wrong = packed_gradient(False), packed_gradient(True)
    assert float((wrong - exact).norm() / exact.norm()) > 0.1


# Models and learner ----------------------------------------------------------------------------------------


def test_models_that_mix_tokens_otherwise_are_refused():
    mamba = tiny_model("mamba", dtype=torch.float32, state_size=4)
    with pytest.raises(ConfigError, match=r"train\.packing: rows"):
        check_model(mamba)
    with pytest.raises(ConfigError, match="no causal language model"):
        check_model(torch.nn.Linear(2, 2))


def test_the_models_own_attention_comes_back():
    model = tiny_model()
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="tree_layout"), tree_attention(model):
        model(input_ids=torch.tensor([[1, 2]]))
    assert model.config._attn_implementation == before


def test_the_sampler_is_compared_by_one_micro_batch():
    model = tiny_model(dtype=torch.float32)
    forest, advantages = random_forest(5)
    packs, one = pack_trees(forest, advantages), loss_learner(model, "atpo", 40)
    exact = replace(packs, sampled_log_probs=one.log_probs(packs))
    assert one.first_mismatch(exact)["mismatch/max_difference"] < 1e-6
    off = one.first_mismatch(replace(packs, sampled_log_probs=exact.sampled_log_probs + 0.01))
    assert off["mismatch/mean_difference"] == pytest.approx(0.01, rel=1e-3)
    assert 0 < off["mismatch/tokens"] < int((packs.turn_ids >= 0).sum())


def test_branches_without_advantage_are_not_computed():
    forest, _ = random_forest(5, trees=1)
    leaves = len(forest[0].leaves())
    advantages = np.zeros(leaves)
    advantages[0] = 1.0
    packs = pack_trees(forest, [advantages])
    model = tiny_model(dtype=torch.float32)
    check_model(model)
    computed = []
    note = lambda _, args, inputs: computed.append(inputs["input_ids"].tolist())  # noqa: E731, ARG005
    model.register_forward_pre_hook(note, with_kwargs=True)
    one = loss_learner(model, "atpo", 10**6)
    one.backward(packs, packs.sampled_log_probs, packs.sampled_log_probs)
    assert computed == [[forest[0].branch_ids(forest[0].leaves()[0])]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_flex_attention_has_the_gradient_of_rows_within_noise():
    model = tiny_model(dtype=torch.float32, hidden_size=64, head_dim=16).cuda()
    assert compare(model, 5, "atpo", 40) < 1e-3
