"""New weights are noticed, counted and never mixed with old keys and values."""

from __future__ import annotations

import random

import pytest
import torch
from helpers.policy_reference import (
    TOLERANCE,
    VOCABULARY,
    drain,
    ids,
    make_policy,
    reference_log_probs,
    tiny_model,
    worst_error,
)

from at2po_agent.policies.base import Request
from at2po_agent.policies.hf import policy as hf
from at2po_env.errors import PolicyError


def test_new_weights_are_sampled_from_and_counted() -> None:
    model, other = tiny_model(seed=0), tiny_model(seed=1)
    policy = make_policy(model)
    request = Request(ids(random.Random(0), 30), 8, seed=2)
    (before,) = policy.generate([request])
    policy.update_weights(other.state_dict())
    (after,) = policy.generate([request])
    assert (before.version, after.version) == (0, 1)
    assert after.ids != before.ids
    assert worst_error(other, [request], [after]) < TOLERANCE


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "Muon"])
@pytest.mark.parametrize("path", ["fused", "modules"])
def test_an_optimiser_step_is_noticed_without_being_told(
    optimizer: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "modules":
        monkeypatch.setattr(hf, "fits", lambda _: False)
    model = tiny_model()
    policy = make_policy(model)
    request = Request(ids(random.Random(0), 30), 8, seed=2)
    policy.generate([request])
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    model.train()
    model(input_ids=torch.tensor([request.prefix_ids])).logits.square().mean().backward()
    getattr(torch.optim, optimizer)(matrices, lr=0.05).step()
    (after,) = policy.generate([request])
    assert after.version == 1
    assert model.training
    model.eval()
    assert worst_error(model, [request], [after]) < TOLERANCE


def test_requests_under_way_go_on_with_the_new_weights() -> None:
    model = tiny_model(seed=0)
    policy = make_policy(model, eos_ids=())
    request = Request(ids(random.Random(0), 30), 12, seed=2)
    tickets = {policy.submit(request), policy.submit(Request(request.prefix_ids, 12, seed=3))}
    for _ in range(5):
        policy.poll()
    policy.update_weights(tiny_model(seed=1).state_dict())
    waiting = policy.submit(request)
    done = drain(policy, tickets | {waiting})
    assert {ticket: g.version for ticket, g in done.items()} == dict.fromkeys(tickets, 0) | {waiting: 1}
    late = done[min(tickets)]
    under_new = reference_log_probs(model, request, late)[5:]
    assert (under_new - torch.from_numpy(late.log_probs[5:].copy())).abs().max() < TOLERANCE
    follow = [Request(request.prefix_ids + late.ids, 5, seed=1)]  # from the keys and values of both halves
    before = policy.stats.prefill_tokens
    assert worst_error(model, follow, policy.generate(follow)) < TOLERANCE
    assert policy.stats.prefill_tokens - before == 1


def test_weights_that_do_not_fit_change_nothing() -> None:
    model = tiny_model()
    policy = make_policy(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrong = {
        "model.norm.weight": torch.zeros(32),
        "model.nothing": torch.zeros(3),
        "lm_head.weight": torch.zeros(1),
    }
    with pytest.raises(PolicyError, match=r"lm_head.weight, model.nothing"):
        policy.update_weights(wrong)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert policy.version == 0


def test_nan_weights_are_an_error_and_good_ones_work_again() -> None:
    model = tiny_model()
    policy = make_policy(model)
    request = Request(ids(random.Random(0), 30), 8, seed=2)
    (before,) = policy.generate([request])
    good = {name: value.clone() for name, value in model.state_dict().items()}
    policy.update_weights({"model.norm.weight": torch.full((32,), torch.nan)})
    with pytest.raises(PolicyError, match="not finite"):
        policy.generate([request])
    assert policy.idle
    policy.update_weights(good)
    assert policy.generate([request])[0].ids == before.ids


def test_the_trainers_settings_of_the_model_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "fits", lambda _: False)
    model = tiny_model()
    implementation = model.config._attn_implementation
    model.train()
    make_policy(model).generate([Request((1, 2), 3)])
    assert model.training
    model.eval()
    assert model.config._attn_implementation == implementation == "sdpa"
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[1, 2]])).logits.shape == (1, 2, VOCABULARY)
