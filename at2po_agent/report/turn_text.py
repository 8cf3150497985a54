"""Shortens an action to one line, and cuts it into the texts of its tokens; for any protocol and any text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

Decode = Callable[[Sequence[int]], str]
LONGEST = 160
_TAG = re.compile(r"<([A-Za-z_]\w{0,31})>")


class Short(NamedTuple):
    """An action in short.

    Attributes:
        kind: The tool's name, "answer", or "text" when neither is recognised.
        text: The argument or the answer, on one line, at most `LONGEST` characters.
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
        try:
            call = json.loads(content)
            name, arguments = str(call["name"]), call["arguments"]
            values = arguments.values() if isinstance(arguments, dict) else [arguments]
            content = ", ".join(value if isinstance(value, str) else json.dumps(value) for value in values)
            return Short(_one_line(name)[:32], _one_line(content))
        except (ValueError, TypeError, KeyError, RecursionError):
            return Short("tool_call", _one_line(content))
    start, end = content.rfind("\\boxed{"), content.rfind("}")
    if name == "answer" and 0 <= start < end:
        content = content[start + len("\\boxed{") : end]
    return Short(name, _one_line(content))


def run_decoder(run: Path) -> Decode | None:
    """Load the tokenizer that a run kept with its newest checkpoint; None when there is none to use."""
    files = sorted(run.glob("checkpoints/*/tokenizer.json")) + sorted(run.glob("tokenizer/tokenizer.json"))
    if not files:
        return None
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return None
    tokenizer = Tokenizer.from_file(str(files[-1]))
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False))


def token_pieces(ids: Sequence[int], text: str, decode: Decode) -> list[str] | None:
    """Cut a text into the pieces of its tokens.

    A character whose bytes are spread over several tokens goes to the last of them; the others get "".

    Args:
        ids: The tokens.
        text: The text of all of them.
        decode: Turns tokens into text.

    Returns:
        One piece per token whose concatenation is `text`, or None when these tokens do not give this text.
    """
    pieces: list[str] = []
    begin = done = 0  # decoding starts at `begin`, since a piece may depend on the token before it
    for end in range(1, len(ids) + 1):
        known, longer = decode(ids[begin:done]), decode(ids[begin:end])
        complete = longer.startswith(known) and (not longer.endswith("\ufffd") or end == len(ids))
        pieces.append(longer[len(known) :] if complete else "")
        if complete:
            begin, done = done, end
    return pieces if "".join(pieces) == text else None


def _one_line(text: str) -> str:
    line = " ".join(text[: 4 * LONGEST].split())
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"
