"""What the policy wrote in one turn -> ToolCall | FinalAnswer | Malformed.

A protocol reads the text of the current turn only (never the prompt or earlier turns) and never raises,
whatever the text (lone surrogates, NULs, megabytes), in linear time. The first call or answer that is
*completed* by its closing tag wins, because that is where a sampler with the protocol's stop strings would
have stopped; what follows is ignored. An opening tag that is only mentioned (`I could use <search>`) is
therefore no call.

Shown results are text from outside: tags of the protocol that occur in it are defused (`<answer>` becomes
`&lt;answer>`), so that a retrieved page can neither act nor spoil the format of the transcript.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol

from pydantic import BaseModel

from at2po_env.episodes.schemas import argument_lines, function_schema, text_field
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
new = tuple.__new__  # builds a NamedTuple in a third of the time of its constructor


class ToolSpec(Protocol):
    """What a protocol has to know of a tool."""

    name: str
    description: str
    Arguments: type[BaseModel]


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
        """The observation that shows a tool's result."""
        ...

    def describe(self, tools: Sequence[ToolSpec]) -> str:
        """The part of the prompt that explains the tools, from their schemas."""
        ...


_Block = tuple[str, str, int]
"""(name, content, start of the opening tag) of one completed tag pair."""


class _Scanner:
    """Finds the first completed block among some tags, in time linear in the text."""

    def __init__(self, names: Sequence[str]) -> None:
        self._tags = tuple((name, f"<{name}>", f"</{name}>") for name in names)

    def first(self, text: str) -> _Block | None:
        best_end, name, opening = sys.maxsize, "", ""
        for tag in self._tags:
            end = text.find(tag[2], 0, best_end)
            if end >= 0:
                best_end = end
                name, opening, _ = tag
        if not name:
            return None
        start = text.rfind(opening, 0, best_end)
        if start >= 0:
            return name, text[start + len(opening) : best_end], start
        return self._first_with_opening(text)

    def _first_with_opening(self, text: str) -> _Block | None:
        """The slow path: some closing tag comes before any opening one, so look at each closing tag once."""
        floors = [0] * len(self._tags)
        ends = [text.find(close) for _, _, close in self._tags]
        while True:
            candidates = [i for i, end in enumerate(ends) if end >= 0]
            if not candidates:
                return None
            i = min(candidates, key=ends.__getitem__)
            name, opening, close = self._tags[i]
            start = text.rfind(opening, floors[i], ends[i])
            if start >= 0:
                return name, text[start + len(opening) : ends[i]], start
            floors[i] = ends[i] + len(close)
            ends[i] = text.find(close, floors[i])

    def why_none(self, text: str) -> str:
        for _, opening, close in self._tags:
            if opening in text:
                return f"{opening} is never closed by {close}"
        for _, opening, close in self._tags:
            if close in text:
                return f"{close} without {opening} before it"
        expected = " or ".join(f"{opening}...{close}" for _, opening, close in self._tags)
        return f"neither a call nor an answer: expected {expected}"


def _think(text: str, end: int) -> str:
    """What stands inside the last <think> block before `end`; an unclosed block counts up to `end`."""
    close = text.rfind("</think>", 0, end)
    start = text.rfind("<think>", 0, close if close >= 0 else end)
    if start < 0:
        return text[:close].strip() if close >= 0 else ""
    return text[start + 7 : close if close >= 0 else end].strip()


def _thought(think: str) -> str:
    return f"<think>{think}</think>\n" if think else ""


def _reject_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _load_object(text: str) -> dict[str, Any] | str:
    """The JSON object in `text`, or the reason why there is none."""
    try:
        value = json.loads(text, parse_constant=_reject_constant)
    except RecursionError:
        return "JSON nested too deeply"
    except json.JSONDecodeError as error:
        return f"not JSON: {error.msg} at character {error.pos}"
    except ValueError as error:
        return f"not JSON: {error}"
    return value if isinstance(value, dict) else f"expected a JSON object, got {type(value).__name__}"


def _plain(content: str) -> str:
    """A plain-text argument: one line is stripped; several lines (code) keep their indentation."""
    text = content.strip()
    return content.strip("\r\n").rstrip() if "\n" in text else text


class _Defuse:
    """Takes the meaning from a protocol's tags in text that comes from outside."""

    def __init__(self, names: Sequence[str]) -> None:
        self._tags = tuple(tag for name in names for tag in (f"<{name}>", f"</{name}>"))

    def __call__(self, text: str) -> str:
        for tag in self._tags:
            if tag in text:
                text = text.replace(tag, "&lt;" + tag[1:])
        return text


