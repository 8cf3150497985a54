"""The transformers policy against plain forward passes: same numbers, no work twice."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers.policy_reference import (
    TOLERANCE,
    VOCABULARY,
    assert_same,
    drain,
    ids,
    make_policy,
    ragged_requests,
    reference_log_probs,
    tiny_model,
    worst_error,
)

from at2po_agent.policies.base import Request
from at2po_agent.policies.hf import policy as hf
from at2po_agent.policies.hf.decoder import ModelDecoder
from at2po_agent.policies.hf.fused import FusedDecoder
from at2po_env.errors import PolicyError


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.mark.parametrize("path", ["fused", "modules"])
@pytest.mark.parametrize("architecture", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("slots", [3, 64])
def test_log_probs_equal_a_plain_forward_pass(
    architecture: Any, path: str, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "modules":
        monkeypatch.setattr(hf, "fits", lambda _: False)
    model = tiny_model(architecture)
    policy = make_policy(model, slots=slots)
    assert isinstance(policy.decoder, FusedDecoder if path == "fused" else ModelDecoder)
    rng = random.Random(slots)
    requests = ragged_requests(rng, 14)
    generations = policy.generate(requests)
    for generation_of_forks in range(2):  # forks of forks, two of each
        follow = [
            Request(request.prefix_ids + done.ids + ids(rng, 3), 9, seed=2 * number + generation_of_forks)
            for number, (request, done) in enumerate(zip(requests, generations, strict=True))
        ]
        requests = [fork for request in follow[:6] for fork in (request, forked(request, 99))]
        generations = policy.generate(requests)
        assert worst_error(model, requests, generations) < TOLERANCE
    assert any(len(generation.ids) > 1 for generation in generations)


def forked(request: Request, seed: int) -> Request:
    return Request(request.prefix_ids, request.max_tokens, seed=request.seed + seed)


def test_the_tolerance_tells_a_shifted_position_apart(model: Any) -> None:
    request = Request(ids(random.Random(0), 30), 12, seed=1)
    (generation,) = make_policy(model).generate([request])
    right = reference_log_probs(model, request, generation)
    shifted = Request((7, *request.prefix_ids), 12)
    assert (right - reference_log_probs(model, shifted, generation)).abs().max() > 100 * TOLERANCE


def other_family(name: str) -> Any:
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "pad_token_id": None,
    }
    special: dict[str, dict[str, Any]] = {
        "mistral": {"sliding_window": 11},
        "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        "gemma3_text": {"sliding_window": 9, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
        "phi3": {},
        "olmo2": {},
    }
    config = transformers.AutoConfig.for_model(name, **common, **special[name])
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", ["mistral", "qwen3_moe", "gemma3_text", "phi3", "olmo2"])
def test_other_families_run_through_the_attention_interface(name: str) -> None:
    model = other_family(name)
    policy = make_policy(model)
    assert isinstance(policy.decoder, ModelDecoder)
    rng = random.Random(1)
    requests = ragged_requests(rng, 6)
    assert worst_error(model, requests, policy.generate(requests)) < TOLERANCE


class Doubled(torch.nn.Linear):
    """A layer that is more than its weight, as adapters are."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("change", ["adapter", "hook"])
def test_a_changed_model_runs_through_its_modules(change: str) -> None:
    model = tiny_model()
    projection = model.model.layers[0].self_attn.q_proj
    if change == "adapter":
        projection.__class__ = Doubled
    else:
        projection.register_forward_hook(lambda *arguments: 2 * arguments[-1])
    policy = make_policy(model)
    assert isinstance(policy.decoder, ModelDecoder)
    requests = ragged_requests(random.Random(1), 4)
    assert worst_error(model, requests, policy.generate(requests)) < TOLERANCE


def test_half_precision_runs() -> None:
    half = tiny_model().to(torch.bfloat16)
    requests = ragged_requests(random.Random(3), 5)
    generations = make_policy(half).generate(requests)
    assert worst_error(half, requests, generations) < 0.5
    assert all(np.isfinite(generation.log_probs).all() for generation in generations)


def test_model_without_a_cache_of_keys_and_values_is_refused() -> None:
    config = transformers.MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(PolicyError, match="MambaForCausalLM"):
        make_policy(transformers.MambaForCausalLM(config))


def test_soft_capped_attention_is_refused() -> None:
    config = transformers.Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=16,
        pad_token_id=None,
    )
    policy = make_policy(transformers.Gemma2ForCausalLM(config).eval())
    with pytest.raises(PolicyError, match="soft-capped"):
        policy.generate([Request((1, 2), 2)])


