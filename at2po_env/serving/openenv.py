"""OpenEnv's protocol: a WebSocket whose connection is a session, for that project's clients.

    {"type": "reset", "data": {"seed": 7, "options": {...}}}, {"type": "step", "data": {"action": "..."}}
    -> {"type": "observation", "data": {"observation": {...}, "reward": ..., "done": ...}}
    {"type": "state"} -> {"type": "state", "data": {"episode_id": ..., "step_count": ...}}
    {"type": "close"} ends the connection

A mistake is answered {"type": "error", "data": {"message": ..., "code": ...}}. The observation has `text`,
`info`, `terminated` and `truncated`. Forks and snapshots are not part of that protocol. It needs a
package for WebSockets beside uvicorn, such as `websockets`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from at2po_env.serving.sessions import SessionError, Sessions


async def play_openenv(
    socket: WebSocket,
    sessions: Sessions,
    in_pool: Callable[[Callable[[], Any]], Awaitable[Any]],
    *,
    first_s: float,
    idle_s: float,
    max_bytes: int,
) -> None:
    """Answer one connection until it ends, says nothing for too long, or sends too much."""
    await socket.accept()
    player, wait_s = _Player(sessions), first_s
    try:
        while True:
            text = await asyncio.wait_for(socket.receive_text(), wait_s)
            if len(text) > max_bytes:
                return
            message = _read(text)
            if message.get("type") == "close":
                return
            wait_s = idle_s if message.get("type") == "reset" else wait_s
            answer = await in_pool(lambda message=message: player.answer(message))  # type: ignore[misc]
            await socket.send_text(json.dumps(answer, allow_nan=False))
    except (WebSocketDisconnect, TimeoutError, KeyError):  # KeyError: a binary message
        return
    finally:
        if player.session is not None:
            key = player.session
            # Shielded: this task may be cancelled with its connection, and the session must end all the same.
            await asyncio.shield(asyncio.ensure_future(in_pool(lambda: sessions.close([key]))))
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # the client may be gone already
            await socket.close()


class _Player:
    """The session of a connection."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self.session: str | None = None
        self._turn = 0

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """Do what a message asks; a mistake is an answer too."""
        kind, data = message.get("type"), message.get("data") or {}
        try:
            if kind == "state":
                return _message("state", {"episode_id": self.session, "step_count": self._turn})
            if kind not in ("reset", "step"):
                return _error("UNKNOWN_TYPE", "expected an object with type reset, step, state or close")
            if not isinstance(data, dict):
                return _error("VALIDATION_ERROR", "data: expected an object")
            return self._reset(data) if kind == "reset" else self._step(data)
        except SessionError as error:
            return _error("CAPACITY_REACHED" if error.status in (429, 503) else "EXECUTION_ERROR", str(error))

    def _reset(self, data: dict[str, Any]) -> dict[str, Any]:
        seed, options = data.get("seed"), data.get("options")
        if not (seed is None or (type(seed) is int and 0 <= seed < 1 << 128)):
            return _error("VALIDATION_ERROR", "data.seed: expected a whole number from 0, or null")
        if not (options is None or isinstance(options, dict)):
            return _error("VALIDATION_ERROR", "data.options: expected an object, or null")
        begun = self._sessions.reset(self.session, seed, options)
        self.session, self._turn = begun["session"], 0
        return _observation(begun["observation"], None, begun["info"])

    def _step(self, data: dict[str, Any]) -> dict[str, Any]:
        action = data.get("action")
        if not isinstance(action, str):
            return _error("VALIDATION_ERROR", "data.action: expected the text of one turn")
        if self.session is None:
            return _error("SESSION_ERROR", "step before the first reset")
        step = self._sessions.step(self.session, action)
        self._turn += 1
        return _observation(
            step["observation"], step["reward"], step["info"], step["terminated"], step["truncated"]
        )


def _read(text: str) -> dict[str, Any]:
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


def _message(kind: str, data: dict[str, Any]) -> dict[str, Any]:
    return {"type": kind, "data": data}


def _error(code: str, text: str) -> dict[str, Any]:
    return _message("error", {"message": text, "code": code})


def _observation(
    text: str, reward: float | None, info: dict[str, Any], terminated: bool = False, truncated: bool = False
) -> dict[str, Any]:
    observation = {"text": text, "info": info, "terminated": terminated, "truncated": truncated}
    return _message(
        "observation", {"observation": observation, "reward": reward, "done": terminated or truncated}
    )
