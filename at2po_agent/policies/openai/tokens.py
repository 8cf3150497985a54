"""Token ids for models whose tokenizer is not here: UTF-8 bytes, an end, and marks of roles and parts.

Ids 0..255 are bytes. Only this program can write the marks (text that looks like one stays
bytes), so ids are cut back into the messages of a chat exactly: a tool call that the server parsed is told
from text that only looks like one. A mark shows as the tag that it stands for.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from at2po_agent.transcripts.inline import GrowingTranscript
from at2po_env.errors import PolicyError

EOS, SYSTEM, USER, ASSISTANT, OBSERVATION = 256, 257, 258, 259, 260
"""The end of an action, and what opens a message of each role."""
THINK, END_THINK, CALL, END_CALL = 261, 262, 263, 264
"""Parts of an action that the server returned apart from its text: reasoning, and a tool call."""
ROLES = frozenset({SYSTEM, USER, ASSISTANT, OBSERVATION})
_SHOWN = {
    **{EOS: b"<|end|>", SYSTEM: b"<|system|>", USER: b"<|user|>", ASSISTANT: b"<|assistant|>"},
    **{OBSERVATION: b"<|observation|>", THINK: b"<think>", END_THINK: b"</think>"},
    **{CALL: b"<tool_call>", END_CALL: b"</tool_call>"},
}


class ByteTokenizer:
    """One id per byte of UTF-8, then the marks; what UTF-8 cannot hold (a lone surrogate) becomes U+FFFD."""

    eos_id = EOS

    def __len__(self) -> int:
        return END_CALL + 1

    def encode(self, text: str) -> list[int]:
        """The text's bytes; never a mark."""
        return list(encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; marks show as tags, bytes that are no UTF-8 as U+FFFD."""
        if not ids or max(ids) < EOS:
            return bytes(ids).decode("utf-8", "replace")
        pieces = [_SHOWN[token] if token >= EOS else bytes((token,)) for token in ids]
        return b"".join(pieces).decode("utf-8", "replace")

    def pieces(self, count: int) -> list[str]:
        """The text of each id below `count` by itself."""
        return [self.decode([token]) if token < len(self) else "" for token in range(count)]


class RoleTranscript(GrowingTranscript):
    """Prompt and observations as messages of a chat (`transcripts.inline.Transcript`).

    Args:
        system: A system message before the prompt; None for none.
    """

    def __init__(self, *, system: str | None = None) -> None:
        self._opening = [] if system is None else [SYSTEM, *encode(system)]

    def open(self, prompt: str) -> list[int]:
        """The prompt as the user's message, and the opening of the first action."""
        return [*self._opening, USER, *encode(prompt), ASSISTANT]

    def observe(self, observation: str, *, closed: bool) -> list[int]:
        """The observation as a message, and the opening of the next action; marks need no end before them."""
        del closed
        return [OBSERVATION, *encode(observation), ASSISTANT]


class NativeCall(NamedTuple):
    """A tool call that the server parsed: the function's name, and its arguments as it wrote them."""

    name: str
    arguments: str


class Action(NamedTuple):
    """An action in its parts; the text is without the end."""

    reasoning: str | None
    text: str
    call: NativeCall | None


def encode(text: str) -> bytes:
    """UTF-8 of a text, whatever it holds."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def action_ids(action: Action, *, thinking: bool = False) -> list[int]:
    """Ids of an action; `thinking`: it was cut while the reasoning went on."""
    ids: list[int] = []
    if action.reasoning is not None:
        ids += [THINK, *encode(action.reasoning)]
        ids += [] if thinking else [END_THINK]
    ids += encode(action.text)
    if action.call is not None:
        # As `HermesProtocol` writes it; arguments that are no JSON object stay the text that they are.
        name, written = action.call
        arguments = _object(written)
        call = {"name": name, "arguments": written if arguments is None else arguments}
        ids += [CALL, *encode(f"\n{json.dumps(call, ensure_ascii=False)}\n"), END_CALL]
    return ids


def split_action(ids: Sequence[int]) -> Action:
    """The inverse of `action_ids`, an end included or not."""
    text, reasoning, call = list(ids), None, None
    if THINK in text:
        inside, text = _take(text, THINK, END_THINK)
        reasoning = _text(inside)
    if CALL in text:
        inside, text = _take(text, CALL, END_CALL)
        value = _object(_text(inside))
        if value is not None:  # else it was cut by a limit
            arguments = value.get("arguments", {})
            written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            call = NativeCall(str(value.get("name")), written)
    return Action(reasoning, _text([token for token in text if token != EOS]), call)


def inline_text(ids: Sequence[int]) -> str:
    """Return the text that a completion endpoint continues, that of an inline transcript.

    Raises:
        PolicyError: The ids are cut into messages.
    """
    if not ROLES.isdisjoint(ids):
        raise PolicyError(
            "these ids are cut into messages, but a completion endpoint continues running text. "
            "Fix: make them with `policy.transcript`, as `rollout` does, or use endpoint='chat'"
        )
    return ByteTokenizer().decode([token for token in ids if token != EOS])


def chat_messages(ids: Sequence[int], *, keep_reasoning: bool = False) -> list[dict[str, Any]]:
    """The messages that a chat endpoint is sent, the open action left out.

    An observation that follows a parsed tool call answers it as role `tool`, without the tags that the chat
    template writes itself; any other is the user's. Calls are numbered, so equal ids give equal messages.

    Args:
        ids: The ids of a `RoleTranscript` and the policy.
        keep_reasoning: Send earlier reasoning back as `reasoning_content`; most servers want it left out.

    Raises:
        PolicyError: The ids are not cut into messages, or do not end where an action begins.
    """
    pieces = list(_pieces(ids))
    if not pieces or pieces[-1] != (ASSISTANT, ()):
        raise PolicyError(
            "a chat endpoint needs ids that are cut into messages and end where an action begins. "
            "Fix: make them with `policy.transcript`, as `rollout` does, or use endpoint='completions'"
        )
    messages: list[dict[str, Any]] = []
    calls, open_call = 0, ""
    for role, content in pieces[:-1]:
        if role == ASSISTANT:
            action = split_action(content)
            message: dict[str, Any] = {"role": "assistant", "content": action.text}
            if keep_reasoning and action.reasoning is not None:
                message["reasoning_content"] = action.reasoning
            if action.call is not None:
                calls, open_call = calls + 1, f"call{calls + 1:05d}"  # nine characters: Mistral insists on it
                sound = _object(action.call.arguments) is not None  # servers refuse a history with others
                arguments = action.call.arguments if sound else "{}"
                function = {"name": action.call.name, "arguments": arguments}
                message["tool_calls"] = [{"id": open_call, "type": "function", "function": function}]
            messages.append(message)
        elif role == OBSERVATION and open_call:
            result = _text(content).strip()
            if result.startswith("<tool_response>") and result.endswith("</tool_response>"):
                result = result.removeprefix("<tool_response>").removesuffix("</tool_response>").strip("\n")
            messages.append({"role": "tool", "tool_call_id": open_call, "content": result})
            open_call = ""
        else:
            messages.append({"role": "system" if role == SYSTEM else "user", "content": _text(content)})
    return messages


def _pieces(ids: Sequence[int]) -> Iterator[tuple[int, tuple[int, ...]]]:
    starts = [place for place, token in enumerate(ids) if token in ROLES]
    if starts and starts[0] > 0:
        raise PolicyError(f"{starts[0]} ids stand before the first mark of a role")
    for start, end in itertools.pairwise([*starts, len(ids)]):
        yield ids[start], tuple(ids[start + 1 : end])


def _take(ids: list[int], opening: int, closing: int) -> tuple[list[int], list[int]]:
    """Return the ids between two marks, and the rest without them."""
    start = ids.index(opening)
    end = ids.index(closing, start) if closing in ids[start:] else len(ids)
    return ids[start + 1 : end], ids[:start] + ids[end + 1 :]


def _text(ids: Sequence[int]) -> str:
    return ByteTokenizer().decode(ids)


def _object(text: str) -> dict[str, Any] | None:
    """Read a JSON object; None where it is none, NaN and Infinity included."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(constant)

    try:
        value = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
