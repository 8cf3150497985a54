import copy
import dataclasses
import random

import pytest
import torch
from helpers.vllm_tiny_engine import ids, reference_log_probs, tiny_model, worst_error

from at2po_agent.policies.base import Request
from at2po_env.errors import PolicyError

TOLERANCE = 1e-4


def computed(policy, requests):
    """Prefix tokens that went through the model for these requests, and the answers."""
    before = policy.stats.prefill_tokens
    generations = policy.generate(requests)
    return policy.stats.prefill_tokens - before, generations


def test_chains_that_arrive_together_compute_their_prompt_once(policy, model):
    prompt = ids(random.Random(1), 200)
    requests = [Request(prompt, 4, seed=seed) for seed in range(8)]
    tokens, generations = computed(policy, requests)
    assert tokens == 200 + 7  # the logits after the prompt are computed for each
    assert policy.stats.cached_tokens >= 7 * 199
    assert worst_error(model, requests, generations) < TOLERANCE


@pytest.mark.parametrize("length", [1, 31, 32, 33, 150])
def test_a_fork_computes_its_observation_and_nothing_else(policy, model, length):
    rng = random.Random(length)
    prompt = ids(rng, length)
    _, (turn,) = computed(policy, [Request(prompt, 60, seed=0)])
    prefix = prompt + turn.ids + ids(rng, 30)
    first = [Request(prefix, 40, seed=1)]
    tokens, (second,) = computed(policy, first)
    assert tokens == 30 + 1  # and the last sampled token, which no sampling has fed
    assert worst_error(model, first, [second]) < TOLERANCE
    forks = [Request(prefix, 4, seed=seed) for seed in range(2, 8)]
    tokens, generations = computed(policy, forks)
    assert tokens == len(forks)
    assert worst_error(model, forks, generations) < TOLERANCE
    within = [Request(prefix + second.ids[:cut] + (5, 6), 6, seed=cut) for cut in (3, 17, 38)]
    tokens, generations = computed(policy, within)
    assert tokens == 2 * len(within)
    assert worst_error(model, within, generations) < TOLERANCE


def test_forks_of_forks_from_the_middle_of_blocks_sample_what_the_model_says(policy, model):
    """Many sequences, each from a random place of an earlier one: a block copied wrongly would show."""
    rng, known = random.Random(7), [ids(random.Random(8), 70)]
    asked, unique = 0, set()
    for number in range(12):
        requests = []
        for _ in range(6):
            origin = rng.choice(known)
            cut = rng.randrange(1, len(origin) + 1)
            requests.append(Request(origin[:cut] + ids(rng, rng.randrange(0, 20)), 9, seed=number))
        for request in requests:
            fresh = {request.prefix_ids[:end] for end in range(1, len(request.prefix_ids) + 1)} - unique
            asked += max(len(fresh), 1)
            unique |= fresh
        tokens, generations = computed(policy, requests)
        assert worst_error(model, requests, generations) < TOLERANCE
        for request, generation in zip(requests, generations, strict=True):
            sequence = request.prefix_ids + generation.ids
            known.append(sequence)
            unique |= {sequence[:end] for end in range(1, len(sequence))}
        asked -= tokens
    assert asked == 0


def test_new_weights_are_sampled_from_and_forget_the_cache(policy, model):
    old = copy.deepcopy(model)
    prompt = ids(random.Random(3), 100)
    requests = [Request(prompt, 12, seed=seed) for seed in range(4)]
    policy.generate(requests)
    version = policy.version
    with torch.no_grad():
        for parameter, other in zip(model.parameters(), tiny_model(seed=7).parameters(), strict=True):
            parameter.lerp_(other, 0.5)
    try:
        policy.weights_changed()
        tokens, generations = computed(policy, requests)
        assert tokens >= len(prompt)
        assert worst_error(model, requests, generations) < TOLERANCE
        assert worst_error(old, requests, generations) > 100 * TOLERANCE
        assert {one.version for one in generations} == {policy.version} == {version + 1}
    finally:
        model.load_state_dict(old.state_dict())
        policy.weights_changed()
    assert worst_error(old, requests, policy.generate(requests)) < TOLERANCE


def test_a_request_under_way_goes_on_with_new_weights_and_shows_that_it_is_old(policy, model):
    old = copy.deepcopy(model)
    request = Request(ids(random.Random(4), 40), 12, seed=5)
    ticket, version = policy.submit(request), policy.version
    for _ in range(5):
        policy.poll()
    try:
        policy.update_weights(tiny_model(seed=9).state_dict())
        done = {}
        while ticket not in done:
            done.update(policy.poll())
        generation = done[ticket]
        assert generation.version == version < policy.version
        own = torch.from_numpy(generation.log_probs.copy())
        before = reference_log_probs(old, request, generation)
        after = reference_log_probs(tiny_model(seed=9), request, generation)
        torch.testing.assert_close(own[:5], before[:5], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(own[5:], after[5:], atol=TOLERANCE, rtol=0)
    finally:
        policy.weights_changed()


def test_a_policy_that_rests_wakes_with_the_learners_new_weights(policy, model, monkeypatch):
    """On CPU the engine keeps its memory; what is shown is the order of things."""
    monkeypatch.setattr(policy, "specs", [dataclasses.replace(policy.specs[0], shared=True)])
    old, version = copy.deepcopy(model), policy.version
    requests = [Request((3, 2, n + 1), 8, seed=n) for n in range(3)]
    busy = policy.submit(requests[0])
    policy.rest()  # not while it has requests
    assert not policy._asleep
    policy.cancel(busy)
    policy.rest()
    assert policy._asleep
    with torch.no_grad():
        for parameter, other in zip(model.parameters(), tiny_model(seed=6).parameters(), strict=True):
            parameter.copy_(other)
    try:
        policy.weights_changed()
        assert policy._asleep
        generations = policy.generate(requests)
        assert worst_error(model, requests, generations) < TOLERANCE
        assert {one.version for one in generations} == {policy.version} == {version + 1}
    finally:
        model.load_state_dict(old.state_dict())
        policy.weights_changed()


def test_weights_of_another_model_are_refused_and_nothing_changes(policy, model):
    version, requests = policy.version, [Request((1, 2, 3), 4)]
    with pytest.raises(PolicyError, match=r"no such weights, or of another shape: model\.norm\.weight, nope"):
        policy.update_weights({"nope": torch.zeros(1), "model.norm.weight": torch.zeros(3)})
    assert policy.version == version
    assert worst_error(model, requests, policy.generate(requests)) < TOLERANCE


def test_weights_of_nan_are_an_error_and_the_policy_recovers(policy, model):
    broken = {name: torch.full_like(weight, torch.nan) for name, weight in model.state_dict().items()}
    policy.update_weights(broken)
    with pytest.raises(PolicyError, match="not finite"):
        policy.generate([Request((1, 2, 3), 4)])
    policy.weights_changed()
    requests = [Request((1, 2, 3), 4)]
    assert worst_error(model, requests, policy.generate(requests)) < TOLERANCE
