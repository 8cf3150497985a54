"""Reads what the policy wrote in one turn: a `ToolCall`, a `FinalAnswer` or `Malformed`.

A protocol reads the text of the current turn only, never the prompt or earlier turns. It takes linear time
and never raises, whatever the text (lone surrogates, NULs, megabytes). The first call or answer that is
*completed* by its closing tag wins, because there a sampler with the protocol's stop strings would have
stopped; the rest is ignored. An opening tag that is only mentioned (`I could use <search>`) is therefore no
call.

A shown result is text from outside. The protocol's tags are defused in it (`<answer>` becomes
`&lt;answer>`), so that a retrieved page can neither act nor spoil the format of the transcript.
"""

from __future__ import annotations

import json
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol

from at2po_env.episodes.prompts import ToolSpec, argument_lines, function_schema, text_field
from at2po_env.errors import ConfigError

_TAG_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_USUAL_FIELDS = {"search": "query", "python": "code", "calculator": "expression"}


class ToolCall(NamedTuple):
    """The turn calls a tool."""

    name: str
    arguments: dict[str, Any]
    think: str = ""


class FinalAnswer(NamedTuple):
    """The turn gives the final answer: `text` is the content of the answer block."""

    text: str
    think: str = ""


class Malformed(NamedTuple):
    """The turn does neither; `reason` says what was missing."""

    reason: str


Action = ToolCall | FinalAnswer | Malformed

_new = tuple.__new__  # builds a NamedTuple in a third of the time of its constructor; see benchmarks/env.py


class ActionProtocol(Protocol):
    """How calls, answers and results are written.

    Attributes:
        stop: Strings at which sampling of one turn ends; each completes a call or an answer.
        call_tags: Tag of a call -> tag of the result that has to follow it in a well-formed transcript.
    """

    stop: tuple[str, ...]
    call_tags: Mapping[str, str]

    def parse(self, action: str) -> Action:
        """Read one turn; never raises."""
        ...

    def format_call(self, call: ToolCall) -> str:
        """Write a call; `parse` reads it back."""
        ...

    def format_result(self, text: str) -> str:
        """Write the observation that shows a tool's result."""
        ...

    def describe(self, tools: Sequence[ToolSpec]) -> str:
        """Explain the tools for the prompt, from their schemas."""
        ...


_Block = tuple[str, str, int]
"""A completed pair of tags: its name, its content, and where its opening tag starts."""


class _BlockProtocol(ABC):
    """Calls, answers and results in blocks, `<name>content</name>`; subclasses read and write calls."""

    def __init__(self, calls: Sequence[str], result_tag: str) -> None:
        self.stop: tuple[str, ...] = tuple(f"</{name}>" for name in (*calls, "answer"))
        self.call_tags: Mapping[str, str] = dict.fromkeys(calls, result_tag)
        self._result_tag = result_tag
        self._tags = [(name, f"<{name}>", f"</{name}>") for name in (*calls, "answer")]
        names = ("think", "answer", result_tag, *calls)
        self._defused = {f"{tag}{name}>": f"&lt;{tag[1:]}{name}>" for name in names for tag in ("<", "</")}

    def parse(self, action: str) -> Action:
        """Read one turn; never raises."""
        block, parsed = self._first_block(action), self.parse_call(action)
        if block is None or isinstance(parsed, Malformed):
            return parsed
        call = block[2]
        # The thought is the last <think> block before the call; an unclosed one goes on up to the call.
        close = action.rfind("</think>", 0, call)
        end = close if close >= 0 else call
        start = action.rfind("<think>", 0, end)
        # Without an opening tag the chat template may have opened the block.
        think = action[start + len("<think>") : end] if start >= 0 else action[: max(close, 0)]
        return parsed._replace(think=think.strip())

    def parse_call(self, action: str) -> Action:
        """Read one turn as `parse` does, but leave `think` empty, which is faster."""
        block = self._first_block(action)
        if block is None:
            return Malformed(self._why_no_block(action))
        name, content, _ = block
        return (
            _new(FinalAnswer, (content.strip(), "")) if name == "answer" else self._read_call(name, content)
        )

    @abstractmethod
    def _read_call(self, name: str, content: str) -> ToolCall | Malformed:
        """Read the content of a call's block."""

    def _first_block(self, text: str) -> _Block | None:
        """Return the block that is completed first, in linear time."""
        # The earliest closing tag usually completes a block: look for it, then for its opening tag before it.
        end, name, opening = sys.maxsize, "", ""
        for tag in self._tags:
            found = text.find(tag[2], 0, end)
            if found >= 0:
                end = found
                name, opening, _ = tag
        if not name:
            return None
        start = text.rfind(opening, 0, end)
        if start >= 0:
            return name, text[start + len(opening) : end], start
        # It closes nothing: go through all tags in order, and remember where each name was opened last.
        opened: dict[str, int] = {}
        names = "|".join(re.escape(tag[0]) for tag in self._tags)
        for match in re.finditer(f"<(/?)({names})>", text):
            name = match[2]
            if not match[1]:
                opened[name] = match.start()
            elif name in opened:
                return name, text[opened[name] + len(name) + 2 : match.start()], opened[name]
        return None

    def _why_no_block(self, text: str) -> str:
        for _, opening, close in self._tags:
            if opening in text:
                return f"{opening} is never closed by {close}"
        for _, opening, close in self._tags:
            if close in text:
                return f"{close} without {opening} before it"
        expected = " or ".join(f"{opening}...{close}" for _, opening, close in self._tags)
        return f"neither a call nor an answer: expected {expected}"

    def format_result(self, text: str) -> str:
        """Write the observation that shows a tool's result."""
        if "<" in text:
            for tag, defused in self._defused.items():
                text = text.replace(tag, defused)
        return f"\n<{self._result_tag}>\n{text}\n</{self._result_tag}>\n"


