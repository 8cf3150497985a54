import asyncio
import json
import threading
import time
from email.utils import formatdate
from typing import Any

import numpy as np
import pytest
from helpers.served_fake import (
    Behaviour,
    FakeServer,
    Reply,
    Seen,
    chat,
    chat_log_probs,
    completion,
    error,
    serving,
)

from at2po_agent.policies.base import Request, StreamingPolicy
from at2po_agent.policies.openai import OpenAIPolicy
from at2po_agent.policies.openai.client import Server, normal_url
from at2po_agent.policies.openai.errors import retry_after
from at2po_agent.policies.openai.messages import Dialect
from at2po_agent.policies.openai.stats import Prices
from at2po_agent.policies.openai.tokens import RoleTranscript
from at2po_env.errors import ConfigError, PolicyError


def policy_for(fake: FakeServer, model: str | None = "tiny", **options: Any) -> OpenAIPolicy:
    patience = {"retries": 3, "backoff_s": 0.01, **options.pop("patience", {})}
    return OpenAIPolicy(Server(fake.url, **patience), model, **options)


def ask(text: str = "hi", **options: Any) -> Request:
    return Request(tuple(RoleTranscript().open(text)), **{"max_tokens": 400, "temperature": 0.0, **options})


def prompt_of(seen: Seen) -> str:
    return str(seen.body["messages"][-1]["content"])


def in_turn(*behaviours: Any) -> Behaviour:
    """One reply after the other; the last repeats."""
    rest, lock = list(behaviours), threading.Lock()

    def answer(seen: Seen) -> Any:
        with lock:
            reply = rest.pop(0) if len(rest) > 1 else rest[0]
        return reply(seen) if callable(reply) else reply

    return answer


def nothing_under_way(policy: OpenAIPolicy) -> None:
    deadline = time.monotonic() + 20
    while policy.under_way and time.monotonic() < deadline:
        time.sleep(0.005)
    assert policy.under_way == 0


def echo(seen: Seen) -> Any:
    return chat(prompt_of(seen).upper())


def test_answers_come_in_order_whatever_finishes_first() -> None:
    def slow_first(seen: Seen) -> Reply:
        return Reply(echo(seen), delay=0.2 if prompt_of(seen) == "q0" else 0.0)

    with serving(slow_first) as fake, policy_for(fake) as policy:
        assert isinstance(policy, StreamingPolicy)
        answers = policy.generate([ask(f"q{number}") for number in range(5)])
        assert [policy.tokenizer.decode(one.ids[:-1]) for one in answers] == ["Q0", "Q1", "Q2", "Q3", "Q4"]
        assert {one.stop_reason for one in answers} == {"eos"}
        nothing_under_way(policy)


def test_the_completion_endpoint_continues_text_and_gives_log_probs() -> None:
    told = completion("ok", logprobs={"tokens": ["o", "k"], "token_logprobs": [-0.5, -1.5]}, stop_reason=None)
    with serving(lambda _: told) as fake, policy_for(fake, dialect=Dialect("completions")) as policy:
        request = Request(tuple(policy.transcript.open("hello")), max_tokens=40)
        (answer,) = policy.generate([request])
        assert fake.seen[0].path == "/v1/completions"
        assert fake.bodies[0]["prompt"] == "hello"
        assert answer.log_probs.tolist() == [-0.5, -1.5, 0.0]


def test_never_more_requests_than_allowed_and_as_many() -> None:
    with (
        serving(lambda seen: Reply(echo(seen), delay=0.05)) as fake,
        policy_for(fake, concurrency=3) as policy,
    ):
        policy.generate([ask() for _ in range(12)])
        assert fake.most_under_way == 3


def test_requests_join_while_others_are_under_way() -> None:
    with serving(lambda seen: Reply(echo(seen), delay=0.05)) as fake, policy_for(fake) as policy:
        first = policy.submit(ask("a"))
        seen: dict[int, Any] = {}
        second = policy.submit(ask("b"))
        while len(seen) < 2:
            seen.update(policy.poll())
        assert set(seen) == {first, second}
        assert policy.poll() == []


# --- failures that pass ----------------------------------------------------------------------------------

