"""One line that says what an action did, for any action protocol and any text."""

from __future__ import annotations

import json
import re
from typing import NamedTuple

_TAG = re.compile(r"<([A-Za-z_]\w{0,31})>")
LONGEST = 160


class Short(NamedTuple):
    """What an action did.

    Attributes:
        kind: The tool's name, "answer", or "text" when neither is recognised.
        text: Its argument or the answer, on one line, at most `LONGEST` characters.
    """

    kind: str
    text: str


def shorten(action: str) -> Short:
    r"""Describe an action by its last block after the thinking; never raises.

    `<search> x </search>` gives ("search", "x"), a Hermes tool call its name and arguments, `\boxed{x}`
    inside an answer x, anything else ("text", the text itself).
    """
    rest = action.rpartition("</think>")[2]
    tag = _TAG.search(rest)
    if tag is None:
        return Short("text", _one_line(rest or action))
    name = tag.group(1)
    content = rest[tag.end() :].partition(f"</{name}>")[0]
    if name == "tool_call":
        return _tool_call(content)
    return Short(name, _one_line(_unboxed(content) if name == "answer" else content))


def _tool_call(content: str) -> Short:
    try:
        call = json.loads(content)
        name, arguments = call["name"], call["arguments"]
        values = arguments.values() if isinstance(arguments, dict) else [arguments]
        text = ", ".join(value if isinstance(value, str) else json.dumps(value) for value in values)
    except (ValueError, TypeError, KeyError, RecursionError):
        return Short("tool_call", _one_line(content))
    return Short(_one_line(str(name))[:32], _one_line(text))


def _unboxed(content: str) -> str:
    start = content.rfind("\\boxed{")
    end = content.rfind("}")
    return content[start + len("\\boxed{") : end] if 0 <= start < end else content


def _one_line(text: str) -> str:
    line = " ".join(text[: 4 * LONGEST].split())
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"