@pytest.mark.parametrize("path", ["fused", "modules"])
def test_the_rest_of_the_batch_changes_no_bit(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "modules":
        monkeypatch.setattr(hf, "fits", lambda _: False)
    model = tiny_model()
    requests = ragged_requests(random.Random(5), 20)
    together = make_policy(model).generate(requests)
    few = make_policy(model, slots=3).generate(requests)
    streaming = make_policy(model)
    tickets = []
    streamed: dict[int, Any] = {}
    for request in reversed(requests):
        tickets.append(streaming.submit(request))
        streamed.update(streaming.poll())
    streamed.update(drain(streaming, set(tickets) - streamed.keys()))
    one_by_one = [make_policy(model).generate([request])[0] for request in requests]
    for others in (few, [streamed[ticket] for ticket in reversed(tickets)], one_by_one):
        assert_same(others, together)


def test_same_requests_give_the_same_generations_bit_for_bit(model: Any) -> None:
    requests = ragged_requests(random.Random(6), 12)
    first, second = (make_policy(model).generate(requests) for _ in range(2))
    assert_same(first, second)


def test_seeds_decide_the_draws(model: Any) -> None:
    prefix = ids(random.Random(0), 20)
    generations = make_policy(model).generate([Request(prefix, 10, seed=seed) for seed in (1, 1, 2, 3)])
    assert generations[0].ids == generations[1].ids
    assert len({generation.ids for generation in generations}) > 1


def test_sampling_follows_the_model(model: Any) -> None:
    prefix, draws = ids(random.Random(0), 20), 2000
    request = Request(prefix, 1)
    policy = make_policy(model)
    counts = np.zeros(VOCABULARY)
    for generation in policy.generate([Request(prefix, 1, seed=seed) for seed in range(draws)]):
        counts[generation.ids[0]] += 1
    with torch.no_grad():
        expected = (
            model(input_ids=torch.tensor([request.prefix_ids])).logits[0, -1].softmax(-1).numpy() * draws
        )
    likely = expected >= 5
    # Pearson's statistic has mean d and variance 2 d; a wrong temperature of 0.8 lies far outside.
    statistic = (((counts - expected) ** 2 / expected)[likely]).sum()
    degrees = likely.sum()
    assert degrees > 10
    assert statistic < degrees + 6 * np.sqrt(2 * degrees)
    cooler = expected**1.25 / (expected**1.25).sum() * draws
    assert (((counts - cooler) ** 2 / cooler)[likely]).sum() > degrees + 6 * np.sqrt(2 * degrees)


def test_greedy_takes_the_most_likely_token(model: Any) -> None:
    request = Request(ids(random.Random(2), 25), 15, temperature=0.0, seed=9)
    (generation,) = make_policy(model).generate([request])
    sequence = list(request.prefix_ids)
    for token in generation.ids:
        with torch.no_grad():
            assert int(model(input_ids=torch.tensor([sequence])).logits[0, -1].argmax()) == token
        sequence.append(token)
    assert worst_error(model, [request], [generation]) < TOLERANCE


def test_settings_of_one_request_do_not_leak_into_another(model: Any) -> None:
    prefix = ids(random.Random(2), 25)
    kinds = [
        Request(prefix, 12, seed=4),
        Request(prefix, 12, seed=4, temperature=0.5),
        Request(prefix, 12, seed=4, temperature=0.0),
        Request(prefix, 12, seed=4, top_p=0.3),
    ]
    mixed = make_policy(model).generate(kinds)
    assert worst_error(model, kinds, mixed) < TOLERANCE  # at each request's own temperature
    for request, generation in zip(kinds, mixed, strict=True):
        assert make_policy(model).generate([request])[0].ids == generation.ids
    assert len({generation.ids for generation in mixed}) == 4


def test_top_p_keeps_to_the_nucleus(model: Any) -> None:
    request = Request(ids(random.Random(2), 25), 40, seed=4, top_p=0.4)
    (generation,) = make_policy(model).generate([request])
    sequence = torch.tensor([[*request.prefix_ids, *generation.ids]])
    with torch.no_grad():
        probs = model(input_ids=sequence).logits[0, len(request.prefix_ids) - 1 : -1].softmax(-1)
    for row, token in zip(probs, generation.ids, strict=True):
        assert float(row[row > row[token]].sum()) < 0.4  # the mass before a kept token


def test_a_shared_prompt_is_computed_once_even_by_requests_of_one_step(model: Any) -> None:
    policy = make_policy(model)
    prompt = ids(random.Random(0), 50)
    policy.generate([Request(prompt, 4, seed=seed) for seed in range(6)])
    assert policy.stats.prefill_tokens == 50
    assert policy.stats.cached_tokens == 5 * 50


def test_branches_of_one_step_share_their_beginning(model: Any) -> None:
    policy = make_policy(model)
    rng = random.Random(0)
    trunk = ids(rng, 30)
    prefixes = [(*trunk, 1, *ids(rng, 9)), (*trunk[:20], 2, *ids(rng, 4)), (*trunk, 3), (*trunk, 1, 5)]
    requests = [Request(prefix, 6, seed=seed) for seed, prefix in enumerate(prefixes)]
    generations = policy.generate(requests)
    distinct = {prefix[:end] for prefix in prefixes for end in range(1, len(prefix) + 1)}
    assert policy.stats.prefill_tokens == len(distinct)
    assert worst_error(model, requests, generations) < TOLERANCE


def test_a_turn_is_continued_from_its_decoded_keys_and_values(model: Any) -> None:
    policy = make_policy(model)
    rng = random.Random(0)
    prompt, observation = ids(rng, 40), ids(rng, 15)
    (turn,) = policy.generate([Request(prompt, 12, seed=3)])
    before = policy.stats.prefill_tokens
    prefix = prompt + turn.ids + observation
    requests = [Request(prefix, 5, seed=seed) for seed in range(3)]
    generations = policy.generate(requests)
    # The observation, and the last sampled id: it was never fed.
    assert policy.stats.prefill_tokens - before == 15 + 1
    before = policy.stats.prefill_tokens
    policy.generate([Request(prefix, 5, seed=7)])  # a fork of that turn
    assert policy.stats.prefill_tokens == before
    assert worst_error(model, requests, generations) < TOLERANCE


def test_the_cache_stays_within_its_budget_and_results_do_not_depend_on_it(model: Any) -> None:
    requests = ragged_requests(random.Random(8), 16)
    expected = make_policy(model).generate(requests)
    small = make_policy(model, cache_tokens=60, slots=4)
    generations = small.generate(requests) + small.generate(requests)
    small.generate([Request((1,), 1)])
    assert small.cached_now <= 60 + 2
    assert_same(generations, expected * 2)
