"""One session with an MCP server: opened, asked and closed within one event loop."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple, TypeVar

from at2po_env.errors import MissingExtraError, ToolError
from at2po_env.tools.mcp.transports import Allowance

try:
    import anyio
    from mcp import Client, MCPError
    from mcp_types import (
        CONNECTION_CLOSED,
        INVALID_PARAMS,
        CallToolRequest,
        CallToolRequestParams,
        CallToolResult,
        Implementation,
        Tool,
    )
    from pydantic import ValidationError
except ModuleNotFoundError as _error:
    raise MissingExtraError(f"{_error}. Fix: pip install 'at2po[mcp]'") from _error

ResultT = TypeVar("ResultT")

MAX_TOOLS = 512
CLOSE_S = 5.0
_REASON_CHARS = 300


class McpServerError(ToolError, ConnectionError):
    """A server gave no proper answer; it counts as a service that failed (`health` pauses runs for those)."""


class Call(NamedTuple):
    """A call that changed a session, as an episode remembers it.

    Attributes:
        tool: The server's name of the tool.
        arguments: The arguments as JSON.
        result: Digest of the result, with which a replay is compared.
    """

    tool: str
    arguments: str
    result: str


Record = tuple[Call, ...]
"""The calls that brought a session from its beginning to where it is."""


class Answer(NamedTuple):
    """The result of a call.

    Attributes:
        result: What the server answered; its words where it refused the arguments.
        ok: False if the server says that the call failed.
    """

    result: CallToolResult | str
    ok: bool

    @property
    def digest(self) -> str:
        """Digest of everything that the server answered but its metadata."""
        text = self.result
        if not isinstance(text, str):
            text = text.model_dump_json(include={"content", "structured_content"})
        return hashlib.sha256(f"{self.ok}:{text}".encode("utf-8", "replace")).hexdigest()[:32]


class Session:
    """A connection to a server in a task of its own, from the handshake to the end.

    Attributes:
        record: The calls made so far that may have changed the server's side.
    """

    def __init__(
        self, connect: Callable[[Allowance], AbstractAsyncContextManager[Any]], max_bytes: int
    ) -> None:
        self.record: Record = ()
        self._connect = connect
        self._allowance = Allowance(max_bytes)
        self._stop = asyncio.Event()
        self._client: Client | None = None
        self.task: asyncio.Task[None] | None = None

    @property
    def over(self) -> bool:
        """Whether the server has gone, or sent too much."""
        return self.task is None or self.task.done() or self._allowance.ended

    async def open(self, start_s: float) -> None:
        """Start the server or connect to it, and shake hands.

        The older handshake comes first: with it, a server over HTTP keeps a session, and state in it.

        Raises:
            ToolError: That failed, or took too long.
        """
        until = asyncio.get_running_loop().time() + start_s
        for mode in ("legacy", "auto"):
            ready: asyncio.Future[Client] = asyncio.get_running_loop().create_future()
            self.task = asyncio.create_task(self._live(mode, ready))
            self.task.add_done_callback(lambda task: task.cancelled() or task.exception())
            left = max(until - asyncio.get_running_loop().time(), 0.0)
            both: set[asyncio.Future[Any]] = {self.task, ready}
            await asyncio.wait(both, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                self._client = ready.result()
                return
            if not self.task.done():
                self.task.cancel()
                raise self._failure(f"did not start within {start_s:g} s")
            error = leaf(self.task.exception())
            if not isinstance(error, MCPError) or error.error.code == CONNECTION_CLOSED:
                break  # it did not refuse the handshake: another one is no better
        raise self._failure(f"cannot be started: {_described(error)}") from error

    async def _live(self, mode: str, ready: asyncio.Future[Client]) -> None:
        async with Client(
            self._connect(self._allowance),
            mode=mode,
            cache=None,
            client_info=Implementation(name="at2po", version="1"),
        ) as client:
            ready.set_result(client)
            await self._stop.wait()

    async def ask(self, tool: str, arguments: str, timeout_s: float) -> Answer:
        """Call a tool.

        What the server declares about structured results is not checked: only their text is shown, and a
        regular expression of a hostile server must not run in this process.

        Args:
            tool: The server's name of it.
            arguments: A JSON object.
            timeout_s: Seconds for the answer.

        Raises:
            ToolError: There was no proper answer; the session is in an unknown state then.
        """
        parameters = CallToolRequestParams(name=tool, arguments=json.loads(arguments))
        assert self._client is not None
        send = self._client.session.send_request
        try:
            call = send(CallToolRequest(params=parameters), CallToolResult)
            result = await self._within(call, timeout_s)
        except MCPError as error:
            if error.error.code != INVALID_PARAMS:
                raise self._failure(f"failed: {_described(error)}") from error
            return Answer(error.error.message, ok=False)
        return Answer(result, ok=not result.is_error)

    async def list_tools(self, timeout_s: float) -> list[Tool]:
        """Return the server's tools, all pages of them.

        Raises:
            ToolError: There was no proper answer, or there are more than `MAX_TOOLS`.
        """
        assert self._client is not None
        client = self._client

        async def pages() -> list[Tool]:
            page = await client.list_tools()
            tools = page.tools
            while page.next_cursor is not None and len(tools) <= MAX_TOOLS:
                page = await client.list_tools(cursor=page.next_cursor)
                tools = [*tools, *page.tools]
            return tools

        try:
            tools = await self._within(pages(), timeout_s)
        except MCPError as error:
            raise self._failure(f"does not list its tools: {_described(error)}") from error
        if len(tools) > MAX_TOOLS:
            raise self._failure(f"has more than {MAX_TOOLS} tools")
        return tools

    async def _within(self, call: Coroutine[Any, Any, ResultT], timeout_s: float) -> ResultT:
        """Wait for an answer, the end of the session, or the deadline, whichever comes first."""
        self._allowance.renew()
        assert self.task is not None
        asked = asyncio.create_task(call)
        try:
            await asyncio.wait({asked, self.task}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                return asked.result()
        except MCPError:
            if self._allowance.exceeded:
                raise self._failure("was cut off: it sent too much for one call") from None
            raise
        except (ValidationError, RuntimeError, ValueError, OSError, anyio.ClosedResourceError) as error:
            raise self._failure(f"gave no proper answer: {_described(error)}") from error
        finally:
            asked.cancel()
        why = "ended during the call" if self.task.done() else f"did not answer within {timeout_s:g} s"
        raise self._failure("was cut off: it sent too much for one call" if self._allowance.exceeded else why)

    def close(self) -> None:
        """Begin to end the session; a server that does not let it end has `CLOSE_S` seconds."""
        self._stop.set()
        if self.task is not None and not self.task.done():
            asyncio.get_running_loop().call_later(CLOSE_S, self.task.cancel)

    def _failure(self, what: str) -> McpServerError:
        """Say what the server did, and the last thing that it wrote to its error stream."""
        said = self._allowance.error_tail.decode("utf-8", "replace").strip().splitlines()
        return McpServerError(
            f"the MCP server {what}" + (f" (it wrote: {said[-1][:_REASON_CHARS]})" if said else "")
        )


def leaf(error: BaseException | None) -> BaseException | None:
    """Return the first error inside nested groups of them."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _described(error: BaseException | None) -> str:
    """Say what an error is in one short line, without echoing what the server sent."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"[:_REASON_CHARS]
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:_REASON_CHARS]}" if text else type(error).__name__
