"""Chat templates that write every message as it was, and where a run's template comes from.

A template renders messages to text. The published ones are made for serving: Qwen3's drops the thoughts of
earlier turns, Llama 3's strips the assistant's text. What a model is trained on here is what it saw, so
neither will do; `chat` finds such templates out, and these stand in for them. They are written for
this project, after the formats that the models' cards describe; none is a copy.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from at2po_env.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SETTING = "model.chat.template"
OWN = "tokenizer"
"""The name that stands for the tokenizer's own template."""

_BUILT_IN = {"messages", "add_generation_prompt", "chat_template", "tokenize", "continue_final_message"}


class ChatTemplate(NamedTuple):
    """A named template.

    Attributes:
        text: Jinja, as `apply_chat_template` takes it.
        marks: The tokens that it writes around messages; a tokenizer needs each as one token.
        about: Its purpose.
    """

    text: str
    marks: tuple[str, ...]
    about: str


_CHATML = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

_QWEN3 = """\
{%- set thinks = enable_thinking is not defined or enable_thinking -%}
{%- set opening = '<|im_start|>assistant\\n' + ('' if thinks else '<think>\\n\\n</think>\\n\\n') -%}
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {{- opening + message.content -}}
    {%- elif message.role == 'tool' -%}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response>' -}}
    {%- else -%}
        {{- '<|im_start|>' + message.role + '\\n' + message.content -}}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- opening -}}
{%- endif -%}
"""

_LLAMA3 = """\
{%- macro header(role) -%}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' -}}
{%- endmacro -%}
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {{- header('assistant') + message.content -}}
    {%- else -%}
        {{- header('ipython' if message.role == 'tool' else message.role) + message.content | trim -}}
    {%- endif -%}
    {{- '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- header('assistant') -}}
{%- endif -%}
"""

_IM = ("<|im_start|>", "<|im_end|>")
TEMPLATES: Mapping[str, ChatTemplate] = {
    "chatml": ChatTemplate(_CHATML, _IM, "plain ChatML, roles by their names"),
    "qwen3-preserving": ChatTemplate(
        _QWEN3, _IM, "Qwen3's format, all thoughts kept; reads enable_thinking; role tool as Qwen3 shows it"
    ),
    "llama3": ChatTemplate(
        _LLAMA3,
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "Llama 3's format with the assistant's text verbatim and no date",
    ),
}
"""Templates that preserve prefixes, by name."""


def find_template(name: str, hf: PreTrainedTokenizerFast, options: Mapping[str, Any]) -> str:
    """The text of a template.

    Args:
        name: A name of `TEMPLATES`, "tokenizer", or a file that ends in .jinja.
        hf: The tokenizer.
        options: Variables for the template; it must read each of them.

    Raises:
        ConfigError: There is no such template, the tokenizer lacks its tokens, or an option is not read.
    """
    text = _text(name, hf, options)
    unread = [key for key in options if key in _BUILT_IN or not re.search(rf"\b{re.escape(key)}\b", text)]
    if unread:
        raise ConfigError(
            f"model.chat.template_options: the chat template {name!r} does not read {', '.join(unread)}"
        )
    return text


def template_marks(name: str) -> tuple[str, ...]:
    """The tokens that a named template needs; none for others."""
    return TEMPLATES[name].marks if name in TEMPLATES else ()


def remedy(hf: PreTrainedTokenizerFast, refused: str = "") -> str:
    """Suggest a template instead of a refused one: a named one that the tokenizer has the tokens for.

    Args:
        hf: The tokenizer.
        refused: The text of the refused template.
    """
    fitting = [name for name, template in TEMPLATES.items() if not _missing(template, hf)]
    if "think" in refused:
        fitting.sort(key=lambda name: name != "qwen3-preserving")
    if not fitting:
        return (
            f"None of {', '.join(TEMPLATES)} fits: the tokenizer has not their tokens. "
            f"Fix: {SETTING}=FILE.jinja with a template that writes every message as it was"
        )
    others = f" ({', '.join(fitting[1:])} or FILE.jinja would do too)" if fitting[1:] else ""
    return f"Fix: {SETTING}={fitting[0]}, which keeps every message as it was{others}"


def _text(name: str, hf: PreTrainedTokenizerFast, options: Mapping[str, Any]) -> str:
    if name == OWN:
        try:
            return hf.get_chat_template(tools=options.get("tools"))
        except ValueError as error:
            raise ConfigError(
                f"{SETTING}: the tokenizer has no chat template of its own. {remedy(hf)}"
            ) from error
    if name in TEMPLATES:
        missing = _missing(TEMPLATES[name], hf)
        if missing:
            raise ConfigError(
                f"{SETTING}: {name} writes {', '.join(missing)}, which the tokenizer has not as single "
                f"tokens. {remedy(hf)}"
            )
        return TEMPLATES[name].text
    if not name.endswith(".jinja"):
        near = difflib.get_close_matches(name, TEMPLATES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"{SETTING}: got {name!r}, expected {', '.join(TEMPLATES)}, {OWN} or FILE.jinja{hint}"
        )
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{SETTING}: cannot read the template {name!r}: {error}") from error


def _missing(template: ChatTemplate, hf: PreTrainedTokenizerFast) -> list[str]:
    added = hf.get_added_vocab()
    return [mark for mark in template.marks if mark not in added]
