"""Writes requests to an OpenAI-compatible server and reads its answers. Knows no HTTP.

Reading is strict about what a generation is made of (a wrong shape is an error) and lenient about all else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from at2po_agent.policies.base import Request
from at2po_agent.policies.openai.tokens import NativeCall, chat_messages, encode, inline_text

Endpoint = Literal["chat", "completions"]
ENDPOINTS: Mapping[str, str] = {"chat": "/chat/completions", "completions": "/completions"}
OPTIONAL = ("seed", "logprobs", "stop", "temperature", "top_p", "parallel_tool_calls")
"""Members that a server may refuse; the request is then made without them."""
HARMLESS = ("seed", "logprobs", "stop", "parallel_tool_calls")
"""Those without which answers are drawn from the same distribution (stop strings are looked for here too)."""
LOWEST_LOG_PROB = -9999.0
"""Servers write this for minus infinity."""
NO_STOP = object()
"""The server does not tell which stop string ended a generation."""


class AnswerError(ValueError):
    """An answer has not the shape of one."""


class SpelledToken(NamedTuple):
    """A sampled token: the bytes that it stands for, and its log-prob in nats."""

    spelling: bytes
    log_prob: float


class Usage(NamedTuple):
    """Tokens that the server counted for one answer; the prompt's include the cached ones."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class Answer(NamedTuple):
    """One answer.

    Attributes:
        text: The text of the answer.
        reasoning: The part that the server's parser took for reasoning; None without.
        call: The first tool call that the server's parser found.
        finish: The server's `finish_reason`.
        stop: The stop string that ended it, None for another end, `NO_STOP` where the server does not tell.
        tokens: Log-probs; None without.
    """

    text: str
    reasoning: str | None
    call: NativeCall | None
    finish: str
    stop: object
    tokens: Sequence[SpelledToken] | None


@dataclass(frozen=True)
class Dialect:
    """Says how requests to one server are written.

    Attributes:
        endpoint: Chat, or completions.
        tools: JSON schemas of functions (`ToolEnv.tool_schemas`) for the server's own tool calls.
        logprobs: Ask for log-probs.
        bytes_per_token: A request's `max_tokens` counts bytes; the server is asked for this part of it.
        keep_reasoning: Send earlier reasoning back.
        extra: Further members of every request.
    """

    endpoint: Endpoint = "chat"
    tools: Sequence[Mapping[str, Any]] = ()
    logprobs: bool = True
    bytes_per_token: int = 4
    keep_reasoning: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)


def request_body(request: Request, model: str, dialect: Dialect) -> dict[str, Any]:
    """The JSON value that asks for one generation.

    Raises:
        PolicyError: The ids do not fit the endpoint.
    """
    chat = dialect.endpoint == "chat"
    body: dict[str, Any] = {"model": model}
    if chat:
        body["messages"] = chat_messages(request.prefix_ids, keep_reasoning=dialect.keep_reasoning)
    else:
        body["prompt"] = inline_text(request.prefix_ids)
    body["max_tokens"] = max(1, request.max_tokens // dialect.bytes_per_token)
    body["temperature"] = request.temperature
    if request.top_p < 1:
        body["top_p"] = request.top_p
    stop = [text for text in request.stop if not (chat and dialect.tools and text == "</tool_call>")]
    if stop:  # where the server parses tool calls, stopping inside one would hide it from the parser
        body["stop"] = stop
    if request.temperature > 0:
        body["seed"] = request.seed % 2**63
    if dialect.logprobs:
        body["logprobs"] = True if chat else 1
    if chat and dialect.tools:
        body |= {"tools": list(dialect.tools), "parallel_tool_calls": False}
    return {**body, **dialect.extra}


def read_usage(value: Any) -> Usage:
    """The `usage` of an answer; what is not told counts as 0."""
    usage = value.get("usage") if isinstance(value, Mapping) else None
    if not isinstance(usage, Mapping):
        return Usage()
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, Mapping) else None
    return Usage(_count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")), _count(cached))


def read_answer(value: Any, endpoint: Endpoint) -> Answer:
    """Read a whole answer.

    Raises:
        AnswerError: It holds no generation.
    """
    choice = _member(value, "choices", list, "answer")
    if not choice or not isinstance(choice[0], Mapping):
        raise AnswerError("the answer has no choices")
    first = choice[0]
    stop = first.get("stop_reason", first.get("matched_stop", NO_STOP))
    if stop is not NO_STOP and not isinstance(stop, str):
        stop = None  # an end-of-sequence id, or none
    finish = str(first.get("finish_reason") or "stop")
    tokens = _tokens(first.get("logprobs"))
    if endpoint == "completions":
        return Answer(_member(first, "text", str, "choice"), None, None, finish, stop, tokens)
    message, call = _member(first, "message", Mapping, "choice"), None
    text = _optional_text(message, "content") or _optional_text(message, "refusal") or ""
    reasoning = _optional_text(message, "reasoning_content") or _optional_text(message, "reasoning")
    if calls := message.get("tool_calls"):
        if not isinstance(calls, list) or not isinstance(calls[0], Mapping):
            raise AnswerError("tool_calls is no list of objects")
        function = _member(calls[0], "function", Mapping, "tool call")
        name, arguments = (_member(function, part, str, "function") for part in ("name", "arguments"))
        call = NativeCall(name, arguments)
    return Answer(text, reasoning, call, finish, stop, tokens)


def _tokens(value: Any) -> list[SpelledToken] | None:
    """Read log-probs: a list of objects under `content` (chat), or parallel lists (completions)."""
    if not isinstance(value, Mapping):
        return None
    entries, texts, log_probs = (value.get(key) for key in ("content", "tokens", "token_logprobs"))
    if isinstance(texts, list) and isinstance(log_probs, list) and len(texts) == len(log_probs):
        entries = [{"token": text, "logprob": one} for text, one in zip(texts, log_probs, strict=True)]
    if not isinstance(entries, list):
        return None
    tokens = []
    for entry in entries:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("token"), str):
            raise AnswerError("a log-prob has no token")
        log_prob, given = entry.get("logprob"), entry.get("bytes")
        if log_prob is None:
            log_prob = LOWEST_LOG_PROB
        elif not isinstance(log_prob, int | float) or isinstance(log_prob, bool) or math.isnan(log_prob):
            raise AnswerError(f"a log-prob is {log_prob!r}")
        spelling = encode(entry["token"])
        if isinstance(given, list) and all(isinstance(one, int) and 0 <= one < 256 for one in given):
            spelling = bytes(given)
        tokens.append(SpelledToken(spelling, min(0.0, max(LOWEST_LOG_PROB, float(log_prob)))))
    return tokens


def _member(value: Any, name: str, kind: type[Any], where: str) -> Any:
    found = value.get(name) if isinstance(value, Mapping) else None
    if not isinstance(found, kind):
        raise AnswerError(f"the {where} has no {name} of the expected type (got {type(found).__name__})")
    return found


def _optional_text(message: Mapping[str, Any], name: str) -> str | None:
    value = message.get(name)
    if value is not None and not isinstance(value, str):
        raise AnswerError(f"the message's {name} is no text (got {type(value).__name__})")
    return value


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
