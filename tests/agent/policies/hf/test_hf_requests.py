"""How requests end, wait, stream, fail and are intervened in."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from helpers.policy_reference import (
    TOLERANCE,
    VOCABULARY,
    assert_same,
    drain,
    ids,
    make_policy,
    ragged_requests,
    stop_id,
    tiny_model,
    tiny_tokenizer,
    worst_error,
)

from at2po_agent.policies.base import Request, StreamingPolicy
from at2po_env.errors import PolicyError


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


def test_generation_ends_with_the_token_that_completes_a_stop_string(model: Any) -> None:
    marks = ("</search>", "<search>", "B", "river", "w")
    request = Request(ids(random.Random(2), 10), 400, seed=4, stop=marks)
    longer = Request(request.prefix_ids, 400, seed=4)
    generation, unstopped = make_policy(model, eos_ids=()).generate([request, longer])
    assert generation.stop_reason == "stop"
    assert len(generation.ids) > 1
    holding = [any(mark in tiny_tokenizer().decode([token]) for mark in marks) for token in generation.ids]
    assert holding == [False] * (len(holding) - 1) + [True]
    assert generation.ids == unstopped.ids[: len(generation.ids)]
    assert unstopped.stop_reason == "length"


def test_a_stop_string_may_span_tokens_and_begin_only_after_the_prefix(model: Any) -> None:
    tokenizer = tiny_tokenizer()
    policy = make_policy(model, eos_ids=())
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
    policy = make_policy(model, eos_ids=())
    some, none = policy.generate([Request((1, 2), 3), Request((1, 2), 0)])
    assert (len(some.ids), some.stop_reason) == (3, "length")
    assert (none.ids, none.stop_reason, len(none.log_probs)) == ((), "length", 0)


def test_requests_beyond_the_slots_wait_and_get_the_same_answers(model: Any) -> None:
    requests = ragged_requests(random.Random(4), 17)
    wide = make_policy(model).generate(requests)
    narrow = make_policy(model, slots=2).generate(requests)
    assert_same(narrow, wide)


@pytest.mark.parametrize("cache_tokens", [0, 10_000])
def test_rows_that_outgrow_the_buffers_wait_and_get_the_same_answers(model: Any, cache_tokens: int) -> None:
    rng = random.Random(4)
    requests = [Request(ids(rng, 20), 150, seed=seed) for seed in range(6)]
    wide = make_policy(model, eos_ids=()).generate(requests)
    tight = make_policy(model, kv_tokens=400, cache_tokens=cache_tokens, eos_ids=())
    assert_same(tight.generate(requests), wide)


def test_rows_of_a_known_prefix_wait_for_room_too(model: Any) -> None:
    prefix = ids(random.Random(4), 50)
    requests = [Request(prefix, 30, seed=seed) for seed in range(7)]
    wide = make_policy(model, eos_ids=()).generate(requests)
    assert_same(make_policy(model, kv_tokens=230, eos_ids=()).generate(requests), wide)


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
    policy = make_policy(model, slots=2, eos_ids=())
    live, waiting, kept = (policy.submit(Request((1, 2, seed), 30, seed=seed)) for seed in range(3))
    extra = policy.submit(Request((9,), 30))
    policy.poll()
    for ticket in (live, extra, waiting, 12345):
        policy.cancel(ticket)
    assert drain(policy, {kept}).keys() == {kept}
    assert policy.idle


def test_abort_returns_what_was_generated(model: Any) -> None:
    policy = make_policy(model, eos_ids=())
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
    policy = make_policy(model, eos_ids=())
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
    (generation,) = make_policy(model, eos_ids=()).generate(
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
    (generation,) = make_policy(model, eos_ids=()).generate(
        [Request((1, 2), 30, seed=1, stop=("</search>",), intervention=rule)]
    )
    assert generation.stop_reason == "stop"
    assert generation.ids[2:] == (stop,)


@pytest.mark.parametrize("forced", [(VOCABULARY,), (-1,)])
def test_forcing_an_unknown_id_is_an_error_and_the_policy_goes_on(
    model: Any, forced: tuple[int, ...]
) -> None:
    policy = make_policy(model, eos_ids=())
    bystander = Request((1, 2, 3), 9, seed=1)
    (expected,) = policy.generate([bystander])
    ticket = policy.submit(bystander)
    with pytest.raises(PolicyError, match="an intervention forced"):
        policy.generate([Request((1, 2), 30, seed=1, intervention=ForceAfter(2, forced))])
    assert drain(policy, {ticket})[ticket].ids == expected.ids
