"""Reads refusals of a server: try again, ask otherwise, give this request up, or stop everything.

The error model: a request that fails is data (`RequestFailedError` becomes an aborted generation). A refusal
that every other request would meet as well (the key, the model's name, the address) is a `PolicyError`.
"""

from __future__ import annotations

import email.utils
import json
import re
import time
from collections.abc import Collection, Mapping
from typing import Any

from at2po_agent.policies.openai.messages import HARMLESS, OPTIONAL
from at2po_env.errors import PolicyError

PASSING = frozenset({408, 409, 425, 429})
"""Statuses, besides 5xx, that another try may not meet."""
MAX_DETAIL = 300
_CONTEXT = re.compile(
    r"context.{0,20}length|context window|max_model_len|prompt is too long|too many tokens", re.I
)
_CONTEXT_LIMIT = re.compile(r"maximum context length (?:is|of) (\d+)", re.I)
_ANSWER_LIMIT = re.compile(
    r"cannot be greater than max_model_len=(\d+)|at most (\d+) completion tokens", re.I
)
_CONTEXT_USED = re.compile(
    r"(\d+) (?:tokens )?(?:in|from) (?:the|your) (?:messages|prompt|input)|(\d+) (?:prompt|input) tokens",
    re.I,
)
_REFUSED = re.compile(
    r"unsupported|unrecogni[sz]ed|not support|unknown|unexpected|not permitted|not allowed|extra", re.I
)


class RequestFailedError(Exception):
    """This request is given up; `kind` is what is counted."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class PassingError(RequestFailedError):
    """A failure that another try may not meet; `pause_s` is what the server asked for.

    `busy`: the server works, and wants to be asked later.
    """

    def __init__(self, kind: str, message: str, pause_s: float = 0.0) -> None:
        super().__init__(kind, message)
        self.pause_s = pause_s
        self.busy = kind == "status 429"


class ContextError(RequestFailedError):
    """The context is full; `room` tokens are left for the answer where the server told."""

    def __init__(self, message: str, room: int | None) -> None:
        super().__init__("context", message)
        self.room = room


class ParameterError(RequestFailedError):
    """The server knows no such member of a request, or not this value of it."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__("parameter", message)
        self.name = name


class BadRequestError(RequestFailedError):
    """The server refuses what it was sent, and says nothing that helps."""


class UnknownModelError(RequestFailedError):
    """The server has no such model, or no such endpoint."""


def refusal(
    status: int, headers: Mapping[str, str], body: bytes, *, sent: Collection[str]
) -> RequestFailedError | PolicyError:
    """Read an answer with another status than 200.

    Args:
        status: HTTP status.
        headers: Headers, whose names are looked up in lower case.
        body: The body.
        sent: Members of the request.
    """
    error = _error_object(body)
    detail = str(error.get("message") or error.get("detail") or body.decode("utf-8", "replace"))
    detail, code = detail[:2000].strip(), str(error.get("code") or error.get("type") or "")
    said = f"status {status}: {detail[:MAX_DETAIL]}"
    if status in (401, 403):
        return PolicyError(f"the server refuses the key ({said}). Fix: name the variable that holds it")
    if status == 402 or code == "insufficient_quota":
        return PolicyError(f"the account cannot pay ({said})")
    if status in PASSING or status >= 500:
        return PassingError(f"status {status}", said, retry_after(headers.get("retry-after", "")))
    if status == 404:
        return UnknownModelError("status 404", said)
    if status not in (400, 413, 422):
        return PolicyError(f"this is not how an OpenAI-compatible server answers ({said})")
    room = _room(detail)
    if status == 413 or code == "context_length_exceeded" or room is not None or _CONTEXT.search(detail):
        return ContextError(said, room)
    if "content_filter" in code or "content_policy" in code:
        return RequestFailedError("content filter", said)
    # The next try leaves out a member that the server does not know, or one that decides no draw.
    members = [name for name in (*OPTIONAL, "max_tokens") if name in sent]
    named, refused = str(error.get("param") or "").split(".")[-1], _REFUSED.search(f"{detail} {code}")
    if named in members and (refused or named in HARMLESS):
        return ParameterError(named, said)
    for name in members:
        if refused and re.search(rf"\b{name}\b", detail):
            return ParameterError(name, said)
    return BadRequestError(f"status {status}", said)


def retry_after(value: str) -> float:
    """Seconds of a Retry-After header, a number or a date; 0 where there is none."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


def _room(detail: str) -> int | None:
    """Tokens that an answer may have, where the server tells."""
    answer = _ANSWER_LIMIT.search(detail)
    if answer is not None:
        return int(answer[1] or answer[2])
    limit, used = _CONTEXT_LIMIT.search(detail), _CONTEXT_USED.search(detail)
    return None if limit is None or used is None else int(limit[1]) - int(used[1] or used[2])


def _error_object(body: bytes) -> Mapping[str, Any]:
    """The object that describes an error, wherever a server puts it."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    if isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, Mapping):
        return {}
    inner = value.get("error")
    if isinstance(inner, str):
        return {"message": inner}
    return inner if isinstance(inner, Mapping) else value
