import random

import pytest
from helpers.vllm_tiny_engine import POSITIONS, VOCABULARY, drain, ids, tiny_tokenizer, worst_error

from at2po_agent.policies.base import Request, StreamingPolicy
from at2po_agent.policies.hf.policy import HFPolicy
from at2po_env.errors import PolicyError

TOLERANCE = 1e-4
KINDS = [{}, {"temperature": 0.7}, {"temperature": 0.0}, {"top_p": 0.6}, {"stop": ("e", "th ", "Oslo")}]


def ragged_requests(number, **more):
    """Prefixes of 1 to 240 ids that share beginnings."""
    rng = random.Random(0)
    trunk = ids(rng, 200)
    return [
        Request(trunk[: rng.randrange(1, 201)] + ids(rng, rng.choice([0, 1, 40])), 16, seed=seed, **more)
        for seed in range(number)
    ]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_log_probs_are_those_of_transformers_and_so_are_the_draws(policy, model, kind):
    requests = ragged_requests(24, **kind)
    generations = policy.generate(requests)
    assert worst_error(model, requests, generations) < TOLERANCE
    theirs = HFPolicy(model, tiny_tokenizer()).generate(requests)
    assert [(one.ids, one.stop_reason) for one in generations] == [
        (one.ids, one.stop_reason) for one in theirs
    ]
    if "stop" in kind:
        assert {"stop", "length"} <= {one.stop_reason for one in generations}


def test_log_probs_of_another_temperature_would_be_seen(policy, model):
    requests = ragged_requests(4, temperature=0.7)
    wrong = [Request(request.prefix_ids, 16, seed=request.seed) for request in requests]
    assert worst_error(model, wrong, policy.generate(requests)) > 100 * TOLERANCE


def test_different_seeds_draw_different_tokens_and_equal_seeds_the_same(policy):
    prefix = (5, 6, 7)
    first, other, again = policy.generate([Request(prefix, 12, seed=seed) for seed in (1, 2, 1)])
    assert first.ids == again.ids != other.ids


def test_the_end_of_sequence_ends_a_generation_and_is_its_last_id(policy):
    requests = [Request((9, 8, 7), 200, seed=seed) for seed in range(16)]
    ended = [one for one in policy.generate(requests) if one.stop_reason == "eos"]
    assert ended
    assert all(one.ids[-1] == 0 and 0 not in one.ids[:-1] for one in ended)


def test_a_stop_string_of_several_tokens_ends_with_the_token_that_completes_it(policy):
    tokenizer = tiny_tokenizer()
    (whole,) = policy.generate([Request((3, 4, 5), 40, seed=1)])
    texts = [tokenizer.decode(whole.ids[:end]) for end in range(41)]
    mark = texts[22][len(texts[19]) :]  # what ids 19 to 21 wrote
    expected = next(end for end in range(41) if mark in texts[end])
    (stopped,) = policy.generate([Request((3, 4, 5), 40, seed=1, stop=(mark,))])
    assert (stopped.ids, stopped.stop_reason) == (whole.ids[:expected], "stop")
    assert policy.generate([Request((3, 4, 5), 40, seed=1)])[0].ids == whole.ids


def test_it_streams(policy):
    assert isinstance(policy, StreamingPolicy)
    late = {policy.submit(Request((1, 2), 30, seed=0))}
    assert policy.poll() == []
    early = {policy.submit(Request((3, 4), 3, seed=0))}
    order = []
    while not policy.idle:
        order += [ticket for ticket, _ in policy.poll()]
    assert order == [*early, *late]
    assert policy.poll() == []


def test_nothing_is_generated_where_nothing_is_asked_for(policy):
    (nothing,) = policy.generate([Request((1, 2), 0)])
    assert (nothing.ids, nothing.stop_reason) == ((), "length")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(tuple([1] * POSITIONS), 1), f"{POSITIONS} positions"),
        (Request((VOCABULARY,), 1), f"holds id {VOCABULARY}"),
        (Request((-1,), 1), "holds id -1"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_and_the_others_are_not_touched(policy, request_, message):
    ticket = policy.submit(Request((1, 2), 4, seed=0))
    with pytest.raises(PolicyError, match=message):
        policy.submit(request_)
    assert len(drain(policy, {ticket})[ticket].ids) == 4


def test_an_aborted_request_gives_what_it_has_and_a_cancelled_one_nothing(policy):
    whole, gone, stays = (policy.submit(Request((1, 2, seed + 3), 12, seed=seed)) for seed in range(3))
    for _ in range(5):
        assert policy.poll() == []
    part = policy.abort(whole)
    policy.cancel(gone)
    assert (len(part.ids), part.stop_reason) == (5, "abort")
    assert list(drain(policy, {stays})) == [stays]
    assert policy.idle
    with pytest.raises(PolicyError, match="no request with ticket"):
        policy.abort(whole)
    assert part.ids == policy.generate([Request((1, 2, 3), 12, seed=0)])[0].ids[:5]


def test_a_second_engine_in_this_process_is_refused_and_the_first_goes_on(policy, model):
    from at2po_agent.policies.vllm import VLLMPolicy

    with pytest.raises(PolicyError, match=r"can hold one.*close\(\)"):
        VLLMPolicy(model, tiny_tokenizer(), config=policy.config, slots=4)
    requests = ragged_requests(6)
    assert worst_error(model, requests, policy.generate(requests)) < TOLERANCE
