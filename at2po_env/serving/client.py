"""`RemoteEnv`: a served environment, played and forked like one of this process."""

from __future__ import annotations

import json
import os
import time
import weakref
from collections import deque
from typing import Any, Self, cast

import tenacity

from at2po_env.errors import ConfigError, EnvError, SnapshotError
from at2po_env.forking.base import ForkableEnv
from at2po_env.forking.snapshots import MAX_CHARACTERS, Snapshot
from at2po_env.http.client import Answer, Connections, OversizeError, TransferError
from at2po_env.serving.messages import TOKEN_VARIABLE
from at2po_env.spaces import Text
from at2po_env.vector import TextVectorEnv, make_vector

FIRST_PAUSE_S = 0.05
_REFUSED_FOR_NOW = (429, 503)  # the server did nothing, so that another try is safe
_DESCRIBED = {str: "text", bool: "true or false", dict: "an object", float: "a number", list: "a list"}


class _Handle:
    """A session of ours on the server; when nothing holds it any more, the next request closes it."""

    def __init__(self, key: str, abandoned: deque[str]) -> None:
        self.key = key
        weakref.finalize(self, abandoned.append, key)


class RemoteEnv(ForkableEnv):
    """An environment that `at2po serve-env` serves.

    Also `gymnasium.make("at2po/Remote-v0", url=...)`. An episode lives in a session of the
    server, and a fork is a session of its own. A snapshot holds the server's own snapshot, as declared JSON,
    and is restored into a new session with the first turn after it. Sessions of environments that were
    closed, or that nothing refers to any more, are closed.

    Args:
        url: Address of the server, `http://HOST:PORT`.
        token: Bearer token; default: the environment variable `AT2PO_ENV_TOKEN`.
        timeout_s: Deadline of a request, tries included; longer than that of the server is useful.
        render_mode: None: the transcript is the server's.

    Raises:
        ConfigError: The address, the token or a number cannot be used. The server is not asked yet.
    """

    metadata = {"render_modes": [], "render_fps": 1}  # noqa: RUF012 - Gymnasium declares it so

    def __init__(
        self, url: str, *, token: str | None = None, timeout_s: float = 90.0, render_mode: str | None = None
    ) -> None:
        if timeout_s <= 0 or render_mode is not None:
            raise ConfigError(
                f"RemoteEnv needs timeout_s > 0 and no render_mode, got {timeout_s} and {render_mode!r}"
            )
        self.action_space = Text()
        self.observation_space = Text()
        self.render_mode = None
        self._timeout_s = timeout_s
        self._connections = Connections(url, token or os.environ.get(TOKEN_VARIABLE))
        self._abandoned: deque[str] = deque()
        self._description: dict[str, Any] | None = None
        self._session: _Handle | None = None
        self._captured: str | None = None
        """The server's snapshot of the present state, where it is known, as JSON."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Begin an episode on the server.

        Raises:
            EnvError: The server refuses, fails, or does not answer in time.
        """
        super().reset(seed=seed)
        if seed is None:  # the next episode follows from the state of the last one
            self._attach()
        session = self._session.key if self._session is not None else None
        content = self._ask("/reset", {"session": session, "seed": seed, "options": options})
        self._captured = None
        if session is None:
            self._session = _Handle(self._field(content, "session", str), self._abandoned)
        return self._field(content, "observation", str), self._field(content, "info", dict)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Take a turn on the server.

        Raises:
            EnvError: As for `reset`; no episode is running; or the session was not used for too long.
        """
        self._attach()
        if self._session is None:
            raise EnvError("step before the first reset. Fix: call reset first")
        if not isinstance(action, str):
            raise EnvError(f"an action is the text of one turn (str), got {type(action).__name__}")
        content = self._ask("/step", {"session": self._session.key, "action": action})
        self._captured = None
        return (
            self._field(content, "observation", str),
            self._field(content, "reward", float),
            self._field(content, "terminated", bool),
            self._field(content, "truncated", bool),
            self._field(content, "info", dict),
        )

    def close(self) -> None:
        """Close the session; a server that cannot be reached closes it by itself."""
        if self._session is not None:
            self._abandoned.append(self._session.key)
            self._session = None
        self._close_abandoned()

    @property
    def tasks(self) -> range:
        """The indices of the served environment's tasks.

        Raises:
            AttributeError: It draws its tasks by seed alone.
        """
        count = self._described().get("tasks")
        if type(count) is not int or count < 0:
            raise AttributeError("the served environment has no list of tasks: it draws them by seed")
        return range(count)

    def _described(self) -> dict[str, Any]:
        """Ask once what is served."""
        if self._description is None:
            self._description = self._ask("/", {})
        return self._description

    def example_actions(self) -> list[str]:
        """Return the served environment's own examples."""
        found = self._field(self._described(), "example_actions", list)
        return [action for action in found if isinstance(action, str)] or list(super().example_actions())

    def get_state(self) -> str | None:
        """Return the server's snapshot as JSON; None before the first reset."""
        if self._captured is None and self._session is not None:
            content = self._ask("/snapshot", {"session": self._session.key})
            self._captured = json.dumps(self._field(content, "snapshot", dict), sort_keys=True)
        return self._captured

    def set_state(self, state: str | None) -> None:
        """Continue from a snapshot, in a session that the next turn opens."""
        self._session, self._captured = None, state

    def dump_state(self, state: str | None) -> Any:
        """Return the server's snapshot as an object."""
        return None if state is None else json.loads(state)

    def load_state(self, data: Any) -> str | None:
        """Return what `dump_state` was given."""
        if data is None:
            return None
        text = json.dumps(data, sort_keys=True)
        Snapshot.from_json(text)  # the server checks what it holds; this finds what is no snapshot at all
        return text

    def _hand_over(self, twin: Self) -> None:
        if self._session is None:
            twin.set_state(self._captured)
            return
        content = self._ask("/fork", {"session": self._session.key})
        twin._session = _Handle(self._field(content, "session", str), self._abandoned)

    def _attach(self) -> None:
        """Restore the known state into a new session, where there is none."""
        if self._session is None and self._captured is not None:
            body = {"session": None, "snapshot": json.loads(self._captured)}
            try:
                key = self._field(self._ask("/restore", body), "session", str)
            except EnvError as error:
                raise SnapshotError(str(error)) from error
            self._session = _Handle(key, self._abandoned)

    def _close_abandoned(self) -> None:
        keys: list[str] = []
        while self._abandoned and len(keys) < 1000:
            keys.append(self._abandoned.popleft())
        if keys:
            try:
                self._post("/close", {"sessions": keys})
            except (TransferError, OversizeError):
                return

    def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Send a request and read the answer, again while the server is full.

        Raises:
            EnvError: There is no proper answer in time, or it is a refusal.
        """
        if self._abandoned:
            self._close_abandoned()
        until = time.monotonic() + self._timeout_s
        tries = tenacity.Retrying(
            retry=tenacity.retry_if_result(lambda answer: answer.status in _REFUSED_FOR_NOW),
            stop=tenacity.stop_before_delay(self._timeout_s),
            wait=tenacity.wait_exponential(FIRST_PAUSE_S, max=1.0),
            retry_error_callback=lambda state: state.outcome and state.outcome.result(),
        )
        try:
            status, _, content = tries(self._post, path, body, until)
        except (TransferError, OversizeError) as error:
            raise EnvError(f"{self._connections.url}{path}: {error}") from error
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise EnvError(f"{self._connections.url}{path}: the answer is no JSON ({error})") from error
        if status != 200 or not isinstance(answer, dict):
            detail = answer.get("detail") if isinstance(answer, dict) else answer
            raise EnvError(f"{self._connections.url}{path}: status {status}: {str(detail)[:500]}")
        return answer

    def _post(self, path: str, body: dict[str, Any], until: float | None = None) -> Answer:
        deadline = time.monotonic() + self._timeout_s if until is None else until
        text = json.dumps(body, allow_nan=False).encode("ascii")
        return self._connections.post(path, text, deadline=deadline, max_bytes=MAX_CHARACTERS)

    def _field(self, content: dict[str, Any], name: str, kind: type[Any]) -> Any:
        """Return a field of an answer if it has the type that it should have."""
        value = content.get(name)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise EnvError(
                f"{self._connections.url}: the answer's {name} is {value!r:.80}, expected {_DESCRIBED[kind]}"
            )
        return value


def make_remote_vector(**options: Any) -> TextVectorEnv:
    """Build many environments that one server plays; see `vector.make_vector`."""
    return make_vector(cast(Any, RemoteEnv), **options)