class TaggedProtocol:
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
        if text_fields is None:
            text_fields = {tag: _USUAL_FIELDS.get(tag, "input") for tag in tags}
        self._text_fields = dict(text_fields)
        self._json_tags = frozenset(json_tags)
        self._result_tag = result_tag
        self._scanner = _Scanner([*tags, "answer"])
        self._first = self._scanner.first
        self._defuse = _Defuse(["think", "answer", result_tag, *tags])
        self.stop: tuple[str, ...] = tuple(f"</{tag}>" for tag in (*tags, "answer"))
        self.call_tags: Mapping[str, str] = {tag: result_tag for tag in tags}

    @classmethod
    def for_tools(cls, tools: Sequence[ToolSpec], *, result_tag: str = "result") -> TaggedProtocol:
        """The protocol for these tools: one tag each, arguments by their schemas."""
        fields = {tool.name: text_field(tool.Arguments) for tool in tools}
        return cls(
            [tool.name for tool in tools],
            text_fields={name: field for name, field in fields.items() if field is not None},
            json_tags=[tool.name for tool in tools if len(tool.Arguments.model_fields) != 1],
            result_tag=result_tag,
        )

    def parse(self, action: str) -> Action:
        """Read one turn; never raises."""
        parsed = self.parse_call(action)
        block = self._first(action)
        if block is None or isinstance(parsed, Malformed):
            return parsed
        return parsed._replace(think=_think(action, block[2]))

    def parse_call(self, action: str) -> Action:
        """The same with `think` left empty, which is all that an environment needs, and faster."""
        block = self._first(action)
        if block is None:
            return Malformed(self._scanner.why_none(action))
        name, content, _ = block
        if name == "answer":
            return new(FinalAnswer, (content.strip(), ""))
        if name in self._json_tags:
            loaded = self._object_arguments(name, content)
            return Malformed(f"<{name}>: {loaded}") if isinstance(loaded, str) else ToolCall(name, loaded)
        value = _plain(content) if "\n" in content else content.strip()
        return new(ToolCall, (name, {self._text_fields[name]: value}, ""))

    def _object_arguments(self, name: str, content: str) -> dict[str, Any] | str:
        text = content.strip()
        if not text:
            return {}
        field = self._text_fields.get(name)
        if field is None or text.startswith("{"):
            loaded = _load_object(text)
            if field is None or isinstance(loaded, dict):
                return loaded
        return {field: _plain(content)}

    def format_call(self, call: ToolCall) -> str:
        """Write a call; `parse` reads it back."""
        field = self._text_fields.get(call.name)
        if call.name in self._json_tags or field is None or list(call.arguments) != [field]:
            content = json.dumps(call.arguments, ensure_ascii=False)
        else:
            content = str(call.arguments[field])
        return f"{_thought(call.think)}<{call.name}>{content}</{call.name}>"

    def format_result(self, text: str) -> str:
        """The observation that shows a tool's result."""
        if "<" in text:
            text = self._defuse(text)
        return f"\n<{self._result_tag}>\n{text}\n</{self._result_tag}>\n"

    def describe(self, tools: Sequence[ToolSpec]) -> str:
        """One line per tool with its call, then one line per argument."""
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


class HermesProtocol:
    """Hermes tool calls, as Qwen writes them: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

    Results come in `<tool_response>`; the final answer is tagged text as in `TaggedProtocol`.
    """

    def __init__(self, tools: Sequence[ToolSpec] = ()) -> None:
        self._text_fields = {tool.name: text_field(tool.Arguments) for tool in tools}
        self._scanner = _Scanner(["tool_call", "answer"])
        self._defuse = _Defuse(["think", "answer", "tool_call", "tool_response"])
        self.stop: tuple[str, ...] = ("</tool_call>", "</answer>")
        self.call_tags: Mapping[str, str] = {"tool_call": "tool_response"}

    def parse(self, action: str) -> Action:
        """Read one turn; never raises."""
        block = self._scanner.first(action)
        if block is None:
            return Malformed(self._scanner.why_none(action))
        tag, content, start = block
        if tag == "answer":
            return FinalAnswer(content.strip(), _think(action, start))
        call = _load_object(content)
        if isinstance(call, str):
            return Malformed(f"<tool_call>: {call}")
        name = call.get("name")
        if not isinstance(name, str):
            return Malformed('<tool_call>: "name" has to be a string')
        arguments = self._arguments(name, call.get("arguments", {}))
        if isinstance(arguments, str):
            return Malformed(f"<tool_call>: {arguments}")
        return ToolCall(name, arguments, _think(action, start))

    def _arguments(self, name: str, value: object) -> dict[str, Any] | str:
        """An object; some models write it as a JSON string, or as plain text for the tool's sole field."""
        if isinstance(value, dict):
            return value
        if isinstance(value, str):
            loaded = _load_object(value)
            field = self._text_fields.get(name)
            return {field: value} if isinstance(loaded, str) and field is not None else loaded
        return f'"arguments" has to be a JSON object, got {type(value).__name__}'

    def format_call(self, call: ToolCall) -> str:
        """Write a call; `parse` reads it back."""
        content = json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)
        return f"{_thought(call.think)}<tool_call>\n{content}\n</tool_call>"

    def format_result(self, text: str) -> str:
        """The observation that shows a tool's result."""
        return f"\n<tool_response>\n{self._defuse(text)}\n</tool_response>\n"

    def describe(self, tools: Sequence[ToolSpec]) -> str:
        """The tools' JSON schemas in `<tools>`, as Qwen's chat template shows them."""
        functions = "\n".join(json.dumps(function_schema(tool), ensure_ascii=False) for tool in tools)
        return (
            "Call one function per turn. The functions, with the JSON schemas of their arguments:\n"
            f"<tools>\n{functions}\n</tools>\n"
            "A call is one JSON object with the function's name and its arguments:\n"
            '<tool_call>\n{"name": "<function>", "arguments": {<arguments>}}\n</tool_call>\n'
            "Its result follows between <tool_response> and </tool_response>."
        )


def make_protocol(name: str | ActionProtocol, tools: Sequence[ToolSpec]) -> ActionProtocol:
    """The protocol called `name` for these tools.

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