PASSING: dict[str, Any] = {
    "status 500": Reply(error("oops"), status=500),
    "status 503": Reply(b"<html>down</html>", status=503),
    "status 408": Reply(error("slow"), status=408),
    "status 409": Reply(error("conflict"), status=409),
    "status 429": Reply(error("too fast"), status=429, headers={"Retry-After": "0.05"}),
    "truncated": Reply(chat("never seen"), cut=20),
    "truncated JSON": Reply(json.dumps(chat("never seen"))[:-20].encode()),
    "no JSON": Reply(b"hello"),
    "wrong shape": Reply({"choices": [{"message": {"content": 7}}]}),
    "no choices": Reply({}),
    "dropped": Reply(drop=True),
}


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_tried_again(fault: str) -> None:
    with serving(in_turn(PASSING[fault], PASSING[fault], echo)) as fake, policy_for(fake) as policy:
        (answer,) = policy.generate([ask()])
        assert policy.tokenizer.decode(answer.ids[:-1]) == "HI"
        stats = policy.stats
        assert (stats.requests, stats.tries, stats.retries, stats.failures) == (1, 3, 2, 0)


@pytest.mark.parametrize("fault", sorted(PASSING.keys() - {"status 429"}))
def test_what_does_not_pass_is_an_aborted_generation_with_a_reason(fault: str) -> None:
    with serving(lambda _: PASSING[fault]) as fake, policy_for(fake) as policy:
        (answer,) = policy.generate([ask()])
        assert (answer.ids, answer.stop_reason) == ((), "abort")
        stats = policy.stats
        assert (stats.tries, stats.retries, stats.failures) == (4, 3, 1)
        kinds = {"truncated": "connection", "truncated JSON": "bad answer", "no JSON": "bad answer"}
        kinds |= {"wrong shape": "bad answer", "no choices": "bad answer", "dropped": "connection"}
        assert stats.reasons == {kinds.get(fault, fault): 1}
        assert "(4 tries)" in stats.last_failure


def test_a_server_says_when_to_come_back() -> None:
    busy = Reply(error("too fast"), status=429, headers={"Retry-After": "0.4"})
    with serving(in_turn(busy, echo)) as fake, policy_for(fake) as policy:
        policy.generate([ask()])
        assert fake.seen[1].at - fake.seen[0].at >= 0.4


def test_a_server_that_says_come_back_tomorrow_is_given_up_now() -> None:
    busy = Reply(error("too fast"), status=429, headers={"Retry-After": "86400"})
    with serving(lambda _: busy) as fake, policy_for(fake) as policy:
        start = time.monotonic()
        (answer,) = policy.generate([ask()])
        assert answer.stop_reason == "abort"
        assert time.monotonic() - start < 60
        assert "none left before the deadline" in policy.stats.last_failure


def test_a_busy_server_is_asked_until_the_deadline() -> None:
    busy = Reply(error("too fast"), status=429)
    with serving(in_turn(*[busy] * 8, echo)) as fake, policy_for(fake, patience={"retries": 1}) as policy:
        (answer,) = policy.generate([ask()])
        assert (answer.stop_reason, policy.stats.retries) == ("eos", 8)
    with serving(lambda _: busy) as fake, policy_for(fake, patience={"timeout_s": 0.5}) as policy:
        (answer,) = policy.generate([ask()])
        assert (answer.stop_reason, policy.stats.failures) == ("abort", 1)


def test_retry_after_is_a_number_or_a_date() -> None:
    assert retry_after("1.5") == 1.5
    assert retry_after("-3") == retry_after("") == retry_after("soon") == 0.0
    assert 50 < retry_after(formatdate(time.time() + 60, usegmt=True)) <= 60


def test_pauses_grow_and_differ() -> None:
    down = Reply(error("oops"), status=500)
    patience = {"retries": 4, "backoff_s": 0.05}
    with serving(lambda _: down) as fake, policy_for(fake, patience=patience) as policy:
        policy.generate([ask()])
        gaps = np.diff([seen.at for seen in fake.seen])
        for gap, longest in zip(gaps, (0.05, 0.1, 0.2, 0.4), strict=True):
            assert gap >= longest / 2


