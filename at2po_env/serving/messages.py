"""The requests that a server of environments answers, each a JSON object sent by POST.

    /reset     {"session": null or id, "seed": 7, "options": {...}}  -> {"session", "observation", "info"}
    /step      {"session": id, "action": "..."}
               -> {"observation", "reward", "terminated", "truncated", "info"}
    /snapshot  {"session": id}                        -> {"snapshot": {...}}
    /restore   {"session": null or id, "snapshot": {...}}  -> {"session"}
    /fork      {"session": id}                        -> {"session": the id of the fork}
    /close     {"sessions": [id, ...]}                -> {"closed": how many there were}

`null` as a session opens one. A snapshot is what `Snapshot.to_json` writes, as an object. A refusal is
`{"detail": "..."}` with a status: 400 for a mistake in the request, 404 for a session that is not there, 409
for one that is busy, 413 and 422 for bodies that do not fit, 429 and 503 for limits, 504 for a late
environment, 500 for a failing one. `GET /` describes the environment; `GET /health` and `GET /metrics` are
for operators.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainValidator

TOKEN_VARIABLE = "AT2PO_ENV_TOKEN"
"""The environment variable that holds the bearer token of a server of environments."""


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("expected a string")
    return value


Action = Annotated[str, PlainValidator(_text)]  # lone surrogates included: what a policy writes is data
SessionId = Annotated[str, Field(min_length=1, max_length=64)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ResetRequest(_Request):
    """Begins an episode."""

    session: SessionId | None = None
    seed: int | None = Field(default=None, ge=0, lt=1 << 128)
    options: dict[str, Any] | None = None


class StepRequest(_Request):
    """Takes a turn."""

    session: SessionId
    action: Action


class SessionRequest(_Request):
    """Names a session, to capture or fork it."""

    session: SessionId


class RestoreRequest(_Request):
    """Puts a session into a captured state."""

    session: SessionId | None = None
    snapshot: dict[str, Any]


class CloseRequest(_Request):
    """Ends sessions; those that are not there are passed over."""

    sessions: list[SessionId] = Field(max_length=4096)
