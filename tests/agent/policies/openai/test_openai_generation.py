import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from at2po_agent.policies.base import Request
from at2po_agent.policies.openai.generation import end_of_text, make_generation, place_log_probs
from at2po_agent.policies.openai.messages import (
    NO_STOP,
    Answer,
    AnswerError,
    Dialect,
    NativeCall,
    SpelledToken,
    Usage,
    read_answer,
    read_usage,
    request_body,
)
from at2po_agent.policies.openai.tokens import ASSISTANT, EOS, USER, ByteTokenizer
from at2po_agent.types import mean_surprisal

TAGS = ("</search>", "</answer>")


def answer(text: str, **more: object) -> Answer:
    fields = {"reasoning": None, "call": None, "finish": "stop", "stop": NO_STOP, "tokens": None}
    return Answer(text=text, **{**fields, **more})  # type: ignore[arg-type]


def spelled(*tokens: tuple[str, float]) -> list[SpelledToken]:
    return [SpelledToken(text.encode(), value) for text, value in tokens]


@pytest.mark.parametrize(
    ("text", "finish", "stop", "expected"),
    [
        # vLLM names the stop string that it took away; None is an end of sequence.
        ("<search>q", "stop", "</search>", ("<search>q</search>", "stop")),
        ("said <search>", "stop", None, ("said <search>", "eos")),
        # OpenAI does not tell: the tag that stands open last is closed, if there is one.
        ("<search>q", "stop", NO_STOP, ("<search>q</search>", "stop")),
        ("<search> or <answer>x", "stop", NO_STOP, ("<search> or <answer>x</answer>", "stop")),
        ("no tag", "stop", NO_STOP, ("no tag", "eos")),
        # A server that leaves stop strings aside, or returns them.
        ("<search>q</search> and <answer>", "length", NO_STOP, ("<search>q</search>", "stop")),
        ("<answer>x</answer>", "stop", "</answer>", ("<answer>x</answer>", "stop")),
        ("</answer>x</search>", "stop", NO_STOP, ("</answer>", "stop")),
        # What is cut stays cut.
        ("<search>q", "length", NO_STOP, ("<search>q", "length")),
        ("<search>q", "length", None, ("<search>q", "length")),
        ("<search>q", "content_filter", None, ("<search>q", "abort")),
        ("<search>q", "tool_calls", None, ("<search>q", "eos")),
    ],
)
def test_where_a_text_ends(text: str, finish: str, stop: object, expected: tuple[str, str]) -> None:
    assert end_of_text(text, TAGS, finish=finish, stop=stop) == expected


def test_stop_strings_that_are_no_tags_are_never_guessed() -> None:
    assert end_of_text("a guess: 7", ("!",), finish="stop", stop=NO_STOP) == ("a guess: 7", "eos")
    assert end_of_text("a guess: 7", ("!",), finish="stop", stop="!") == ("a guess: 7!", "stop")


def test_each_log_prob_stands_on_the_last_byte_of_its_token() -> None:
    tokens = spelled(("né", -1.0), ("e", -0.25), ("<|im_end|>", -0.5))
    made = make_generation(answer("née", tokens=tokens))
    assert made.ids == (*"née".encode(), EOS)
    assert made.log_probs.tolist() == [0, 0, -1.0, -0.25, -0.5]
    assert made.sampled is not None
    assert made.sampled.tolist() == [False, False, True, True, True]
    assert made.stop_reason == "eos"
    assert mean_surprisal(made.log_probs, made.sampled) == pytest.approx(1.75 / 3)
    assert mean_surprisal(made.log_probs) != pytest.approx(1.75 / 3)  # negative control: per byte it is not


def test_tokens_beyond_the_stop_string_are_not_counted() -> None:
    tokens = spelled(("<search>", -1.0), ("q", -2.0), ("</sea", -3.0), ("rch>\n", -4.0), ("more", -100.0))
    made = make_generation(answer("<search>q", stop="</search>", tokens=tokens), TAGS)
    assert made.stop_reason == "stop"
    assert made.ids[-1] == ord(">")
    assert made.log_probs.sum() == -10.0  # "rch>\n" completes the stop string, "more" follows it
    assert made.log_probs[-1] == -4.0


def test_without_log_probs_nothing_counts_as_sampled() -> None:
    made = make_generation(answer("abc"))
    assert made.sampled is not None
    assert not made.sampled.any()
    assert not made.log_probs.any()


@given(
    st.lists(st.tuples(st.text(max_size=6), st.floats(-30, 0)), min_size=1, max_size=30),
    st.booleans(),
    st.text(max_size=8),
)
def test_sums_hold_wherever_the_tokens_stand(
    tokens: list[tuple[str, float]], rewritten: bool, reasoning: str
) -> None:
    text = "".join(piece for piece, _ in tokens)
    if rewritten:
        text = text[::-1]
    written = answer(text, reasoning=reasoning or None, tokens=spelled(*tokens))
    made = make_generation(written)
    total = math.fsum(value for _, value in tokens)
    assert float(made.log_probs.sum(dtype=np.float64)) == pytest.approx(total, abs=1e-4)
    assert np.isfinite(made.log_probs).all()
    assert made.sampled is not None
    assert not made.log_probs[~made.sampled].any()