def test_a_slow_try_is_given_up_and_made_again() -> None:
    slow = in_turn(lambda seen: Reply(echo(seen), delay=20.0), echo)
    with serving(slow) as fake, policy_for(fake, patience={"attempt_s": 0.2}) as policy:
        start = time.monotonic()
        (answer,) = policy.generate([ask()])
        assert (answer.stop_reason, time.monotonic() - start < 15) == ("eos", True)


def test_the_deadline_holds_over_all_tries() -> None:
    slow = lambda seen: Reply(echo(seen), delay=0.3)  # noqa: E731
    patience = {"attempt_s": 0.1, "timeout_s": 0.35, "retries": 100}
    with serving(slow) as fake, policy_for(fake, patience=patience) as policy:
        start = time.monotonic()
        (answer,) = policy.generate([ask()])
        assert answer.stop_reason == "abort"
        assert time.monotonic() - start < 8  # a hundred tries would take ten seconds and more
        assert set(policy.stats.reasons) <= {"deadline", "timeout"}


# --- failures that stop everything -----------------------------------------------------------------------


def test_a_wrong_key_is_one_message_without_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", "sk-very-secret")
    refused = Reply(error("Incorrect API key provided: sk-very-secret"), status=401)
    with serving(lambda _: refused) as fake:
        policy = policy_for(fake, patience={"api_key_env": "TEST_KEY"})
        with policy, pytest.raises(PolicyError, match=r"refuses the key .*\[key\]") as caught:
            policy.generate([ask()])
        assert fake.seen[0].headers["Authorization"] == "Bearer sk-very-secret"
        assert len(fake.seen) == 1
        told = f"{caught.value} {policy.server} {policy.stats.to_json()} {vars(policy)}"
        assert "very-secret" not in told


def test_no_key_is_sent_that_nobody_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    with serving(echo) as fake, policy_for(fake) as policy:
        policy.generate([ask()])
        assert "Authorization" not in fake.seen[0].headers
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY holds no key"):
        Server("http://localhost", api_key_env="OPENAI_API_KEY")


def test_a_model_that_is_not_there_is_told_with_those_that_are() -> None:
    refused = Reply(error("The model `tinny` does not exist."), status=404)
    with (
        serving(lambda _: refused, models=["tiny", "large"]) as fake,
        policy_for(fake, "tinny") as policy,
        pytest.raises(PolicyError, match="serves no model 'tinny'; it has: tiny, large"),
    ):
        policy.generate([ask()])


def test_an_address_without_the_endpoint_is_told_as_that() -> None:
    with (
        serving(lambda _: Reply({"detail": "Not Found"}, status=404)) as fake,
        policy_for(fake) as policy,
        pytest.raises(PolicyError, match="has no /chat/completions for 'tiny'"),
    ):
        policy.generate([ask()])


def test_the_only_model_needs_no_name() -> None:
    with serving(echo, models=["only"]) as fake, policy_for(fake, None) as policy:
        policy.generate([ask()])
        assert fake.bodies[0]["model"] == "only"
    with (
        serving(echo, models=["a", "b"]) as fake,
        policy_for(fake, None) as policy,
        pytest.raises(PolicyError, match=r"which model\? it lists a, b"),
    ):
        policy.generate([ask()])
    with policy_for(fake, None) as policy, pytest.raises(PolicyError, match="or is not there"):
        policy.generate([ask()])


@pytest.mark.parametrize("status", [301, 405])
def test_what_is_no_such_server_is_told(status: int) -> None:
    with (
        serving(lambda _: Reply(b"elsewhere", status=status)) as fake,
        policy_for(fake) as policy,
        pytest.raises(PolicyError, match=f"not how an OpenAI-compatible server answers .status {status}"),
    ):
        policy.generate([ask()])


def test_an_account_that_cannot_pay_is_not_asked_again() -> None:
    broke = Reply(error("You exceeded your current quota", code="insufficient_quota"), status=429)
    with serving(lambda _: broke) as fake, policy_for(fake) as policy:
        with pytest.raises(PolicyError, match="cannot pay"):
            policy.generate([ask()])
        assert len(fake.seen) == 1


