from __future__ import annotations

from math import log

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from at2po_agent.packing import log_probs as module
from at2po_agent.packing.log_probs import linear_log_probs, token_stats


def test_literals() -> None:
    # probabilities 1/6, 2/6, 3/6: entropy (ln 6 + 2 (ln 6 - ln 2) + 3 (ln 6 - ln 3)) / 6 = 1.0114043
    logits = torch.tensor([[log(1.0), log(2.0), log(3.0)]] * 2)
    log_probs, entropies = token_stats(logits, torch.tensor([0, 2]))
    assert log_probs.tolist() == pytest.approx([log(1 / 6), log(1 / 2)], abs=1e-6)
    assert entropies.tolist() == pytest.approx([1.0114043] * 2, abs=1e-6)
    # temperature 1/2 squares the odds: 1, 4, 9
    warm = token_stats(logits, torch.tensor([0, 2]), temperature=0.5).log_probs
    assert warm.tolist() == pytest.approx([log(1 / 14), log(9 / 14)], abs=1e-6)


def test_impossible_tokens_have_no_entropy() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf]], requires_grad=True)
    log_probs, entropies = token_stats(logits, torch.tensor([1]))
    log_probs.sum().backward()
    assert entropies.tolist() == pytest.approx([log(2)])
    assert logits.grad is not None
    assert logits.grad.tolist() == [[-0.5, 0.5, 0.0]]
    assert token_stats(logits.detach(), torch.tensor([2])).log_probs.tolist() == [-np.inf]


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
    monkeypatch.setattr(module, "_CHUNK_LOGITS", 20)
    cut = token_stats(logits, ids)
    (cut_grad,) = torch.autograd.grad(cut.log_probs.sum(), logits)
    assert torch.equal(cut.log_probs, whole.log_probs)
    assert torch.equal(cut.entropies, whole.entropies)
    assert not token_stats(logits, ids, with_entropies=False).entropies.any()
    assert torch.equal(cut_grad, grad)


def test_half_precision_logits_are_read_in_float32() -> None:
    logits, ids = torch.randn(4, 9).bfloat16(), torch.arange(4)
    assert token_stats(logits, ids).log_probs.dtype == torch.float32
    torch.testing.assert_close(token_stats(logits, ids), token_stats(logits.float(), ids))


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got torch.float32\[4, 9\] and \[3\]"):
        token_stats(torch.zeros(4, 9), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"need float\[..., V\]"):
        token_stats(torch.zeros(4, 9, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"temperature must be positive, got 0\.0"):
        token_stats(torch.zeros(4, 9), torch.zeros(4, dtype=torch.int64), temperature=0.0)


# From hidden states ----------------------------------------------------------------------------------------


def case(dtype=torch.float64, tokens: int = 600, vocabulary: int = 13):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=dtype).requires_grad_()  # noqa: E731
    ids = torch.randint(vocabulary, (tokens,), generator=generator)
    return draw(tokens, 5), draw(vocabulary, 5), draw(vocabulary), ids


@pytest.mark.parametrize("keep_logits", [0, 1 << 24])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_fused_head_has_the_values_and_gradients_of_the_whole_softmax(keep_logits, temperature):
    states, weight, bias, ids = case()
    log_probs, entropies = linear_log_probs(
        states, weight, ids, bias=bias, temperature=temperature, with_entropies=True, keep_logits=keep_logits
    )
    table = torch.nn.functional.linear(states, weight, bias).div(temperature).log_softmax(-1)
    expected = table.gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(log_probs, expected)
    torch.testing.assert_close(entropies, torch.distributions.Categorical(logits=table.detach()).entropy())
    weights = torch.linspace(-1, 1, len(ids), dtype=torch.float64)
    leaves = (states, weight, bias)
    for one, other in zip(
        torch.autograd.grad((log_probs * weights).sum(), leaves),
        torch.autograd.grad((expected * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_logits_are_never_held_whole(monkeypatch):
    monkeypatch.setattr(module, "_HEAD_CHUNK_LOGITS", 1)
    largest = 0
    linear = torch.nn.functional.linear

    def watched(*arguments):
        nonlocal largest
        out = linear(*arguments)
        largest = max(largest, len(out))
        return out

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    states, weight, _, ids = case()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        log_probs, _ = linear_log_probs(states, weight, ids, keep_logits=0)
    log_probs.sum().backward()
    assert largest == 256
    assert max(saved) <= states.numel()


def test_frozen_parts_get_no_gradient_and_half_precision_is_summed_in_float32():
    states, weight, _, ids = case(torch.float32)
    log_probs, _ = linear_log_probs(states, weight.detach(), ids)
    assert torch.autograd.grad(log_probs.sum(), states)[0].abs().sum() > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough, _ = linear_log_probs(states, weight, ids)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, log_probs, atol=0.1, rtol=0.05)
    assert torch.autograd.grad(rough.sum(), weight)[0].dtype == torch.float32


def test_the_fused_head_takes_no_tokens():
    states, weight, _, _ = case(tokens=0)
    log_probs, _ = linear_log_probs(states, weight, torch.zeros(0, dtype=torch.int64))
    log_probs.sum().backward()
    assert float(weight.grad.abs().sum()) == 0.0