class TaggedProtocol(_BlockProtocol):
    """Tagged text: `<think>...</think><search>query</search>`, `<answer>...</answer>`, results in `<result>`.

    The content of a call is plain text for the tool's sole field, or a JSON object where a tool has several.

    Args:
        tags: The tools' names; each is a tag.
        text_fields: Tag -> the field that plain text fills. Without it: query for search, code for python,
            expression for calculator, input for anything else.
        json_tags: Tags whose content may be a JSON object of several arguments.
        result_tag: Tag of shown results.
    """

    def __init__(
        self,
        tags: Sequence[str] = ("search",),
        *,
        text_fields: Mapping[str, str] | None = None,
        json_tags: Sequence[str] = (),
        result_tag: str = "result",
    ) -> None:
        for tag in tags:
            if not _TAG_NAME.fullmatch(tag) or tag in ("think", "answer", result_tag):
                raise ConfigError(
                    f"a tool of the tagged protocol cannot be called {tag!r}: use a letter, then letters, "
                    f"digits, '_', '-' or '.', and not think, answer or {result_tag}"
                )
        super().__init__(tags, result_tag)
        if text_fields is None:
            text_fields = {tag: _USUAL_FIELDS.get(tag, "input") for tag in tags}
        self._text_fields = dict(text_fields)
        self._json_tags = frozenset(json_tags)

    @classmethod
    def for_tools(cls, tools: Sequence[ToolSpec], *, result_tag: str = "result") -> TaggedProtocol:
        """Make the protocol for these tools: one tag each, arguments by their schemas."""
        fields = {tool.name: text_field(tool.Arguments) for tool in tools}
        return cls(
            [tool.name for tool in tools],
            text_fields={name: field for name, field in fields.items() if field is not None},
            json_tags=[tool.name for tool in tools if len(tool.Arguments.model_fields) != 1],
            result_tag=result_tag,
        )

    def _read_call(self, name: str, content: str) -> ToolCall | Malformed:
        text = content.strip()
        # One line is stripped; several lines (code) keep their indentation.
        plain = content.strip("\r\n").rstrip() if "\n" in text else text
        if name not in self._json_tags:
            return _new(ToolCall, (name, {self._text_fields[name]: plain}, ""))
        if not text:
            return ToolCall(name, {})
        field = self._text_fields.get(name)
        if field is None or text.startswith("{"):
            loaded = _load_object(text)
            if isinstance(loaded, dict):
                return ToolCall(name, loaded)
            if field is None:
                return Malformed(f"<{name}>: {loaded}")
        return ToolCall(name, {field: plain})

    def format_call(self, call: ToolCall) -> str:
        """Write a call; `parse` reads it back."""
        field = self._text_fields.get(call.name)
        if call.name in self._json_tags or field is None or list(call.arguments) != [field]:
            content = json.dumps(call.arguments, ensure_ascii=False)
        else:
            content = str(call.arguments[field])
        return f"{_thought(call.think)}<{call.name}>{content}</{call.name}>"

    def describe(self, tools: Sequence[ToolSpec]) -> str:
        """Write one line per tool with its call, then one line per argument."""
        lines = [
            "Call one tool per turn by writing one of these tags; its result follows between "
            f"<{self._result_tag}> and </{self._result_tag}>."
        ]
        for tool in tools:
            arguments = argument_lines(tool.Arguments)
            if tool.name not in self._json_tags:
                content = f" {self._text_fields[tool.name]} "
            elif arguments:
                content = "{" + ", ".join(f'"{field}": ...' for field in arguments) + "}"
            else:
                content = ""
            lines.append(f"- <{tool.name}>{content}</{tool.name}>: {tool.description}")
            lines.extend(f"    {field} {text}" for field, text in arguments.items())
        return "\n".join(lines)


