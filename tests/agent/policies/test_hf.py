"""The transformers policy against plain forward passes: same numbers, no work twice, nothing left over."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from policy_reference import (
    VOCABULARY,
    ids,
    reference_log_probs,
    tiny_model,
    tiny_tokenizer,
    worst_error,
)

from at2po_agent.policies import hf
from at2po_agent.policies.base import Request, StreamingPolicy
from at2po_agent.policies.decoder import ModelDecoder
from at2po_agent.policies.fused import FusedDecoder
from at2po_agent.policies.hf import HFPolicy
from at2po_agent.types import Generation
from at2po_env.errors import PolicyError

TOLERANCE = 1e-4


def make_policy(model: Any, **options: Any) -> HFPolicy:
    return HFPolicy(model, tiny_tokenizer(), **options)


def ragged_requests(rng: random.Random, number: int) -> list[Request]:
    """Prefixes of 1 to 240 ids that share beginnings, some equal, some the beginning of another."""
    trunk = ids(rng, 200)
    requests = []
    for seed in range(number):
        prefix = trunk[: rng.randrange(1, 201)] + ids(rng, rng.choice([0, 0, 1, 40]))
        if requests and seed % 4 == 0:
            prefix = rng.choice(requests).prefix_ids
        requests.append(Request(prefix, rng.randrange(1, 24), seed=seed))
    return requests


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture
def general(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run models through their own modules, as large ones are."""
    monkeypatch.setattr(hf, "fits", lambda _: False)


# Numbers


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


# Independence and determinism


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


def assert_same(generations: Sequence[Generation], expected: Sequence[Generation]) -> None:
    """Equal to the last bit."""
    for one, other in zip(generations, expected, strict=True):
        assert (one.ids, one.stop_reason) == (other.ids, other.stop_reason)
        np.testing.assert_array_equal(one.log_probs, other.log_probs)


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


# Nothing is computed twice


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


# Ends


def stop_id(text: str) -> int:
    (token,) = tiny_tokenizer().encode(text)
    return token


def test_generation_ends_with_the_token_that_completes_a_stop_string(model: Any) -> None:
    marks = ("</search>", "<search>", "B", "river", "w")
    request = Request(ids(random.Random(2), 10), 400, seed=4, stop=marks)
    longer = Request(request.prefix_ids, 400, seed=4)
    generation, unstopped = make_policy(model, eos_ids=[VOCABULARY]).generate([request, longer])
    assert generation.stop_reason == "stop"
    assert len(generation.ids) > 1
    holding = [any(mark in tiny_tokenizer().decode([token]) for mark in marks) for token in generation.ids]
    assert holding == [False] * (len(holding) - 1) + [True]
    assert generation.ids == unstopped.ids[: len(generation.ids)]
    assert unstopped.stop_reason == "length"


def test_a_stop_string_may_span_tokens_and_begin_only_after_the_prefix(model: Any) -> None:
    tokenizer = tiny_tokenizer()
    policy = make_policy(model, eos_ids=[VOCABULARY])
    request = Request(tuple(tokenizer.encode("say ab")), 300, seed=1)
    (free,) = policy.generate([request])
    text = tokenizer.decode(free.ids)
    marks = [
        text[start : start + 5] for start in range(40, len(text) - 5) if text[start : start + 5].isascii()
    ]
    tried = 0
    for mark in marks[:12]:
        (stopped,) = policy.generate([Request(request.prefix_ids, 300, seed=1, stop=(mark,))])
        written = tokenizer.decode(stopped.ids)
        assert mark in written
        assert mark not in tokenizer.decode(stopped.ids[:-1])
        assert stopped.ids == free.ids[: len(stopped.ids)]
        tried += len(tokenizer.encode(mark)) > 1
    assert tried > 3


def test_end_of_sequence_is_returned_and_ends(model: Any) -> None:
    policy = make_policy(model, eos_ids=range(0, VOCABULARY, 5))
    generations = policy.generate([Request(ids(random.Random(seed), 5), 60, seed=seed) for seed in range(8)])
    for generation in generations:
        assert generation.stop_reason == "eos"
        assert [token % 5 for token in generation.ids].count(0) == 1
        assert generation.ids[-1] % 5 == 0


def test_limit_is_length_and_a_limit_of_zero_samples_nothing(model: Any) -> None:
    policy = make_policy(model, eos_ids=[VOCABULARY])
    some, none = policy.generate([Request((1, 2), 3), Request((1, 2), 0)])
    assert (len(some.ids), some.stop_reason) == (3, "length")
    assert (none.ids, none.stop_reason, len(none.log_probs)) == ((), "length", 0)


# Room


