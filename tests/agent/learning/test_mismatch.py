import numpy as np
import pytest
import torch
from helpers.forests import as_rows, gradient, loss_learner, random_forest, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from at2po_agent.learning.mismatch import Mismatch, importance_weights
from at2po_agent.losses import LossTotals, get_loss, loss_names, make_loss
from at2po_agent.losses.base import branch_ratio, prepare, token_ratio, turn_ratio
from at2po_agent.packing.rows import pack_rows
from at2po_agent.packing.trees import pack_trees

LN2 = float(np.log(2))
TURNS = torch.tensor([[0, 0, 1, -1]])
SAMPLED = torch.tensor([[-2.0, -1.0, -1.0, 5.0]])
OLD = SAMPLED + torch.tensor([[2 * LN2, 0.0, -LN2, torch.nan]])  # ratios 4, 1, 1/2; the last is not trained
BUILT_IN = [name for name in loss_names() if get_loss(name).function.__module__.startswith("at2po_agent.")]


def measured(log_probs: torch.Tensor, sampled: torch.Tensor, turn_ids: torch.Tensor) -> dict[str, float]:
    found = Mismatch()
    found.add(log_probs, sampled, turn_ids)
    return found.read()


# Measuring -------------------------------------------------------------------------------------------------


def test_the_figures_by_hand():
    # d = log learner - log sampler = -0.1 and 0.2; k1 = mean(-d); k3 = mean(e^d - 1 - d):
    # (0.904837 - 1 + 0.1 + 1.221403 - 1 - 0.2) / 2 = (0.004837 + 0.021403) / 2
    figures = measured(
        torch.tensor([[-1.1, -1.8, torch.nan]]),
        torch.tensor([[-1.0, -2.0, -1.0]]),
        torch.tensor([[0, 1, -1]]),
    )
    assert figures == pytest.approx(
        {
            "mismatch/tokens": 2,
            "mismatch/kl_k1": -0.05,
            "mismatch/kl_k3": 0.0131201,
            "mismatch/mean_difference": 0.15,
            "mismatch/max_difference": 0.2,
        },
        rel=1e-5,
    )


def test_tiny_differences_are_not_rounding():
    # e^d - 1 - d = d^2 / 2 = 5e-13 at d = 1e-6; in float32 e^d - 1 - d is a multiple of 6e-8
    sampled = torch.zeros(1, 4, dtype=torch.float64)
    figures = measured(sampled + 1e-6, sampled, torch.zeros(1, 4, dtype=torch.int64))
    assert figures["mismatch/kl_k3"] == pytest.approx(5e-13, rel=1e-5)
    naive = torch.tensor(1e-6)
    assert abs(float(naive.exp() - 1 - naive) - 5e-13) > 1e-9  # negative control


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3))
def test_pieces_add_up_and_k3_is_never_negative(seed, cuts):
    generator = torch.Generator().manual_seed(seed)
    log_probs, sampled = (-3 * torch.rand(4, 9, generator=generator) for _ in range(2))
    turn_ids = torch.randint(-1, 3, (4, 9), generator=generator)
    whole, parts = measured(log_probs, sampled, turn_ids), Mismatch()
    for rows in torch.tensor_split(torch.arange(4), cuts):
        parts.add(log_probs[rows], sampled[rows], turn_ids[rows])
    assert parts.read() == pytest.approx(whole)
    assert whole["mismatch/kl_k3"] >= 0
    trained = turn_ids >= 0
    d = (log_probs.double() - sampled.double())[trained].numpy()
    assert whole["mismatch/kl_k1"] == pytest.approx(-d.mean())
    assert whole["mismatch/max_difference"] == pytest.approx(np.abs(d).max())


def test_without_tokens_there_are_no_figures_and_infinities_stay_finite():
    assert Mismatch().read() == {}
    assert measured(torch.zeros(1, 2), torch.zeros(1, 2), torch.full((1, 2), -1)) == {}
    figures = measured(torch.tensor([[-1.0, -1.0]]), torch.tensor([[-torch.inf, torch.nan]]), TURNS[:, :2])
    assert figures["mismatch/max_difference"] == 20.0
    assert np.isfinite(list(figures.values())).all()


# Correcting ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "cap", "expected", "capped"),
    [
        ("token", 2.0, [2.0, 1.0, 0.5, 1.0], 1 / 3),  # 4 is cut to 2
        ("token", 1.0, [1.0, 1.0, 0.5, 1.0], 1 / 3),
        ("token", 9.0, [4.0, 1.0, 0.5, 1.0], 0.0),
        ("turn", 9.0, [2.0, 2.0, 0.5, 1.0], 0.0),  # turn 0: e^((2 ln 2 + 0) / 2) = 2
        ("turn", 1.5, [1.5, 1.5, 0.5, 1.0], 2 / 3),
        ("branch", 9.0, [2 ** (1 / 3)] * 3 + [1.0], 0.0),  # e^((2 ln 2 + 0 - ln 2) / 3)
    ],
)
def test_weights_by_hand(level, cap, expected, capped):
    weights, figures = importance_weights(OLD, SAMPLED, TURNS, cap=cap, level=level)
    assert weights.tolist()[0] == pytest.approx(expected, rel=1e-6)
    assert float(figures["importance/capped"]) == pytest.approx(capped)
    assert float(figures["importance/mean"]) == pytest.approx(sum(expected[:3]) / 3, rel=1e-6)


