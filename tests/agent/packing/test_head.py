from __future__ import annotations

import pytest
import torch

from at2po_agent.packing.head import linear_log_probs


def case(dtype=torch.float64, tokens: int = 600, vocabulary: int = 13):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=dtype).requires_grad_()  # noqa: E731
    ids = torch.randint(vocabulary, (tokens,), generator=generator)
    return draw(tokens, 5), draw(vocabulary, 5), draw(vocabulary), ids


@pytest.mark.parametrize("keep_logits", [0, 1 << 24])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_the_whole_softmax(keep_logits, temperature):
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
    monkeypatch.setattr("at2po_agent.packing.head._CHUNK_LOGITS", 1)
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


def test_no_tokens():
    states, weight, _, _ = case(tokens=0)
    log_probs, _ = linear_log_probs(states, weight, torch.zeros(0, dtype=torch.int64))
    log_probs.sum().backward()
    assert float(weight.grad.abs().sum()) == 0.0
