"""An MCP server behind an environment; its sessions stand where an episode is, so that it can be forked.

A session of a server cannot be copied. An episode therefore remembers its calls (the *record*, which is its
state: immutable, in its snapshots, shared by its forks), and any session in which the same calls were made
stands for it. A call looks for an idle session with the episode's record; where there is none, as after a
fork, a new session is opened and the record replayed, every result being compared with the recorded one.
Which session serves which episode is never part of an episode.

The error model: when a server dies, hangs, floods or talks nonsense, the call has failed, as that of any tool
can. The session is closed then, and the record keeps no trace of the call: the next one replays into a fresh
session. A result that differs in a replay is a failed call too, which says so.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from at2po_env.errors import ConfigError, ToolError
from at2po_env.tools.base import Backend
from at2po_env.tools.mcp.pool import Limits, SessionPool, wait_for
from at2po_env.tools.mcp.sessions import Answer, Record
from at2po_env.tools.mcp.tools import McpTool
from at2po_env.tools.mcp.transports import Allowance, http_transport, stdio_transport

ResultT = TypeVar("ResultT")

_open_servers: weakref.WeakSet[McpServer] = weakref.WeakSet()


class McpServer(Backend):
    """An MCP server whose tools an environment can call; thread safe.

    Args:
        command: Program and arguments of a server that speaks over its pipes; each session is a process.
        url: Address of a server that speaks streamable HTTP; give this or `command`.
        name: Name under which episodes keep the record; two servers of one environment need two names.
        env: Further environment variables of the process, such as a key. It inherits PATH, HOME and a few
            more.
        cwd: Working directory of the process.
        headers: HTTP headers, such as Authorization.
        stateless: True declares that no call changes what later ones return: nothing is recorded or replayed,
            and any session serves any episode. False records every call. By default the server's own
            annotations decide: a tool annotated as read-only is not recorded.
        timeout_s: Deadline of each call on the server, a replayed one included.
        start_s: Deadline for the start of a session.
        max_sessions: Sessions at the same time; the one unused for longest makes room.
        max_bytes: The most that the server may send for one call; more ends the session.

    Raises:
        ConfigError: Arguments that make no server.
    """

    def __init__(  # noqa: PLR0913 - keyword-only options of one connection
        self,
        command: Sequence[str] | None = None,
        *,
        url: str | None = None,
        name: str = "mcp",
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        headers: Mapping[str, str] | None = None,
        stateless: bool | None = None,
        timeout_s: float = 30.0,
        start_s: float = 30.0,
        max_sessions: int = 16,
        max_bytes: int = 8 * 2**20,
    ) -> None:
        if (
            (command is None) == (url is None)
            or isinstance(command, str)
            or (command is not None and not command)
        ):
            raise ConfigError(
                "McpServer needs either command=, a list of the program and its arguments, or url=; got "
                f"command={command!r:.80} and url={url!r:.80}"
            )
        if command is not None and os.name != "posix":
            raise ConfigError("McpServer: command= needs process groups, a POSIX system. Fix: give url=")
        if timeout_s <= 0 or start_s <= 0 or max_sessions < 1 or max_bytes < 1024:
            raise ConfigError(
                "McpServer: timeout_s > 0, start_s > 0, max_sessions >= 1 and max_bytes >= 1024, got "
                f"{timeout_s}, {start_s}, {max_sessions} and {max_bytes}"
            )
        self.key = name
        self.stateless = stateless
        self._command, self._url = command, url
        self._env, self._cwd, self._headers = dict(env or {}), cwd, dict(headers or {})
        self._limits = Limits(timeout_s, start_s, max_sessions, max_bytes)
        self._users: weakref.WeakSet[Any] = weakref.WeakSet()
        self._lock = threading.Lock()  # guards the pool and the users
        self._pool: SessionPool | None = None

    def __repr__(self) -> str:
        return f"McpServer({self._url or ' '.join(self._command or ())!r})"

    def tools(self, names: Sequence[str] | None = None, *, prefix: str = "") -> list[McpTool]:
        """Ask the server for its tools; starts it.

        Args:
            names: The server's names of those to return, in this order. Default: all.
            prefix: Put before the names by which the policy calls them.

        Raises:
            ToolError: The server cannot be started, or lists no such tools.
        """
        limits = self._limits
        listed = self._run(SessionPool.list_tools, 2 * limits.start_s + limits.timeout_s)
        found = {tool.name: tool for tool in listed}
        missing = [name for name in names or () if name not in found]
        if missing or not found:
            raise ToolError(f"{self!r} has no tool {', '.join(missing)}; its tools: {', '.join(found)[:500]}")
        return [McpTool(self, found[name], prefix=prefix) for name in (names or found)]

    def records(self, *, read_only: bool) -> bool:
        """Whether the calls of a tool are recorded."""
        return not (self.stateless or (read_only and self.stateless is None))

    def call(self, tool: str, arguments: str, record: Record, *, writes: bool) -> tuple[Answer, Record]:
        """Call a tool in a session that stands where `record` says.

        Args:
            tool: The server's name of it.
            arguments: A JSON object.
            record: The calls before it.
            writes: Whether to record the call.

        Returns:
            The answer, and the record after the call.

        Raises:
            ToolError: There was no proper answer in time, or a replay went another way.
        """
        waits = 2 * self._limits.start_s + self._limits.timeout_s * (len(record) + 1)
        return self._run(
            partial(SessionPool.call, tool=tool, arguments=arguments, record=record, writes=writes), waits
        )

    def attach(self, user: object) -> None:
        """Note an environment that calls this server."""
        with self._lock:
            self._users.add(user)

    def detach(self, user: object) -> None:
        """Note that an environment was closed; with the last one, all sessions end."""
        with self._lock:
            before = len(self._users)
            self._users.discard(user)
            last = before > 0 and not self._users
        if last:
            self.close()

    def close(self) -> None:
        """End all sessions, their processes and the thread. A later call starts anew and replays."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, work: Callable[[SessionPool], Coroutine[Any, Any, ResultT]], timeout_s: float) -> ResultT:
        """Run work in the pool, which is started where there is none."""
        with self._lock:
            if self._pool is None:
                self._pool = SessionPool(self._connect, self._limits)
                _open_servers.add(self)
            future = self._pool.submit(work(self._pool), timeout_s)
        return wait_for(future, timeout_s)

    def _connect(self, allowance: Allowance) -> AbstractAsyncContextManager[Any]:
        if self._command is not None:
            return stdio_transport(self._command, env=self._env, cwd=self._cwd, allowance=allowance)
        assert self._url is not None
        return http_transport(
            self._url, headers=self._headers, timeout_s=self._limits.timeout_s, allowance=allowance
        )


@atexit.register
def _close_all() -> None:
    """Leave no server process behind at the end of the program."""
    for server in list(_open_servers):
        server.close()