def test_requests_beyond_the_slots_wait_and_get_the_same_answers(model: Any) -> None:
    requests = ragged_requests(random.Random(4), 17)
    wide = make_policy(model).generate(requests)
    narrow = make_policy(model, slots=2).generate(requests)
    assert_same(narrow, wide)


@pytest.mark.parametrize("cache_tokens", [0, 10_000])
def test_rows_that_outgrow_the_buffers_wait_and_get_the_same_answers(model: Any, cache_tokens: int) -> None:
    rng = random.Random(4)
    requests = [Request(ids(rng, 20), 150, seed=seed) for seed in range(6)]
    wide = make_policy(model, eos_ids=[VOCABULARY]).generate(requests)
    tight = make_policy(model, kv_tokens=400, cache_tokens=cache_tokens, eos_ids=[VOCABULARY])
    assert_same(tight.generate(requests), wide)


def test_rows_of_a_known_prefix_wait_for_room_too(model: Any) -> None:
    prefix = ids(random.Random(4), 50)
    requests = [Request(prefix, 30, seed=seed) for seed in range(7)]
    wide = make_policy(model, eos_ids=[VOCABULARY]).generate(requests)
    assert_same(make_policy(model, kv_tokens=230, eos_ids=[VOCABULARY]).generate(requests), wide)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request((1,) * 1000, 25), "1000 prefix ids and max_tokens 25 exceeds the model's 1024 positions"),
        (Request((1, VOCABULARY), 1), f"holds id {VOCABULARY}; the model's ids lie in 0..{VOCABULARY - 1}"),
        (Request((-3, 1), 1), "holds id -3"),
    ],
)
def test_a_request_that_does_not_fit_is_named_and_leaves_the_others_alone(
    model: Any, request_: Request, message: str
) -> None:
    policy = make_policy(model)
    good = Request((1, 2, 3), 5, seed=1)
    expected = policy.generate([good])[0].ids
    with pytest.raises(PolicyError, match=message):
        policy.generate([good, request_])
    assert policy.poll() == []
    assert policy.generate([good])[0].ids == expected


def test_a_request_larger_than_the_buffers_is_refused(model: Any) -> None:
    with pytest.raises(PolicyError, match="kv_tokens"):
        make_policy(model, kv_tokens=100).generate([Request((1,) * 90, 20)])


# Streaming


def drain(policy: HFPolicy, tickets: set[int]) -> dict[int, Any]:
    done: dict[int, Any] = {}
    while tickets - done.keys():
        done.update(policy.poll())
    return done


def test_streamed_requests_join_at_any_time(model: Any) -> None:
    policy = make_policy(model)
    assert isinstance(policy, StreamingPolicy)
    requests = ragged_requests(random.Random(9), 10)
    expected = make_policy(model).generate(requests)
    tickets: dict[int, int] = {}
    done: dict[int, Any] = {}
    for number, request in enumerate(requests):
        tickets[policy.submit(request)] = number
        done.update(policy.poll())
    done.update(drain(policy, tickets.keys() - done.keys()))
    assert_same([done[ticket] for ticket in tickets], expected)


def test_generate_leaves_streamed_requests_to_poll(model: Any) -> None:
    policy = make_policy(model)
    ticket = policy.submit(Request((1, 2, 3), 4, seed=3))
    policy.generate([Request((4, 5), 30, seed=1)])
    assert [done for done, _ in policy.poll()] == [ticket]


def test_a_cancelled_request_is_never_reported(model: Any) -> None:
    policy = make_policy(model, slots=2, eos_ids=[VOCABULARY])
    live, waiting, kept = (policy.submit(Request((1, 2, seed), 30, seed=seed)) for seed in range(3))
    extra = policy.submit(Request((9,), 30))
    policy.poll()
    for ticket in (live, extra, waiting, 12345):
        policy.cancel(ticket)
    assert drain(policy, {kept}).keys() == {kept}
    assert policy.idle


def test_abort_returns_what_was_generated(model: Any) -> None:
    policy = make_policy(model, eos_ids=[VOCABULARY])
    request = Request((1, 2), 50, seed=1)
    (whole,) = policy.generate([request])
    ticket = policy.submit(request)
    for _ in range(5):
        policy.poll()
    part = policy.abort(ticket)
    assert part.stop_reason == "abort"
    assert part.ids == whole.ids[:5]
    with pytest.raises(PolicyError, match="no request with ticket"):
        policy.abort(ticket)


# Weights


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
    policy = make_policy(model, eos_ids=[VOCABULARY])
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


@pytest.mark.usefixtures("general")
def test_the_trainers_settings_of_the_model_are_left_alone(model: Any) -> None:
    implementation = model.config._attn_implementation
    model.train()
    make_policy(model).generate([Request((1, 2), 3)])
    assert model.training
    model.eval()
    assert model.config._attn_implementation == implementation == "sdpa"
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[1, 2]])).logits.shape == (1, 2, VOCABULARY)