def test_a_bad_request_stops_at_once_before_anything_was_answered_and_is_data_after() -> None:
    refused = Reply(error("messages: invalid"), status=400)
    with serving(in_turn(echo, refused)) as fake, policy_for(fake) as policy:
        answers = [policy.generate([ask()])[0].stop_reason for _ in range(2)]
        assert answers == ["eos", "abort"]
        assert policy.stats.reasons == {"status 400": 1}
    with (
        serving(lambda _: refused) as fake,
        policy_for(fake) as policy,
        pytest.raises(PolicyError, match="refuses the request: status 400: messages: invalid"),
    ):
        policy.generate([ask()])


def test_too_many_failures_in_a_row_are_an_error_that_tells_why() -> None:
    down = Reply(error("out of memory"), status=500)
    with serving(lambda _: down) as fake:
        policy = policy_for(fake, max_failures=5, concurrency=2, patience={"retries": 0})
        with (
            policy,
            pytest.raises(PolicyError, match=r"5 requests in a row failed.*out of memory.*status 500 5"),
        ):
            policy.generate([ask() for _ in range(50)])
        assert len(fake.seen) < 12  # and the others are not asked any more
        nothing_under_way(policy)


def test_failures_that_are_not_in_a_row_are_data() -> None:
    down = Reply(error("oops"), status=500)
    order = in_turn(*([down, down, echo] * 4))
    with serving(order) as fake:
        policy = policy_for(fake, max_failures=3, concurrency=1, patience={"retries": 0})
        with policy:
            reasons = [answer.stop_reason for answer in policy.generate([ask() for _ in range(12)])]
    assert reasons == ["abort", "abort", "eos"] * 4


def test_a_refusal_that_is_nested_too_deeply_is_an_error_like_any_other() -> None:
    deep = Reply(b"[" * 100_000, status=404)
    with (
        serving(lambda _: deep, models=Reply(b"[" * 100_000)) as fake,
        policy_for(fake) as policy,
        pytest.raises(PolicyError, match="or no model"),
    ):
        policy.generate([ask()])


def test_a_refused_answer_is_data() -> None:
    filtered = Reply(error("Your prompt was flagged", code="content_filter"), status=400)
    cut = chat("so f", finish="content_filter")
    with serving(in_turn(filtered, cut)) as fake, policy_for(fake, max_failures=1) as policy:
        answers = [policy.generate([ask()])[0] for _ in range(2)]
        assert [one.stop_reason for one in answers] == ["abort", "abort"]
        assert policy.tokenizer.decode(answers[1].ids) == "so f"
        assert policy.stats.reasons == {"content filter": 2}


# --- a full context, and what servers refuse -------------------------------------------------------------


def full(seen: Seen) -> Any:
    """As OpenAI says it: 8 of 40 tokens are left."""
    if seen.body["max_tokens"] <= 8:
        return chat("short", finish="length")
    asked = seen.body["max_tokens"]
    text = (
        f"This model's maximum context length is 40 tokens. However, you requested {32 + asked} tokens "
        f"(32 in the messages, {asked} in the completion)."
    )
    return Reply(error(text, code="context_length_exceeded"), status=400)


def test_an_answer_is_shortened_to_what_the_context_has_room_for() -> None:
    with serving(full) as fake, policy_for(fake) as policy:
        (answer,) = policy.generate([ask()])
        assert (policy.tokenizer.decode(answer.ids), answer.stop_reason) == ("short", "length")
        assert [body["max_tokens"] for body in fake.bodies] == [100, 8]
        assert (policy.stats.shortened, policy.stats.failures) == (1, 0)


@pytest.mark.parametrize(
    "text",
    [
        "max_tokens={} cannot be greater than max_model_len=60. Please request fewer output tokens.",
        "max_tokens is too large: {}. This model supports at most 60 completion tokens, you gave {}.",
    ],
)
def test_a_limit_of_answers_is_respected(text: str) -> None:
    def model(seen: Seen) -> Any:
        asked = seen.body["max_tokens"]
        if asked <= 60:
            return full(seen)  # which then wants at most 8
        return Reply(error(text.format(asked, asked), param="max_tokens", code="invalid_value"), status=400)

    with serving(model) as fake, policy_for(fake) as policy:
        (answer,) = policy.generate([ask()])
        assert answer.stop_reason == "length"
        assert [body["max_tokens"] for body in fake.bodies] == [100, 60, 8]
        assert (policy.stats.shortened, policy.stats.left_out) == (1, [])


