from __future__ import annotations

from math import log

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from at2po_agent.packing import log_probs as logprobs
from at2po_agent.packing.log_probs import gather_log_probs, token_stats, trained_stats


def test_literals() -> None:
    # probabilities 1/6, 2/6, 3/6: entropy (ln 6 + 2 (ln 6 - ln 2) + 3 (ln 6 - ln 3)) / 6 = 1.0114043
    logits = torch.tensor([[log(1.0), log(2.0), log(3.0)]] * 2)
    log_probs, entropies = token_stats(logits, torch.tensor([0, 2]))
    assert log_probs.tolist() == pytest.approx([log(1 / 6), log(1 / 2)], abs=1e-6)
    assert entropies.tolist() == pytest.approx([1.0114043] * 2, abs=1e-6)
    # temperature 1/2 squares the odds: 1, 4, 9
    warm = gather_log_probs(logits, torch.tensor([0, 2]), temperature=0.5)
    assert warm.tolist() == pytest.approx([log(1 / 14), log(9 / 14)], abs=1e-6)


def test_impossible_tokens_have_no_entropy() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf]], requires_grad=True)
    log_probs, entropies = token_stats(logits, torch.tensor([1]))
    log_probs.sum().backward()
    assert entropies.tolist() == pytest.approx([log(2)])
    assert logits.grad is not None
    assert logits.grad.tolist() == [[-0.5, 0.5, 0.0]]
    assert gather_log_probs(logits.detach(), torch.tensor([2])).tolist() == [-np.inf]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(0, 7), st.integers(2, 9), st.sampled_from([0.5, 1.0, 2.0]))
def test_values_and_gradients_are_those_of_softmax(
    seed: int, rows: int, vocabulary: int, temperature: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, rows, vocabulary, dtype=torch.float64, generator=generator, requires_grad=True)
    ids = torch.randint(vocabulary, (2, rows), generator=generator)
    weight = torch.randn(2, rows, dtype=torch.float64, generator=generator)
    plain = (logits / temperature).log_softmax(dim=-1)
    expected = plain.gather(-1, ids[..., None])[..., 0]
    (expected_grad,) = torch.autograd.grad((weight * expected).sum(), logits)
    log_probs, entropies = token_stats(logits, ids, temperature=temperature)
    (grad,) = torch.autograd.grad((weight * log_probs).sum(), logits)
    torch.testing.assert_close(log_probs, expected)
    torch.testing.assert_close(grad, expected_grad)
    torch.testing.assert_close(entropies, -(plain.exp() * plain).sum(dim=-1))
    assert not entropies.requires_grad


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, ids = torch.randn(50, 7, requires_grad=True), torch.randint(7, (50,))
    whole = token_stats(logits, ids)
    (grad,) = torch.autograd.grad(whole.log_probs.sum(), logits)
    monkeypatch.setattr(logprobs, "_CHUNK_LOGITS", 20)
    cut = token_stats(logits, ids)
    (cut_grad,) = torch.autograd.grad(cut.log_probs.sum(), logits)
    assert torch.equal(cut.log_probs, whole.log_probs)
    assert torch.equal(cut.entropies, whole.entropies)
    assert torch.equal(cut_grad, grad)


def test_half_precision_logits_are_read_in_float32() -> None:
    logits, ids = torch.randn(4, 9).bfloat16(), torch.arange(4)
    assert gather_log_probs(logits, ids).dtype == torch.float32
    torch.testing.assert_close(gather_log_probs(logits, ids), gather_log_probs(logits.float(), ids))


@pytest.mark.parametrize("chunk_tokens", [1, 3, 1024])
def test_trained_tokens_from_hidden_states(chunk_tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 6, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(5, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    input_ids = torch.randint(5, (2, 6), generator=generator)
    turn_ids = torch.tensor([[0, -1, 0, 0, -1, 1], [-1, -1, -1, 0, 0, 0]])
    # logits at t - 1 predict token t; position 0 has no prediction, whatever its turn id says
    full = (hidden @ weight.T).log_softmax(dim=-1)
    wanted = turn_ids >= 0
    wanted[:, 0] = False
    shifted = full[:, :-1].gather(-1, input_ids[:, 1:, None])[..., 0]
    expected = torch.nn.functional.pad(shifted, (1, 0)) * wanted
    got = trained_stats(hidden, weight, input_ids, turn_ids, chunk_tokens=chunk_tokens)
    torch.testing.assert_close(got.log_probs, expected)
    entropy = -(full.exp() * full).sum(dim=-1)
    torch.testing.assert_close(got.entropies, torch.nn.functional.pad(entropy[:, :-1], (1, 0)) * wanted)
    for ours, theirs in zip(
        torch.autograd.grad(got.log_probs.square().sum(), (hidden, weight)),
        torch.autograd.grad(expected.square().sum(), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    # negative control: logits at t read for token t
    unshifted = full.gather(-1, input_ids[..., None])[..., 0] * wanted
    assert not torch.allclose(got.log_probs, unshifted)


def test_nothing_trained_is_zero() -> None:
    hidden = torch.randn(1, 3, 4, requires_grad=True)
    got = trained_stats(
        hidden, torch.randn(5, 4), torch.zeros(1, 3, dtype=torch.int64), torch.full((1, 3), -1)
    )
    got.log_probs.sum().backward()
    assert got.log_probs.tolist() == [[0.0] * 3]
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got torch.float32\[4, 9\] and \[3\]"):
        gather_log_probs(torch.zeros(4, 9), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"need float\[..., V\]"):
        gather_log_probs(torch.zeros(4, 9, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"temperature must be positive, got 0\.0"):
        gather_log_probs(torch.zeros(4, 9), torch.zeros(4, dtype=torch.int64), temperature=0.0)
    ids = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="must agree"):
        trained_stats(torch.zeros(1, 2, 4), torch.zeros(5, 4), ids, ids)