# Failures


@pytest.mark.parametrize("step", [0, 1, 4])
def test_a_failing_step_can_be_repeated(model: Any, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = ragged_requests(random.Random(4), 9)
    expected = make_policy(model).generate(requests)
    policy = make_policy(model, slots=5)
    tickets = {policy.submit(request): number for number, request in enumerate(requests)}
    done: dict[int, Any] = {}
    for _ in range(step):
        done.update(policy.poll())
    real = policy.decoder.forward

    def fail(*arguments: Any) -> Any:
        real(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(policy.decoder, "forward", fail)
        with pytest.raises(KeyboardInterrupt):
            policy.poll()
    done.update(drain(policy, tickets.keys() - done.keys()))
    assert_same([done[ticket] for ticket in tickets], expected)


def test_generate_takes_its_requests_back_when_it_fails(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy(model)
    with monkeypatch.context() as patch:
        patch.setattr(policy.decoder, "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            policy.generate([Request((1, 2), 5)])
    assert policy.idle


# Interventions


class ForceAfter:
    """Forces ids once a request has generated so many."""

    def __init__(self, position: int, forced: tuple[int, ...], width: int = 3) -> None:
        self.top_log_probs = width
        self.position = position
        self.forced = forced
        self.steps: list[Any] = []

    def __call__(self, step: Any) -> tuple[int, ...]:
        self.steps.append(step)
        return self.forced if len(step.ids) == self.position else ()


def test_an_intervention_forces_tokens_and_they_are_reported(model: Any) -> None:
    prefix = ids(random.Random(1), 12)
    rule = ForceAfter(4, (11, 12, 13))
    plain = Request(prefix, 10, seed=5)
    steered = Request(prefix, 10, seed=5, intervention=rule)
    policy = make_policy(model, eos_ids=[VOCABULARY])
    untouched, generation = policy.generate([plain, steered])
    assert untouched.sampled is None
    assert generation.ids[:4] == untouched.ids[:4]
    assert generation.ids[4:7] == (11, 12, 13)
    assert generation.sampled is not None
    assert generation.sampled.tolist() == [True] * 4 + [False] * 3 + [True] * 3
    assert worst_error(model, [plain, steered], [untouched, generation]) < TOLERANCE
    # A forced token uses up its own draw only: what follows is what its place's draw gives.
    follow = Request(prefix + generation.ids[:7], 3, seed=5)
    assert policy.generate([follow])[0].ids != ()
    assert [len(step.ids) for step in rule.steps] == [0, 1, 2, 3, 4, 7, 8, 9]


def test_an_intervention_sees_the_distribution(model: Any) -> None:
    prefix = ids(random.Random(1), 12)
    rule = ForceAfter(99, (), width=4)
    (generation,) = make_policy(model, eos_ids=[VOCABULARY]).generate(
        [Request(prefix, 6, seed=5, temperature=0.7, intervention=rule)]
    )
    sequence = torch.tensor([[*prefix, *generation.ids]])
    with torch.no_grad():
        logits = model(input_ids=sequence).logits[0, len(prefix) - 1 : -1].double() / 0.7
    for step, row in zip(rule.steps, logits.log_softmax(-1), strict=True):
        assert step.entropy == pytest.approx(float(-(row.exp() * row).sum()), abs=1e-4)
        np.testing.assert_allclose(step.top_log_probs, row.sort(descending=True).values[:4], atol=TOLERANCE)


def test_a_forced_token_ends_a_generation_as_a_sampled_one_does(model: Any) -> None:
    stop = stop_id("</search>")
    rule = ForceAfter(2, (stop, 5))
    (generation,) = make_policy(model, eos_ids=[VOCABULARY]).generate(
        [Request((1, 2), 30, seed=1, stop=("</search>",), intervention=rule)]
    )
    assert generation.stop_reason == "stop"
    assert generation.ids[2:] == (stop,)


@pytest.mark.parametrize("forced", [(VOCABULARY,), (-1,)])
def test_forcing_an_unknown_id_is_an_error_and_the_policy_goes_on(
    model: Any, forced: tuple[int, ...]
) -> None:
    policy = make_policy(model, eos_ids=[VOCABULARY])
    bystander = Request((1, 2, 3), 9, seed=1)
    (expected,) = policy.generate([bystander])
    ticket = policy.submit(bystander)
    with pytest.raises(PolicyError, match="an intervention forced"):
        policy.generate([Request((1, 2), 30, seed=1, intervention=ForceAfter(2, forced))])
    assert drain(policy, {ticket})[ticket].ids == expected.ids