class HermesProtocol(_BlockProtocol):
    """Hermes tool calls, as Qwen writes them: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

    Results come in `<tool_response>`; the final answer is tagged text as in `TaggedProtocol`.
    """

    def __init__(self, tools: Sequence[ToolSpec] = ()) -> None:
        super().__init__(["tool_call"], "tool_response")
        self._text_fields = {tool.name: text_field(tool.Arguments) for tool in tools}

    def _read_call(self, name: str, content: str) -> ToolCall | Malformed:
        call = _load_object(content)
        if isinstance(call, str):
            return Malformed(f"<{name}>: {call}")
        tool, arguments = call.get("name"), call.get("arguments", {})
        if not isinstance(tool, str):
            return Malformed('<tool_call>: "name" has to be a string')
        if isinstance(arguments, str):
            # Some models write the object as a JSON string, or plain text for the tool's sole field.
            loaded, field = _load_object(arguments), self._text_fields.get(tool)
            if isinstance(loaded, str):
                if field is None:
                    return Malformed(f"<tool_call>: {loaded}")
                loaded = {field: arguments}
            return ToolCall(tool, loaded)
        if not isinstance(arguments, dict):
            kind = type(arguments).__name__
            return Malformed(f'<tool_call>: "arguments" has to be a JSON object, got {kind}')
        return ToolCall(tool, arguments)

    def format_call(self, call: ToolCall) -> str:
        """Write a call; `parse` reads it back."""
        content = json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)
        return f"{_thought(call.think)}<tool_call>\n{content}\n</tool_call>"

    def describe(self, tools: Sequence[ToolSpec]) -> str:
        """Write the tools' JSON schemas in `<tools>`, as Qwen's chat template shows them."""
        functions = "\n".join(json.dumps(function_schema(tool), ensure_ascii=False) for tool in tools)
        return (
            "Call one function per turn. The functions, with the JSON schemas of their arguments:\n"
            f"<tools>\n{functions}\n</tools>\n"
            "A call is one JSON object with the function's name and its arguments:\n"
            '<tool_call>\n{"name": "<function>", "arguments": {<arguments>}}\n</tool_call>\n'
            "Its result follows between <tool_response> and </tool_response>."
        )


def _thought(think: str) -> str:
    return f"<think>{think}</think>\n" if think else ""


def _load_object(text: str) -> dict[str, Any] | str:
    """Return the JSON object in `text`, or the reason why there is none."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(text, parse_constant=refuse)
    except RecursionError:
        return "JSON nested too deeply"
    except json.JSONDecodeError as error:
        return f"not JSON: {error.msg} at character {error.pos}"
    except ValueError as error:
        return f"not JSON: {error}"
    return value if isinstance(value, dict) else f"expected a JSON object, got {type(value).__name__}"


def make_protocol(name: str | ActionProtocol, tools: Sequence[ToolSpec]) -> ActionProtocol:
    """Make the protocol called `name` for these tools.

    Args:
        name: "tagged" (results in `<result>`), "search_r1" (results in `<information>`), "hermes" (JSON tool
            calls), or a protocol, which is returned unchanged.
        tools: The tools that can be called.

    Raises:
        ConfigError: Unknown name, or a tool's name that the protocol cannot write.
    """
    if not isinstance(name, str):
        return name
    if name == "tagged":
        return TaggedProtocol.for_tools(tools)
    if name == "search_r1":
        return TaggedProtocol.for_tools(tools, result_tag="information")
    if name == "hermes":
        return HermesProtocol(tools)
    raise ConfigError(f"unknown protocol {name!r}: expected 'tagged', 'hermes' or 'search_r1'")
