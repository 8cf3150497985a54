import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from at2po_agent.policies.openai.tokens import (
    ASSISTANT,
    EOS,
    OBSERVATION,
    USER,
    Action,
    ByteTokenizer,
    NativeCall,
    RoleTranscript,
    action_ids,
    chat_messages,
    inline_text,
    split_action,
)
from at2po_agent.transcripts.inline import Transcript
from at2po_agent.transcripts.tokenizer import Tokenizer
from at2po_env import HermesProtocol, ToolCall
from at2po_env.errors import PolicyError

texts = st.text(st.characters(exclude_categories=["Cs"]))
calls = st.builds(
    NativeCall,
    st.text("abc_", min_size=1),
    st.dictionaries(texts, texts).map(lambda value: json.dumps(value, ensure_ascii=False)),
)
actions = st.builds(Action, st.none() | texts, texts, st.none() | calls)


def test_it_is_a_tokenizer_and_a_transcript() -> None:
    assert isinstance(ByteTokenizer(), Tokenizer)
    assert isinstance(RoleTranscript(), Transcript)
    assert len(ByteTokenizer()) == 265  # 256 bytes, an end, 4 roles, 4 marks of parts


@given(texts)
def test_texts_come_back_and_never_make_a_mark(text: str) -> None:
    ids = ByteTokenizer().encode(text)
    assert ids == list(text.encode())
    assert ByteTokenizer().decode(ids) == text


def test_what_utf8_cannot_hold_becomes_the_replacement_character() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode("a\ud800b\U0001f600")) == "a\ufffdb\U0001f600"
    assert tokenizer.decode([0xE6, 0x97]) == "\ufffd"


def test_marks_show_as_the_tags_that_they_stand_for() -> None:
    ids = action_ids(Action("why", "so", NativeCall("search", '{"query": "q"}')))
    shown = ByteTokenizer().decode(ids)
    assert (
        shown
        == '<think>why</think>so<tool_call>\n{"name": "search", "arguments": {"query": "q"}}\n</tool_call>'
    )
    assert HermesProtocol().parse(shown) == ToolCall("search", {"query": "q"}, "why")
    assert ByteTokenizer().decode([USER, 104, 105, EOS]) == "<|user|>hi<|end|>"
    assert ByteTokenizer().pieces(300)[255:259] == ["\ufffd", "<|end|>", "<|system|>", "<|user|>"]


@given(actions)
def test_an_action_is_taken_apart_as_it_was_put_together(action: Action) -> None:
    assert split_action([*action_ids(action), EOS]) == action


@pytest.mark.parametrize("arguments", ["not JSON", "[1]", "NaN", "", '{"a": '])
def test_arguments_that_are_no_object_stay_text_and_are_never_sent_back(arguments: str) -> None:
    action = Action(None, "", NativeCall("search", arguments))
    assert split_action(action_ids(action)) == action
    ids = [*RoleTranscript().open("q"), *action_ids(action), *RoleTranscript().observe("o", closed=False)]
    (call,) = chat_messages(ids)[1]["tool_calls"]
    assert call["function"] == {"name": "search", "arguments": "{}"}


def conversation(system: str | None, prompt: str, turns: list[tuple[Action, bool, str]]) -> list[int]:
    transcript = RoleTranscript(system=system)
    ids = transcript.open(prompt)
    for action, closed, observation in turns:
        ids += [*action_ids(action), *([EOS] if closed else [])]
        ids += transcript.observe(observation, closed=closed)
    return ids


@given(st.none() | texts, texts, st.lists(st.tuples(actions, st.booleans(), texts), max_size=4))
def test_ids_are_cut_back_into_the_messages_that_they_were(
    system: str | None, prompt: str, turns: list[tuple[Action, bool, str]]
) -> None:
    messages = iter(chat_messages(conversation(system, prompt, turns), keep_reasoning=True))
    if system is not None:
        assert next(messages) == {"role": "system", "content": system}
    assert next(messages) == {"role": "user", "content": prompt}
    for action, _, observation in turns:
        written, shown = next(messages), next(messages)
        assert (written["role"], written["content"]) == ("assistant", action.text)
        assert written.get("reasoning_content") == action.reasoning
        if action.call is None:
            assert "tool_calls" not in written
            assert shown == {"role": "user", "content": observation}
        else:
            (call,) = written["tool_calls"]
            assert call["function"]["name"] == action.call.name
            assert json.loads(call["function"]["arguments"]) == json.loads(action.call.arguments)
            assert (shown["role"], shown["tool_call_id"]) == ("tool", call["id"])
    assert next(messages, None) is None


def test_text_that_looks_like_marks_is_no_mark() -> None:
    prompt = "<|user|>a<|assistant|>b<|end|><tool_call>"
    assert chat_messages(conversation(None, prompt, [])) == [{"role": "user", "content": prompt}]


def test_an_observation_answers_a_parsed_call_and_only_that() -> None:
    shown = HermesProtocol().format_result("Ada wrote it.")
    parsed = Action("hm", "", NativeCall("search", '{"query": "ada"}'))
    written = Action(None, '<tool_call>{"name": "search", "arguments": {}}</tool_call>', None)
    turns = [(parsed, False, shown), (written, False, shown), (parsed, True, "\nTry again.\n")]
    messages: list[dict[str, Any]] = chat_messages(conversation("be brief", "q", turns))
    assert messages[2]["tool_calls"][0]["id"] == "call00001"
    assert messages[3] == {"role": "tool", "tool_call_id": "call00001", "content": "Ada wrote it."}
    assert "reasoning_content" not in messages[2]
    assert messages[4:6] == [
        {"role": "assistant", "content": written.text},
        {"role": "user", "content": shown},
    ]
    assert messages[7] == {"role": "tool", "tool_call_id": "call00002", "content": "\nTry again.\n".strip()}


def test_ids_of_the_other_endpoint_are_refused_with_what_to_do() -> None:
    inline = ByteTokenizer().encode("a question")
    with pytest.raises(PolicyError, match=r"make them with `policy\.transcript`"):
        chat_messages(inline)
    with pytest.raises(PolicyError, match=r"before the first mark"):
        chat_messages([1, USER, 2, ASSISTANT])
    with pytest.raises(PolicyError, match=r"end where an action begins"):
        chat_messages([USER, 2, ASSISTANT, 3])
    with pytest.raises(PolicyError, match=r"endpoint='chat'"):
        inline_text([OBSERVATION, 1])
    assert inline_text([*inline, EOS, 33]) == "a question!"