def test_tokens_that_do_not_spell_the_text_are_spread_evenly() -> None:
    ids = ByteTokenizer().encode("abcdef")
    log_probs, sampled = place_log_probs(ids, spelled(("xyz", -1.0), ("uvw", -3.0)))
    assert log_probs.tolist() == [0, 0, -1.0, 0, 0, -3.0]
    assert mean_surprisal(log_probs, sampled) == 2.0


def test_a_parsed_call_is_the_action_of_hermes() -> None:
    call = NativeCall("search", '{"query": "Ada"}')
    made = make_generation(answer("I look.", call=call, reasoning="hm", finish="tool_calls", stop=None), TAGS)
    text = (
        '<think>hm</think>I look.<tool_call>\n{"name": "search", "arguments": {"query": "Ada"}}\n</tool_call>'
    )
    assert ByteTokenizer().decode(made.ids) == text
    assert made.stop_reason == "stop"


def test_a_call_after_an_answer_comes_too_late() -> None:
    made = make_generation(answer("<answer>x</answer>", call=NativeCall("search", "{}")), TAGS)
    assert ByteTokenizer().decode(made.ids) == "<answer>x</answer>"


def test_reasoning_that_was_cut_stays_open() -> None:
    made = make_generation(answer("", reasoning="and so on", finish="length"))
    assert ByteTokenizer().decode(made.ids) == "<think>and so on"
    assert made.stop_reason == "length"


# --- requests and answers --------------------------------------------------------------------------------

CHAT = (USER, *b"hello", ASSISTANT)
TOOL = {"type": "function", "function": {"name": "search", "description": "", "parameters": {}}}


def test_a_chat_request_holds_what_was_asked_and_no_more() -> None:
    request = Request(CHAT, max_tokens=400, temperature=0.0, stop=TAGS, seed=7)
    assert request_body(request, "m", Dialect()) == {
        "model": "m",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 100,  # 400 bytes
        "temperature": 0.0,
        "stop": ["</search>", "</answer>"],
        "logprobs": True,
    }


def test_a_completion_request_continues_the_text() -> None:
    request = Request(tuple(b"hello"), max_tokens=3, temperature=0.5, top_p=0.9, seed=2**64 + 5)
    dialect = Dialect("completions", bytes_per_token=1, extra={"min_p": 0.1})
    assert request_body(request, "m", dialect) == {
        **{"model": "m", "prompt": "hello", "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "seed": 5},
        **{"logprobs": 1, "min_p": 0.1},
    }


def test_native_tools_are_sent_and_do_not_stop_before_the_parser() -> None:
    request = Request(CHAT, max_tokens=8, temperature=0.0, stop=("</tool_call>", "</answer>"))
    body = request_body(request, "m", Dialect(tools=[TOOL], logprobs=False))
    assert (body["tools"], body["parallel_tool_calls"], body["stop"]) == ([TOOL], False, ["</answer>"])
    assert "logprobs" not in body
    assert request_body(request, "m", Dialect())["stop"] == ["</tool_call>", "</answer>"]


@pytest.mark.parametrize(
    "value",
    [
        [],
        {},
        {"choices": []},
        {"choices": "x"},
        {"choices": [{}]},
        {"choices": [{"message": {"content": 3}}]},
        {"choices": [{"message": {"content": None, "tool_calls": ["x"]}}]},
        {"choices": [{"message": {"tool_calls": [{"function": {"name": "a", "arguments": {}}}]}}]},
        {"choices": [{"message": {"content": "x"}, "logprobs": {"content": [{"token": "x"}, 1]}}]},
        {
            "choices": [
                {"message": {"content": "x"}, "logprobs": {"content": [{"token": "x", "logprob": "y"}]}}
            ]
        },
    ],
)
def test_wrong_shapes_are_refused(value: object) -> None:
    with pytest.raises(AnswerError):
        read_answer(value, "chat")


def test_a_completion_needs_a_text() -> None:
    with pytest.raises(AnswerError, match="text"):
        read_answer({"choices": [{"message": {"content": "x"}}]}, "completions")


def test_log_probs_are_finite_whatever_servers_write() -> None:
    content = [
        {"token": "a", "logprob": -1e30},
        {"token": "b", "logprob": None},
        {"token": "c", "logprob": 1e-7},
    ]
    read = read_answer(
        {"choices": [{"message": {"content": "abc"}, "logprobs": {"content": content}}]}, "chat"
    )
    assert [token.log_prob for token in read.tokens or ()] == [-9999.0, -9999.0, 0.0]


def test_other_names_of_reasoning_and_stops_are_known() -> None:
    for name in ("reasoning", "reasoning_content"):
        value = {"choices": [{"message": {"content": "x", name: "why"}, "matched_stop": "!"}]}
        assert read_answer(value, "chat")[:2] == ("x", "why")
        assert read_answer(value, "chat").stop == "!"
    assert read_answer({"choices": [{"text": "x", "stop_reason": 151645}]}, "completions").stop is None
    assert read_answer({"choices": [{"text": "x"}]}, "completions").stop is NO_STOP


def test_usage_is_read_as_far_as_it_is_told() -> None:
    details = {"prompt_tokens_details": {"cached_tokens": 4}}
    assert read_usage({"usage": {"prompt_tokens": 9, "completion_tokens": 2, **details}}) == Usage(9, 2, 4)
    assert read_usage({"usage": {"prompt_tokens": 9, "prompt_tokens_details": None}}) == Usage(9, 0, 0)
    assert read_usage({"usage": None}) == read_usage([]) == Usage()
