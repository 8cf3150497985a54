"""Templates that behave as published ones do, written for these tests, and tokenizers that they fit.

`QWEN3` does what Qwen3's does: thoughts before the last question of the user vanish, the last message of the
assistant gets an empty thought, white space around thoughts is normalised, a tool answers within the user's
turn, and `enable_thinking=false` opens with an empty thought. `LLAMA31` trims every message and writes
today's date unless `date_string` is given, as Llama 3.1's does.
"""

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from at2po_agent.agents.model import train_tokenizer
from at2po_agent.transcripts.tokenizer import HFTokenizer

QWEN3 = r"""
{%- set found = namespace(question=messages|length - 1, looking=true) %}
{%- for message in messages | reverse %}
    {%- set is_result = message.content.startswith('<tool_response>') %}
    {%- if found.looking and message.role == 'user' and not is_result %}
        {%- set found.looking = false %}
        {%- set found.question = messages|length - loop.index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set parts = message.content.split('</think>') %}
        {%- set thought = parts[0].split('<think>')[-1].strip('\n') if parts|length > 1 else '' %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > found.question and (thought or loop.last) %}
            {{- '<think>\n' + thought + '\n</think>\n\n' }}
        {%- endif %}
        {{- parts[-1].lstrip('\n') if parts|length > 1 else parts[0] }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response>' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content }}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""

LLAMA31 = r"""
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now('%d %b %Y') %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
    {{- message.content|trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

MARKS = {
    "qwen": ("<|im_start|>", "<|im_end|>"),
    "llama": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "none": (),
}
TEXT = "user assistant system tool\n<think>where?</think> <search>Ann Bea</search>\n\n<answer>\\boxed{Cid}"


def tokenizer_of(family: str, template: str | None = None) -> HFTokenizer:
    """A byte-level tokenizer with the marks of a family, and perhaps a template of its own."""
    tokenizer = train_tokenizer([TEXT], vocab_size=330, special_tokens=MARKS[family])
    if family == "llama":
        tokenizer.hf.bos_token = "<|begin_of_text|>"
    tokenizer.hf.chat_template = template
    return tokenizer


def joining_tokenizer(template: str) -> HFTokenizer:
    """As SentencePiece's: words carry a leading mark; marks of messages swallow white space after them."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    marks = [AddedToken(mark, rstrip=True, normalized=False, special=True) for mark in MARKS["qwen"]]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "</s>", *marks], show_progress=False
    )
    made.train_from_iterator([TEXT, *map(chr, range(32, 127)), "\n", "é"], trainer)
    wrap: Any = PreTrainedTokenizerFast
    hf = wrap(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")
    hf.chat_template = template
    return HFTokenizer(hf)
