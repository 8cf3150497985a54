from __future__ import annotations

import numpy as np
import pytest
from helpers.policy_reference import tiny_tokenizer

from at2po_agent.policies.base import Policy, Request, StreamingPolicy
from at2po_agent.policies.scripted import ScriptedPolicy
from at2po_agent.transcripts.tokenizer import Tokenizer
from at2po_env.errors import PolicyError


def request(text: str = "hello", **options: object) -> Request:
    return Request(tuple(tiny_tokenizer().encode(text)), 100, **options)  # type: ignore[arg-type]


def test_it_is_a_policy_and_the_tokenizer_a_tokenizer() -> None:
    policy = ScriptedPolicy(["a"], tiny_tokenizer())
    assert isinstance(policy, Policy)
    assert not isinstance(policy, StreamingPolicy)
    assert isinstance(policy.tokenizer, Tokenizer)


def test_a_function_answers_what_it_sees() -> None:
    policy = ScriptedPolicy(lambda seen: seen.upper(), tiny_tokenizer())
    first, second = policy.generate([request("abc"), request("xyz")])
    decode = tiny_tokenizer().decode
    assert (decode(first.ids), decode(second.ids)) == ("ABC", "XYZ")
    assert first.stop_reason == "eos"


def test_a_list_is_said_in_order_and_running_out_is_an_error() -> None:
    policy = ScriptedPolicy(["one", "two"], tiny_tokenizer())
    assert [tiny_tokenizer().decode(g.ids) for g in policy.generate([request(), request()])] == ["one", "two"]
    with pytest.raises(PolicyError, match="2 turns and was asked for one more, after 'hello'"):
        policy.generate([request()])


def test_a_stop_string_cuts_where_a_sampler_would() -> None:
    policy = ScriptedPolicy(lambda _: "say <search> x </search> and more", tiny_tokenizer(), end=True)
    (generation,) = policy.generate([request(stop=("</search>",))])
    assert tiny_tokenizer().decode(generation.ids).endswith("</search>")
    assert generation.stop_reason == "stop"


def test_the_end_of_sequence_can_be_written() -> None:
    (generation,) = ScriptedPolicy(["bye"], tiny_tokenizer(), end=True).generate([request()])
    assert generation.ids[-1] == tiny_tokenizer().eos_id
    assert generation.stop_reason == "eos"


def test_the_limit_cuts() -> None:
    (generation,) = ScriptedPolicy(["abcdefgh"], tiny_tokenizer()).generate([Request((5,), 2)])
    assert (len(generation.ids), generation.stop_reason) == (2, "length")


def test_log_probs_are_given_or_computed() -> None:
    tokenizer = tiny_tokenizer()
    (constant,) = ScriptedPolicy(["abc"], tokenizer, log_probs=-0.5).generate([request()])
    np.testing.assert_array_equal(constant.log_probs, np.float32(-0.5))
    by_id = ScriptedPolicy(["abc"], tokenizer, log_probs=lambda ids: [-float(i) for i in ids])
    (generation,) = by_id.generate([request()])
    np.testing.assert_array_equal(generation.log_probs, -np.array(generation.ids, dtype=np.float32))
    wrong = ScriptedPolicy(["abc"], tokenizer, log_probs=lambda _: [-1.0])
    with pytest.raises(PolicyError, match=r"shape \(1,\)"):
        wrong.generate([request()])