def test_a_value_that_decides_draws_is_never_left_out_for_being_wrong() -> None:
    refused = Reply(error("temperature must be at most 2.0, got 5.0", param="temperature"), status=400)
    with (
        serving(lambda _: refused) as fake,
        policy_for(fake) as policy,
        pytest.raises(PolicyError, match="temperature must be at most"),
    ):
        policy.generate([ask(temperature=5.0)])


@pytest.mark.parametrize(
    "text",
    [
        "This model's maximum context length is 128 tokens. However, your prompt contains at least 129 input "
        "tokens, which exceeds this limit even without any output tokens.",
        "The prompt is too long: it exceeds the context window",
    ],
)
def test_a_full_context_is_data_and_no_fault_of_the_server(text: str) -> None:
    refused = Reply(error(text, code=400), status=400)
    with serving(lambda _: refused) as fake, policy_for(fake, max_failures=1) as policy:
        answers = policy.generate([ask(), ask()])
        assert [one.stop_reason for one in answers] == ["abort", "abort"]
        assert policy.stats.reasons == {"context": 2}
        assert policy.stats.tries == 2


def test_what_a_server_refuses_is_left_out_from_then_on_and_told() -> None:
    def picky(seen: Seen) -> Any:
        body = seen.body
        if "max_tokens" in body:
            text = (
                "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."
            )
            return Reply(error(text, param="max_tokens", code="unsupported_parameter"), status=400)
        if "temperature" in body:
            text = "Unsupported value: 'temperature' does not support 0.0 with this model."
            return Reply(error(text, param="temperature", code="unsupported_value"), status=400)
        if "stop" in body:
            return Reply(error("at most 4 stop strings are allowed", param="stop"), status=400)
        if "logprobs" in body:
            return Reply({"detail": "Unrecognized request argument supplied: logprobs"}, status=422)
        return echo(seen)

    with serving(picky) as fake, policy_for(fake) as policy:
        first, second = policy.generate([ask("a")]), policy.generate([ask("<x>b</x>c", stop=("</X>",))])
        assert fake.bodies[1]["max_completion_tokens"] == 100
        assert set(policy.stats.left_out) == {"max_tokens", "temperature", "stop", "logprobs"}
        assert policy.tokenizer.decode(first[0].ids[:-1]) == "A"
        assert policy.tokenizer.decode(second[0].ids) == "<X>B</X>"  # cut here, since the server did not
        assert second[0].stop_reason == "stop"


# --- counting --------------------------------------------------------------------------------------------


def test_tokens_and_costs_are_those_of_the_server() -> None:
    usage = {"prompt_tokens": 1000, "completion_tokens": 200, "prompt_tokens_details": {"cached_tokens": 600}}
    with serving(lambda _: chat("x", usage=usage)) as fake:
        with policy_for(fake, prices=Prices(input=2.0, output=8.0, cached=0.5)) as policy:
            policy.generate([ask(), ask()])
        told = policy.stats.to_json()
        assert (told["prompt_tokens"], told["completion_tokens"], told["cached_tokens"]) == (2000, 400, 1200)
        # by hand: 800 x 2 + 1200 x 0.5 + 400 x 8 = 5400 millionths
        assert told["cost"] == pytest.approx(0.0054)
        with policy_for(fake, prices=Prices(input=2.0, output=8.0)) as policy:
            policy.generate([ask()])
        assert policy.stats.cost == pytest.approx(0.0036)  # 1000 x 2 + 200 x 8
        with policy_for(fake) as policy:
            policy.generate([ask()])
        assert policy.stats.cost is None


def test_prices_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="price of output"):
        Prices(output=-1.0)
    with pytest.raises(ConfigError, match="cached"):
        Prices(cached=1.0)


def test_an_answer_that_was_paid_and_could_not_be_read_is_tried_again() -> None:
    with serving(in_turn({"choices": [], "usage": {"prompt_tokens": 5}}, echo)) as fake:
        with policy_for(fake) as policy:
            policy.generate([ask()])
        assert policy.stats.prompt_tokens == 15


def test_log_probs_of_chats_reach_the_generation() -> None:
    told = chat(
        "Hi", logprobs=chat_log_probs(("H", -0.5), ("i", -0.25), ("<|im_end|>", -1.0)), stop_reason=None
    )
    with serving(lambda _: told) as fake, policy_for(fake) as policy:
        (answer,) = policy.generate([ask()])
        assert answer.log_probs.tolist() == [-0.5, -0.25, -1.0]