def test_a_cap_below_one_is_refused():
    with pytest.raises(ValueError, match="cap must be at least 1"):
        importance_weights(OLD, SAMPLED, TURNS, cap=0.5)


@pytest.mark.parametrize("level", ["token", "turn", "branch"])
def test_equal_log_probs_weigh_exactly_one(level):
    same = -torch.rand(3, 7, generator=torch.Generator().manual_seed(0))
    turn_ids = torch.arange(7).div(3, rounding_mode="floor").expand(3, 7).contiguous()
    weights, figures = importance_weights(same, same.clone(), turn_ids, cap=1.0, level=level)
    assert torch.equal(weights, torch.ones(3, 7))
    assert float(figures["importance/capped"]) == 0.0


def ratio_of(level, log_probs, old, turn_ids):
    inputs = prepare(log_probs, old, torch.zeros_like(old), turn_ids)
    return {"token": token_ratio, "turn": turn_ratio, "branch": branch_ratio}[level](inputs).per_token


@pytest.mark.parametrize("level", ["token", "turn", "branch"])
def test_below_the_cap_the_ratio_becomes_the_one_to_the_sampler(level):
    generator = torch.Generator().manual_seed(1)
    now, old, sampled = (-torch.rand(2, 8, generator=generator) for _ in range(3))
    turn_ids = torch.tensor([[-1, 0, 0, 0, -1, 1, 1, 2], [-1, 0, 0, -1, 1, 1, -1, -1]])
    expected = ratio_of(level, now, sampled, turn_ids)
    weights, _ = importance_weights(old, sampled, turn_ids, cap=100.0, level=level)
    torch.testing.assert_close(weights * ratio_of(level, now, old, turn_ids), expected)
    # negative control: weights of another level do not
    other, _ = importance_weights(
        old, sampled, turn_ids, cap=100.0, level="branch" if level == "token" else "token"
    )
    assert not torch.allclose(other * ratio_of(level, now, old, turn_ids), expected, atol=1e-3)


def test_every_loss_knows_its_level():
    levels = {name: get_loss(name).level for name in BUILT_IN}
    assert {name for name, level in levels.items() if level == "turn"} == {"atpo", "atpo_soft_clip"}
    assert {name for name, level in levels.items() if level == "branch"} == {"gspo"}


@pytest.mark.parametrize("name", BUILT_IN)
def test_weighing_advantages_weighs_the_loss_of_each_token(name):
    # `weights` of a loss replace its aggregation by sum_t w_t x_t: there each token's loss can be weighed
    generator = torch.Generator().manual_seed(2)
    shape = (3, 12)
    log_probs, old = (-2 * torch.rand(shape, generator=generator) for _ in range(2))
    advantages, given = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)
    weights = 0.2 + 2 * torch.rand(shape, generator=generator)
    turn_ids = torch.arange(12).div(4, rounding_mode="floor").expand(shape).contiguous()
    extra = {}
    if get_loss(name).requires:
        extra = {"entropies": given, "totals": LossTotals.of(turn_ids, given)}
    loss = make_loss(name)
    expected, _ = loss(log_probs, old, advantages, turn_ids, weights=given * weights, **extra)
    got, _ = loss(log_probs, old, advantages * weights, turn_ids, weights=given, **extra)
    assert float(got) == pytest.approx(float(expected), rel=1e-5)
    plain, _ = loss(log_probs, old, advantages, turn_ids, weights=given, **extra)
    assert float(plain) != pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("name", ["atpo", "gspo", "grpo"])
def test_packs_and_rows_get_the_same_weighed_gradient(name):
    model, (forest, advantages) = tiny_model(dtype=torch.float32), random_forest(9)
    one = loss_learner(model, name, 40)
    one.objective = one.objective._replace(kl_weight=0.0)
    packs, rows = pack_trees(forest, advantages), pack_rows(forest, advantages)
    old = one.log_probs(
        packs
    )  # the forest's own log-probs are those of no model, so all weights differ from 1
    weigh = {"cap": 3.0, "level": get_loss(name).level}
    by_pack, _ = importance_weights(old, packs.sampled_log_probs, packs.turn_ids, **weigh)
    by_row, _ = importance_weights(as_rows(packs, old, rows), rows.sampled_log_probs, rows.turn_ids, **weigh)
    torch.testing.assert_close(as_rows(packs, by_pack, rows)[rows.turn_ids >= 0], by_row[rows.turn_ids >= 0])
    plain, _ = gradient(one, packs, old, None)
    got, _ = gradient(one, packs.with_advantages(packs.advantages * by_pack), old, None)
    expected, _ = gradient(
        one, rows.with_advantages(rows.advantages * by_row), as_rows(packs, old, rows), None
    )
    assert float((got - expected).norm() / expected.norm()) < 1e-5
    assert float((got - plain).norm() / plain.norm()) > 1e-2
