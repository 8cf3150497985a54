"""The sessions of a server: environments by id, bounded in number, rate and age.

All methods may be called from any thread. Each call of an environment has a deadline. A session whose call is
given up is gone, because its environment may still be at work.
"""

from __future__ import annotations

import json
import math
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import gymnasium
import numpy as np

from at2po_env.deadlines import DeadlineError, run_with_deadline
from at2po_env.errors import At2poError, EnvError
from at2po_env.forking.base import fork, restore, snapshot
from at2po_env.forking.random_state import entropy
from at2po_env.forking.snapshots import Snapshot

Env = gymnasium.Env[str, str]
ResultT = TypeVar("ResultT")


class SessionError(At2poError):
    """A request cannot be answered; `status` is the HTTP status that says so."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class _Session:
    def __init__(self, env: Env) -> None:
        self.env = env
        self.used = time.monotonic()
        self.busy = threading.Lock()


class Sessions:
    """Plays episodes of one environment for clients.

    Args:
        env: The environment; every session is a fork of it, and it is never played itself.
        max_sessions: Sessions at the same time.
        opens_per_s: Sessions that may be opened per second, in bursts of as many as twice that.
        idle_s: Seconds after which a session that was not used is closed.
        timeout_s: Deadline of one call of an environment.

    Raises:
        SnapshotError: The environment cannot be forked.
    """

    def __init__(
        self, env: Env, *, max_sessions: int, opens_per_s: float, idle_s: float, timeout_s: float
    ) -> None:
        fork(env).close()
        self.env = env
        self._max_sessions, self._idle_s, self._timeout_s = max_sessions, idle_s, timeout_s
        self._rate, self._burst = opens_per_s, max(2 * opens_per_s, 1.0)
        self._budget, self._counted = self._burst, time.monotonic()
        self._sessions: dict[str, _Session] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sessions)

    def reset(self, session: str | None, seed: int | None, options: dict[str, Any] | None) -> dict[str, Any]:
        """Begin an episode, in a new session where none is named."""
        key = session or self._open(self.env)
        if session is None and seed is None:
            seed = entropy() >> 65  # forks of one environment would all draw the same
        try:
            observation, info = self._call(key, lambda env: env.reset(seed=seed, options=options))
        except SessionError:
            if session is None:
                self.close([key])
            raise
        return {"session": key, "observation": observation, "info": plain(info)}

    def step(self, session: str, action: str) -> dict[str, Any]:
        """Take a turn."""
        observation, reward, terminated, truncated, info = self._call(session, lambda env: env.step(action))
        reward = float(reward)
        if not math.isfinite(reward):
            raise SessionError(500, f"the environment failed: its reward is {reward}")
        return {
            "observation": observation,
            "reward": reward,
            "terminated": bool(terminated),
            "truncated": bool(truncated),
            "info": plain(info),
        }

    def snapshot(self, session: str) -> dict[str, Any]:
        """Capture a session."""
        return {"snapshot": self._call(session, lambda env: json.loads(snapshot(env).to_json()))}

    def restore(self, session: str | None, captured: Mapping[str, Any]) -> dict[str, Any]:
        """Put a session into a captured state, a new one where none is named."""
        key = session or self._open(self.env)
        try:
            self._call(key, lambda env: restore(env, Snapshot.from_json(json.dumps(captured))))
        except SessionError:
            if session is None:
                self.close([key])
            raise
        return {"session": key}

    def fork(self, session: str) -> dict[str, Any]:
        """Open a session in the state of another."""
        return {"session": self._call(session, self._open)}

    def close(self, sessions: list[str]) -> dict[str, Any]:
        """End sessions that are there."""
        with self._lock:
            found = [item for key in sessions if (item := self._sessions.pop(key, None)) is not None]
        for item in found:
            if item.busy.acquire(blocking=False):  # else a call is at work in it, and ends unheard
                _close_quietly(item.env)
        return {"closed": len(found)}

    def close_idle(self) -> int:
        """End the sessions that were not used for `idle_s` seconds; returns how many."""
        oldest = time.monotonic() - self._idle_s
        with self._lock:
            late = [
                key for key, item in self._sessions.items() if item.used < oldest and not item.busy.locked()
            ]
        self.close(late)
        return len(late)

    def close_all(self) -> None:
        """End every session, and the environment."""
        self.close(list(self._sessions))
        _close_quietly(self.env)

    def _open(self, env: Env) -> str:
        """Fork an environment into a new session.

        Raises:
            SessionError: That would be too many, or too many in a short time.
        """
        with self._lock:
            now = time.monotonic()
            self._budget = min(self._burst, self._budget + self._rate * (now - self._counted))
            self._counted = now
            if self._budget < 1.0:
                raise SessionError(429, f"more than {self._rate:g} sessions were opened per second")
            if len(self._sessions) >= self._max_sessions:
                raise SessionError(503, f"all {self._max_sessions} sessions are in use; close some")
            self._budget -= 1.0
            key = secrets.token_urlsafe(16)
            self._sessions[key] = _Session(fork(env))
            return key

    @contextmanager
    def _taken(self, key: str) -> Iterator[_Session]:
        with self._lock:
            item = self._sessions.get(key)
        if item is None:
            raise SessionError(404, "there is no such session: it was closed, or not used for too long")
        if not item.busy.acquire(blocking=False):
            raise SessionError(409, "the session is busy with an earlier request")
        try:
            yield item
        finally:
            item.used = time.monotonic()
            item.busy.release()

    def _call(self, key: str, call: Callable[[Env], ResultT]) -> ResultT:
        """Call the environment of a session within the deadline.

        Raises:
            SessionError: The session is not there or busy, or the call failed or was late.
        """
        with self._taken(key) as item:
            try:
                return run_with_deadline(lambda: call(item.env), self._timeout_s, owner=self, name="session")
            except SessionError:
                raise
            except DeadlineError as error:
                with self._lock:
                    self._sessions.pop(key, None)  # not closed: its environment may still be at work
                raise SessionError(504, f"the environment: {error}; the session is gone") from error
            except EnvError as error:
                raise SessionError(400, str(error)) from error
            except (Exception, SystemExit) as error:  # an environment's own code, on behalf of a client
                raise SessionError(500, f"the environment failed: {type(error).__name__}: {error}") from error


def _close_quietly(env: Env) -> None:
    try:
        env.close()
    except Exception:  # noqa: BLE001 - an environment's own code; the session is gone either way
        return


def plain(value: Any) -> Any:
    """Return a value of an info as JSON; what has no JSON form is described by its `repr`, shortened."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else repr(float(value))
    if isinstance(value, np.integer | np.bool_):
        return value.item()
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return repr(value)[:200]