# --- coming and going ------------------------------------------------------------------------------------


def test_a_cancelled_request_leaves_no_task_and_no_answer() -> None:
    def model(seen: Seen) -> Reply:
        return Reply(echo(seen), delay=0.0 if prompt_of(seen) == "again" else 20.0)

    with serving(model) as fake, policy_for(fake, concurrency=2) as policy:
        tickets = [policy.submit(ask()) for _ in range(6)]
        while not fake.seen:
            time.sleep(0.005)
        for ticket in tickets:
            policy.cancel(ticket)
            policy.cancel(ticket)
        nothing_under_way(policy)
        assert policy.stats.unanswered == 6
        assert len(fake.seen) <= 2  # those that waited for a slot were never asked
        assert policy.poll() == []
        (answer,) = policy.generate([ask("again")])
        assert answer.stop_reason == "eos"


def test_closing_ends_the_thread_and_every_task() -> None:
    before = set(threading.enumerate())
    with serving(lambda seen: Reply(echo(seen), delay=0.5)) as fake:
        policy = policy_for(fake)
        for _ in range(4):
            policy.submit(ask())
        while len(fake.seen) < 4:
            time.sleep(0.005)
        (thread,) = [one for one in threading.enumerate() if one.name == "at2po-served" and one not in before]
        assert policy._loop is not None
        policy.close()
        policy.close()
        assert not thread.is_alive()
        assert policy._loop.is_closed()
        assert not asyncio.all_tasks(policy._loop)
        with pytest.raises(PolicyError, match="closed"):
            policy.submit(ask())


def test_an_error_in_between_loses_no_answer() -> None:
    def picky(seen: Seen) -> Any:
        return Reply(error("no"), status=401, delay=0.3) if prompt_of(seen) == "bad" else echo(seen)

    with serving(picky) as fake, policy_for(fake) as policy:
        good, bad = policy.submit(ask("good")), policy.submit(ask("bad"))
        until = time.monotonic() + 20
        while policy._done.qsize() < 2 and time.monotonic() < until:
            time.sleep(0.01)
        with pytest.raises(PolicyError, match="refuses the key"):
            policy.poll()
        assert [ticket for ticket, _ in policy.poll()] == [good]
        assert bad not in policy._open


def test_a_request_that_cannot_be_sent_takes_the_others_back() -> None:
    with serving(lambda seen: Reply(echo(seen), delay=0.2)) as fake, policy_for(fake) as policy:
        with pytest.raises(PolicyError, match="end where an action begins"):
            policy.generate([ask(), Request((1, 2), 8)])
        nothing_under_way(policy)
        assert policy.poll() == []


def test_nothing_is_asked_where_nothing_may_be_written() -> None:
    with serving(echo) as fake, policy_for(fake) as policy:
        (answer,) = policy.generate([ask(max_tokens=0)])
        assert (answer.ids, answer.stop_reason, fake.seen) == ((), "length", [])


def test_an_intervention_cannot_be_honoured() -> None:
    class Rule:
        top_log_probs = 0

        def __call__(self, step: Any) -> tuple[int, ...]:
            return (len(step.ids),)

    with serving(echo) as fake, policy_for(fake) as policy, pytest.raises(PolicyError, match="thinking"):
        policy.submit(ask(intervention=Rule()))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1"),
        ("http://localhost:8000/v1/", "http://localhost:8000/v1"),
        ("https://api.example.com/openai/v1/chat/completions", "https://api.example.com/openai/v1"),
        ("https://api.example.com/v1/completions", "https://api.example.com/v1"),
    ],
)
def test_addresses_are_understood(given: str, expected: str) -> None:
    assert normal_url(given) == expected


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://a/v1", "http://", "https://key@host/v1", "http://a/v1?k=1"]
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="address"):
        normal_url(url)


@pytest.mark.parametrize("options", [{"concurrency": 0}, {"max_failures": 0}, {"dialect": Dialect("talk")}])  # type: ignore[arg-type]
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        OpenAIPolicy("http://localhost", "m", **options)
