import pytest
from helpers.chat_samples import LLAMA31, QWEN3, tokenizer_of

from at2po_agent.transcripts.chat import ChatTranscript
from at2po_agent.transcripts.chat_templates import TEMPLATES
from at2po_env.errors import ConfigError

CHATML = TEMPLATES["chatml"].text


def refusal(family: str, own: str | None = None, **settings) -> str:
    with pytest.raises(ConfigError) as caught:
        ChatTranscript(tokenizer_of(family, own), **settings)
    return str(caught.value)


def test_qwen3_is_refused_for_what_it_does_to_earlier_thoughts():
    text = refusal("qwen", QWEN3)
    assert text.startswith("model.chat.template: the template does not preserve prefixes")
    assert "With thoughts, in a conversation of 3 messages, message 2 (assistant)" in text
    assert r"should read '<think>\nWhere to look?\n</think>\n\n<search>Ann</search><|im_en'" in text
    assert r"but reads '<search>Ann</search><|im_end|>" in text
    assert "Fix: model.chat.template=qwen3-preserving" in text


def test_the_number_of_the_message_counts_the_system_message():
    assert "in a conversation of 4 messages, message 3 (assistant)" in refusal("qwen", QWEN3, system="S")


def test_qwen3_is_refused_for_its_white_space_where_tools_keep_the_thoughts():
    text = refusal("qwen", QWEN3, observation_role="tool")
    assert "message 4 (assistant) should read '<think>Not there.</think>" in text
    assert r"but reads '<think>\nNot there.\n</think>\n\n" in text


def test_qwen3_is_refused_for_the_empty_thought_that_vanishes():
    text = refusal("qwen", QWEN3, template_options={"enable_thinking": False})
    assert "message 2 (assistant)" in text
    assert "<think>" in text


def test_the_template_that_a_refusal_names_is_accepted():
    tokenizer = tokenizer_of("qwen", QWEN3)
    for options in ({}, {"enable_thinking": False}):
        ChatTranscript(tokenizer, template="qwen3-preserving", template_options=options)


def test_a_template_that_trims_is_refused_and_llama3_named():
    text = refusal("llama", LLAMA31, template_options={"date_string": "26 Jul 2024"})
    assert "With white space at both ends" in text
    assert r"message 2 (assistant) should read ' \n a look \n\n' but reads 'a look<|eot_id|>'" in text
    assert "but reads 'a look<|eot_id|>" in text
    assert "Fix: model.chat.template=llama3" in text


def test_a_template_that_trims_only_what_others_say_is_accepted():
    own = LLAMA31.replace(
        "message.content|trim +",
        "(message.content if message.role == 'assistant' else message.content|trim) +",
    )
    options = {"date_string": "26 Jul 2024"}
    transcript = ChatTranscript(tokenizer_of("llama", own), template_options=options)
    shown = transcript.tokenizer.decode(transcript.observe("\n found \n", closed=True))
    assert shown.startswith("<|start_header_id|>user<|end_header_id|>\n\nfound<|eot_id|>")


def test_a_template_that_reads_the_clock_is_refused():
    own = LLAMA31.replace("message.content|trim +", "message.content +")
    text = refusal("llama", own)
    assert "today's date" in text
    assert "date_string" in text
    assert "model.chat.template=llama3" in text
    ChatTranscript(tokenizer_of("llama", own), template_options={"date_string": "26 Jul 2024"})


def test_a_template_that_shows_only_the_last_messages_is_refused():
    own = CHATML.replace("in messages", "in messages[-3:]")
    assert "message 1 (user)" in refusal("qwen", own)


def test_a_template_that_numbers_its_messages_is_accepted():
    own = CHATML.replace("message.role +", "message.role + (' %d' % loop.index if loop.first else '') +")
    assert ChatTranscript(tokenizer_of("qwen", own)).open("P")


def test_a_template_that_counts_messages_at_the_beginning_is_refused():
    own = "{{- messages|length -}}" + CHATML
    text = refusal("qwen", own)
    assert "message 1 (user) should read '1<|im_start|>user" in text
    assert "but reads '2<|im_start|>user" in text


def test_a_piece_that_depends_on_how_many_turns_went_before_is_refused():
    own = CHATML.replace("message.role +", "message.role + (' again' if loop.index == 5 else '') +")
    text = refusal("qwen", own)
    assert "message 5 (user) should read" in text
    assert "user again" in text


def test_what_the_check_cannot_foresee_is_refused_when_it_happens():
    own = CHATML.replace(
        "in messages", "in (messages[-1:] if 'forget' in messages[-1].content else messages)"
    )
    transcript = ChatTranscript(tokenizer_of("qwen", own))
    assert transcript.observe("remember", closed=True)
    with pytest.raises(ConfigError, match="does not preserve prefixes"):
        transcript.observe("forget it", closed=True)


def test_a_message_must_end_with_a_special_token():
    text = refusal("qwen", CHATML.replace("<|im_end|>", "."))
    assert r"the template writes '.\n<|im_start|>user" in text
    assert "special token" in text


def test_a_template_that_refuses_a_role_says_so():
    own = (
        "{%- if messages[0].role == 'system' -%}{{ raise_exception('no system here') }}{%- endif -%}" + CHATML
    )
    text = refusal("qwen", own, system="S")
    assert "refuses a conversation of system, user" in text
    assert "no system here" in text


def test_a_tokenizer_without_a_template_is_told_which_fit():
    assert "no chat template of its own. Fix: model.chat.template=chatml" in refusal("qwen")
    assert "None of chatml, qwen3-preserving, llama3 fits" in refusal("none")


def test_a_named_template_needs_its_tokens():
    text = refusal("llama", template="chatml")
    assert "chatml writes <|im_start|>, <|im_end|>, which the tokenizer has not" in text
    assert "Fix: model.chat.template=llama3" in text


def test_an_unknown_name_is_told_what_is_near():
    text = refusal("qwen", template="qwen3_preserving")
    assert "got 'qwen3_preserving'" in text
    assert "did you mean qwen3-preserving?" in text


def test_an_option_that_the_template_does_not_read_is_an_error():
    options = {"enable_thinkin": False, "enable_thinking": False}
    text = refusal("qwen", template="qwen3-preserving", template_options=options)
    assert "does not read enable_thinkin" in text
    assert "messages" in refusal("qwen", template="chatml", template_options={"messages": []})


def test_a_file_can_be_a_template(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(CHATML.replace("assistant", "model"), encoding="utf-8")
    text = refusal("qwen", template=str(path))  # opens as "model", closes what "assistant" wrote
    assert "message 2 (assistant)" in text
    path.write_text(CHATML, encoding="utf-8")
    assert ChatTranscript(tokenizer_of("qwen"), template=str(path)).open("P")
    assert "cannot read the template" in refusal("qwen", template=str(tmp_path / "none.jinja"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_named_templates_are_described(name):
    assert TEMPLATES[name].about
    assert all(mark in TEMPLATES[name].text for mark in TEMPLATES[name].marks)
