"""The sessions of one MCP server, in an event loop with a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

from at2po_env.errors import ToolError
from at2po_env.tools.mcp.sessions import Answer, Call, McpServerError, Record, Session
from at2po_env.tools.mcp.transports import GRACE_S, Allowance

ResultT = TypeVar("ResultT")

_MARGIN_S = 5.0  # beyond the deadlines inside the loop; used up only if the loop itself is stuck


@dataclass(frozen=True)
class Limits:
    """How long a server may take, and how much it may hold and send; see `McpServer`."""

    timeout_s: float
    start_s: float
    max_sessions: int
    max_bytes: int


class SessionPool:
    """Opens sessions as calls need them, and keeps them while they are idle.

    Args:
        connect: Opens a transport that spends from an allowance.
        limits: Deadlines and bounds.
    """

    def __init__(
        self, connect: Callable[[Allowance], AbstractAsyncContextManager[Any]], limits: Limits
    ) -> None:
        self._connect, self._limits = connect, limits
        self._sessions: set[Session] = set()
        self._idle: list[Session] = []  # the one unused for longest comes first
        self._busy = asyncio.Semaphore(limits.max_sessions)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="at2po-mcp", daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, ResultT], timeout_s: float) -> Future[ResultT]:
        """Begin `work` in the loop; it ends after `timeout_s` seconds at the latest."""
        return asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, timeout_s), self._loop)

    def close(self) -> None:
        """End all sessions, their processes, and the thread; work in progress is cancelled."""
        self._loop.call_soon_threadsafe(lambda: self._loop.create_task(self._shutdown()))
        self._thread.join(GRACE_S + 3 * _MARGIN_S)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()

    async def list_tools(self) -> list[Any]:
        """Return the server's tools; runs in the loop."""
        async with self._busy:
            session = await self._standing_at(())
            try:
                tools = await session.list_tools(self._limits.timeout_s)
            except BaseException:
                self._drop(session)
                raise
            self._idle.append(session)
            return tools

    async def call(self, tool: str, arguments: str, record: Record, *, writes: bool) -> tuple[Answer, Record]:
        """Call a tool in a session that stands where `record` says; runs in the loop.

        Raises:
            ToolError: There was no proper answer, or the replay went another way.
        """
        async with self._busy:
            session = await self._standing_at(record)
            try:
                answer = await session.ask(tool, arguments, self._limits.timeout_s)
            except BaseException:
                self._drop(session)
                raise
            if writes:
                session.record = (*record, Call(tool, arguments, answer.digest))
            self._idle.append(session)
            return answer, session.record

    async def _standing_at(self, record: Record) -> Session:
        """Take an idle session that has this record, or open one and replay the record there."""
        for session in reversed(list(self._idle)):
            if session.over:
                self._idle.remove(session)
                self._drop(session)
            elif session.record == record:
                self._idle.remove(session)
                return session
        while len(self._sessions) >= self._limits.max_sessions and self._idle:
            self._drop(self._idle.pop(0))
        session = Session(self._connect, self._limits.max_bytes)
        self._sessions.add(session)
        try:
            await session.open(self._limits.start_s)
            for number, call in enumerate(record, 1):
                answer = await session.ask(call.tool, call.arguments, self._limits.timeout_s)
                if answer.digest != call.result:
                    raise ToolError(
                        f"this episode cannot be continued: call {number} of {len(record)} ({call.tool}) "
                        "gave another result when it was replayed in a new session of the MCP server. Fix: "
                        "fork only servers whose results follow from the calls before, or declare "
                        "stateless=True"
                    )
        except BaseException:
            self._drop(session)
            raise
        session.record = record
        return session

    def _drop(self, session: Session) -> None:
        """Close a session without waiting for it; it makes room at once."""
        self._sessions.discard(session)
        session.close()

    async def _shutdown(self) -> None:
        """Let every session end within its grace, cancel what is left, and stop the loop."""
        for session in list(self._sessions):
            self._drop(session)
        for wait_s in (GRACE_S + 1.0, _MARGIN_S):
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            if tasks:
                await asyncio.wait(tasks, timeout=wait_s)
            for task in tasks:
                task.cancel()
        await asyncio.sleep(0)  # the transports that were closed last say good-bye
        self._loop.stop()


def wait_for(future: Future[ResultT], timeout_s: float) -> ResultT:
    """Wait for what `SessionPool.submit` began.

    Raises:
        ToolError: It failed, took too long, or the pool was closed meanwhile.
    """
    try:
        return future.result(timeout_s + _MARGIN_S)
    except TimeoutError as error:
        raise McpServerError(f"the MCP server was not ready within {timeout_s:g} s") from error
    except CancelledError as error:
        raise ToolError("the MCP server was closed during the call") from error
    finally:
        future.cancel()
