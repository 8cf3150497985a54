import pytest
import torch
from helpers.learners import SHAPE, learner, sampled_batch
from torch import nn

from at2po_agent.agents.model import build_model
from at2po_agent.config.sections import OptimizerConfig
from at2po_agent.learning.learner import Learner, Objective, TrainingError, make_optimizer
from at2po_agent.packing.rows import RowBatch


@pytest.fixture
def model() -> nn.Module:
    return build_model(SHAPE, seed=3)


def gradients(one: Learner, batch: RowBatch, old: torch.Tensor) -> torch.Tensor:
    one.backward(batch, old)
    return torch.cat([parameter.grad.flatten() for parameter in one.model.parameters()])


def test_log_probs_equal_a_plain_float64_forward_pass(model):
    batch = sampled_batch()
    got = batch.log_probs(model).detach()
    reference = build_model(SHAPE, seed=3).double()
    for row in range(len(batch.input_ids)):
        length = int(batch.lengths[row])
        logits = reference(input_ids=batch.input_ids[row : row + 1, :length]).logits[0]
        table = logits.detach().log_softmax(dim=-1)
        for t in range(length):
            if batch.turn_ids[row, t] >= 0:
                assert float(got[row, t]) == pytest.approx(
                    float(table[t - 1, batch.input_ids[row, t]]), abs=1e-5
                )
            else:
                assert got[row, t] == 0.0


def test_a_temperature_divides_the_logits(model):
    batch = sampled_batch(1)
    got = batch.log_probs(model, temperature=2.0).detach()
    logits = model(input_ids=batch.input_ids).logits / 2.0
    row, t = (int(index) for index in torch.nonzero(batch.turn_ids >= 0)[0])
    expected = logits.detach().log_softmax(dim=-1)[row, t - 1, batch.input_ids[row, t]]
    assert float(got[row, t]) == pytest.approx(float(expected), abs=1e-5)


def test_any_module_with_logits_can_learn(model):
    class OnlyLogits(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, input_ids: torch.Tensor):
            return self.inner(input_ids=input_ids)

    batch = sampled_batch(1)
    assert torch.allclose(batch.log_probs(OnlyLogits(model)), batch.log_probs(model), atol=1e-6)


@pytest.mark.parametrize("loss", ["atpo", "grpo", "gspo", "dapo", "gppo", "sapo"])
def test_the_gradient_does_not_depend_on_the_cut_into_micro_batches(model, loss):
    batch = sampled_batch()
    old = learner(model).log_probs(batch) + 0.01 * torch.randn(
        batch.turn_ids.shape, generator=torch.Generator().manual_seed(0)
    )
    whole = gradients(learner(model, loss=loss), batch, old)
    for budget in (1, 100, 300):
        cut = gradients(learner(model, loss=loss, budget=budget), batch, old)
        assert float((cut - whole).norm() / whole.norm()) < 1e-6


def test_rows_without_advantage_are_left_out_and_change_nothing(model):
    batch = sampled_batch(8)
    silent = (batch.advantages == 0).all(dim=1)
    assert 0 < int(silent.sum()) < len(silent)  # the sample has both kinds
    one = learner(model)
    old = one.log_probs(batch)
    skipping = gradients(one, batch, old)
    thorough = learner(model)
    thorough.objective = one.objective._replace(needs_advantage=False)
    assert torch.allclose(skipping, gradients(thorough, batch, old), atol=1e-7)
    # negative control: dropping rows that do carry an advantage is seen
    dropped = batch.select(torch.arange(len(silent) // 2))
    assert not torch.allclose(skipping, gradients(one, dropped, old[: len(silent) // 2, :]), atol=1e-7)


def test_on_policy_the_ratio_is_one_and_nothing_clips(model):
    batch = sampled_batch()
    one = learner(model)
    figures = one.update(batch, one.log_probs(batch))
    assert figures["ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert figures["clip_fraction"] == 0.0
    assert figures["grad_norm"] > 0


def test_an_update_raises_the_log_prob_of_what_was_better_than_its_siblings(model):
    batch = sampled_batch()
    one = learner(model, loss="grpo")
    before = one.log_probs(batch)
    for _ in range(3):
        one.update(batch, before)
    change = (one.log_probs(batch) - before) * batch.advantages
    assert float(change.sum()) > 0


def test_a_minibatch_without_any_advantage_leaves_only_the_decay(model):
    batch = sampled_batch(1)
    silent = batch.with_advantages(torch.zeros_like(batch.advantages))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    figures = learner(model, lr=1e-3).update(silent, silent.sampled_log_probs)
    size = sum(float(old.double().square().sum()) for old in before) ** 0.5
    assert figures == {"loss": 0.0, "grad_norm": 0.0, "update_norm": pytest.approx(1e-5 * size, rel=1e-2)}
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.allclose(new, old * (1 - 1e-3 * 0.01))


@pytest.mark.parametrize("fused", [True, False])
def test_the_update_norm_is_the_distance_that_the_weights_moved(model, fused):
    batch = sampled_batch()
    one = learner(model, lr=1e-3)
    if not fused:
        one.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=False)
    assert bool(one.optimizer.param_groups[0]["fused"]) == fused
    before = [parameter.detach().double() for parameter in model.parameters()]
    figures = one.update(batch, one.log_probs(batch))
    squares = [
        float((new.detach().double() - old).square().sum())
        for old, new in zip(before, model.parameters(), strict=True)
    ]
    assert figures["update_norm"] == pytest.approx(sum(squares) ** 0.5, rel=1e-4)
    # negative control: learning rate times gradient norm is what plain gradient descent would change
    assert figures["update_norm"] != pytest.approx(1e-3 * figures["grad_norm"], rel=0.1)


def test_a_gradient_that_is_not_finite_changes_no_weight(model):
    batch = sampled_batch()
    old = learner(model).log_probs(batch)
    broken = batch.with_advantages(batch.advantages * torch.inf)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(TrainingError, match=r"not finite.*lower optimizer\.lr"):
        learner(model).update(broken, old)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_a_loss_that_does_not_know_totals_gets_each_minibatch_whole(model):
    sizes = []

    def own_loss(log_probs, old_log_probs, advantages, turn_ids):
        sizes.append(len(turn_ids))
        return -(advantages * (log_probs - old_log_probs)).mean(), {}

    batch = sampled_batch()
    one = learner(model, budget=1)
    one.objective = Objective(own_loss, divisible=False, needs_advantage=False)
    one.update(batch, one.log_probs(batch))
    assert sizes == [len(batch.turn_ids)]


def test_half_precision_products_stay_close_to_full_ones(model):
    batch = sampled_batch()
    one = learner(model)
    half = learner(model)
    half.autocast = torch.bfloat16
    exact, rough = one.log_probs(batch), half.log_probs(batch)
    assert not torch.equal(exact, rough)
    assert torch.allclose(exact, rough, atol=0.05)


def test_weight_decay_and_moments_come_from_the_configuration(model):
    config = OptimizerConfig(lr=0.5, weight_decay=0.2, beta1=0.8, beta2=0.7, eps=1e-3)
    group = make_optimizer(model, config).param_groups[0]
    assert {key: group[key] for key in ("lr", "weight_decay", "betas", "eps")} == {
        "lr": 0.5,
        "weight_decay": 0.2,
        "betas": (0.8, 0.7),
        "eps": 1e-3,
    }
