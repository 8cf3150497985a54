"""Draws by hand, and the edges of the unit interval."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from at2po_agent.policies.sampling import Draws, distribution, draw, entropy

# Probabilities 1/8, 1/2, 0, 1/4, 1/8: the CDF is 0.125, 0.625, 0.625, 0.875, 1.
PROBS = torch.tensor([[0.125, 0.5, 0.0, 0.25, 0.125]])
LOG_PROBS = PROBS.log()


def tokens(uniforms: list[float], **settings: torch.Tensor) -> list[int]:
    rows = LOG_PROBS.expand(len(uniforms), -1)
    return draw(rows, torch.tensor(uniforms, dtype=torch.float64), **settings).tokens.tolist()


def test_a_draw_is_the_first_token_whose_cdf_exceeds_the_uniform() -> None:
    assert tokens([0.0, 0.124, 0.125, 0.624, 0.625, 0.874, 0.875, 0.999]) == [0, 0, 1, 1, 3, 3, 4, 4]


@pytest.mark.parametrize("vocabulary", [5, 9000])
def test_a_token_of_probability_zero_is_never_drawn(vocabulary: int) -> None:
    logits = torch.full((3, vocabulary), -math.inf)
    logits[:, 2:4] = 0.0
    edges = torch.tensor([0.0, 1.0 - 2.0**-53, 0.5], dtype=torch.float64)
    drawn = draw(distribution(logits), edges)
    assert drawn.tokens.tolist() == [2, 3, 3]
    np.testing.assert_allclose(drawn.log_probs, -math.log(2), rtol=1e-6)


def test_log_probs_are_those_of_the_drawn_tokens() -> None:
    drawn = draw(LOG_PROBS.expand(2, -1), torch.tensor([0.3, 0.7], dtype=torch.float64))
    np.testing.assert_allclose(drawn.log_probs, [math.log(0.5), math.log(0.25)], rtol=1e-6)


def test_temperature_divides_the_logits_and_zero_counts_as_one() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)]] * 3)
    rows = distribution(logits, torch.tensor([1.0, 0.5, 0.0])).exp()
    # 3^(1/T) to 1: 3/4 at T = 1, 9/10 at T = 1/2.
    np.testing.assert_allclose(rows[:, 1], [0.75, 0.9, 0.75], rtol=1e-6)


def test_greedy_rows_take_the_most_likely_token() -> None:
    assert tokens([0.0, 0.99], greedy=torch.tensor([True, False])) == [1, 4]


def test_top_p_keeps_the_smallest_set_with_its_mass() -> None:
    # Sorted: token 1 (1/2), 3 (1/4), 0 (1/8), 4 (1/8). Mass 0.6 needs tokens 1 and 3: CDF 2/3, 1.
    top_p = torch.tensor([0.6] * 4)
    assert tokens([0.0, 0.66, 0.67, 0.999], top_p=top_p) == [1, 1, 3, 3]
    assert tokens([0.999], top_p=torch.tensor([1e-6])) == [1]


def test_top_p_of_one_row_leaves_the_others_alone() -> None:
    assert tokens([0.9, 0.9, 0.9], top_p=torch.tensor([1.0, 0.5, 1.0])) == [4, 1, 4]


def test_forced_tokens_replace_draws_and_keep_their_log_prob() -> None:
    drawn = draw(LOG_PROBS.expand(2, -1), torch.tensor([0.3, 0.3]).double(), forced=torch.tensor([3, -1]))
    assert drawn.tokens.tolist() == [3, 1]
    np.testing.assert_allclose(drawn.log_probs, [math.log(0.25), math.log(0.5)], rtol=1e-6)


def test_entropy_counts_impossible_tokens_as_nothing() -> None:
    # 2 * (1/8) log 8 + (1/2) log 2 + (1/4) log 4 = (3/4 + 1/2 + 1/2) log 2 = 1.75 log 2
    assert float(entropy(LOG_PROBS)) == pytest.approx(1.75 * math.log(2), rel=1e-6)


def test_large_vocabularies_draw_what_a_float64_cdf_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    log_probs = (3 * torch.randn(40, 20_000, generator=generator)).log_softmax(-1)
    uniforms = torch.rand(40, generator=generator, dtype=torch.float64)
    cdf = log_probs.double().exp().cumsum(-1)
    expected = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True)[:, 0]
    drawn = draw(log_probs, uniforms).tokens
    # Float32 may step over a boundary: then the drawn token's CDF is the uniform to 1e-6.
    nearest = torch.minimum(
        (cdf.gather(1, drawn[:, None])[:, 0] - uniforms).abs(),
        (cdf.gather(1, (drawn[:, None] - 1).clamp(min=0))[:, 0] - uniforms).abs(),
    )
    assert ((drawn == expected) | (nearest < 1e-6)).all()
    assert (drawn == expected).float().mean() > 0.9


def test_draws_depend_on_seed_and_place_alone() -> None:
    # NumPy's documented stream of Philox 4x64-10 with this key, so that other samplers can agree.
    expected = np.random.Generator(np.random.Philox(key=7)).random(300)
    draws = Draws(7)
    while len(draws) < 300:
        draws.more()
    np.testing.assert_array_equal(draws[:300], expected)
    assert Draws(8)[0] != expected[0]


def test_draws_of_neighbouring_seeds_are_uniform_at_each_place() -> None:
    first = np.array([[draws[0], draws[1]] for draws in map(Draws, range(2000))])
    # Standard error of a mean of 2000 uniforms: 0.0065; of the correlation: 0.022.
    assert np.all(np.abs(first.mean(axis=0) - 0.5) < 0.03)
    assert abs(np.corrcoef(first[:, 0], first[:, 1])[0, 1]) < 0.1
    assert abs(np.corrcoef(first[:-1, 0], first[1:, 0])[0, 1]) < 0.1
