"""Carries messages to MCP servers and back, by pipes or by HTTP, and never takes in more than was agreed.

Both transports yield the pair of streams that the client of the `mcp` package drives. Every byte that a
server sends is counted against an `Allowance`, which each call renews: a server that floods, even between two
calls or on its error stream, loses its session instead of filling our memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from at2po_env.errors import MissingExtraError, ToolError

try:
    import anyio
    import httpx2
    from mcp.client.streamable_http import streamable_http_client
    from mcp.shared.message import SessionMessage
    from mcp_types import jsonrpc_message_adapter
except ModuleNotFoundError as _error:
    raise MissingExtraError(f"{_error}. Fix: pip install 'at2po[mcp]'") from _error

GRACE_S = 1.0
"""How long a server process may take to end by itself once its input is closed."""

_TAIL_BYTES = 2000
_CHUNK_BYTES = 64 * 1024
_POLL_S = 0.01
_INHERITED = ("HOME", "LANG", "LC_ALL", "LOGNAME", "PATH", "SHELL", "TERM", "TMPDIR", "USER")
"""Environment variables that a server process inherits; keys and tokens are not among them."""


class FloodError(ToolError):
    """A server sent more than it may for one call."""


class Allowance:
    """The bytes that a server may still send; `renew` it before each call.

    Attributes:
        closed: Whether the server has closed the connection.
        error_tail: The end of what the server wrote to its error stream.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = self._left = max_bytes
        self.closed = False
        self.error_tail = b""

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.closed or self.exceeded

    @property
    def exceeded(self) -> bool:
        """Whether the server sent more."""
        return self._left < 0

    def renew(self) -> None:
        """Allow the whole amount again, unless it was exceeded."""
        if not self.exceeded:
            self._left = self._max_bytes

    def spend(self, count: int) -> None:
        """Count received bytes.

        Raises:
            FloodError: They are more than is left.
        """
        self._left -= count
        if self.exceeded:
            raise FloodError(f"it sent more than {self._max_bytes:,} bytes for one call")


@asynccontextmanager
async def stdio_transport(
    command: Sequence[str], *, env: Mapping[str, str], cwd: str | Path | None, allowance: Allowance
) -> AsyncIterator[
    tuple[
        anyio.abc.ObjectReceiveStream[SessionMessage | Exception], anyio.abc.ObjectSendStream[SessionMessage]
    ]
]:
    """Start a server process and exchange lines of JSON with it; when the block ends, it is gone.

    The process leads a process group of its own, and the group is killed at the end, so its children go too.
    It inherits few environment variables (`_INHERITED`) beside `env`. A line that is no JSON-RPC message,
    such as a stray print, is skipped.

    Raises:
        OSError: The command cannot be started.
    """
    process = subprocess.Popen(
        list(command),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={name: os.environ[name] for name in _INHERITED if name in os.environ} | dict(env),
        cwd=cwd,
        start_new_session=True,
        bufsize=0,
    )
    loop = asyncio.get_running_loop()
    pipes: list[asyncio.BaseTransport] = []
    to_client, from_server = anyio.create_memory_object_stream[SessionMessage | Exception](0)
    to_server, from_client = anyio.create_memory_object_stream[SessionMessage](0)

    async def read(stream: object) -> asyncio.StreamReader:
        reader = asyncio.StreamReader()
        pipe, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), stream)
        pipes.append(pipe)
        return reader

    async def take_messages(stdout: asyncio.StreamReader) -> None:
        held = bytearray()  # the beginning of a line whose end has not come yet
        with contextlib.suppress(FloodError, anyio.BrokenResourceError, anyio.ClosedResourceError):
            async with to_client, _closing(allowance):  # tells the session that the server is gone
                while data := await stdout.read(_CHUNK_BYTES):
                    allowance.spend(len(data))
                    *lines, rest = data.split(b"\n")
                    for line in lines:
                        held += line
                        with contextlib.suppress(ValueError, RecursionError):
                            message = jsonrpc_message_adapter.validate_json(bytes(held), by_name=False)
                            await to_client.send(SessionMessage(message))
                        held.clear()
                    held += rest

    async def take_errors(stderr: asyncio.StreamReader) -> None:
        with contextlib.suppress(FloodError):
            while data := await stderr.read(_CHUNK_BYTES):
                allowance.error_tail = (allowance.error_tail + data)[-_TAIL_BYTES:]
                allowance.spend(len(data))
            return
        await to_client.aclose()

    async def give_messages(stdin: asyncio.WriteTransport) -> None:
        # Nothing waits here for a server that does not read: what one call writes is bounded by its action,
        # and a call that is not answered in time ends the session.
        async for item in from_client:
            stdin.write(item.message.model_dump_json(by_alias=True, exclude_unset=True).encode() + b"\n")

    try:
        stdin, _ = await loop.connect_write_pipe(asyncio.Protocol, process.stdin)
        pipes.append(stdin)
        stdout, stderr = await read(process.stdout), await read(process.stderr)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(take_messages, stdout)
            tasks.start_soon(take_errors, stderr)
            tasks.start_soon(give_messages, stdin)
            try:
                yield from_server, to_server
            finally:
                tasks.cancel_scope.cancel()
        stdin.close()
        until = loop.time() + GRACE_S
        while process.poll() is None and loop.time() < until:
            await asyncio.sleep(_POLL_S)
    finally:  # also when this task is cancelled, so nothing waits here but for a process that was just killed
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        for pipe in pipes:
            pipe.close()
        for stream in (to_client, from_server, to_server, from_client):
            stream.close()


@contextlib.asynccontextmanager
async def _closing(allowance: Allowance) -> AsyncIterator[None]:
    try:
        yield
    finally:
        allowance.closed = True


@asynccontextmanager
async def http_transport(
    url: str, *, headers: Mapping[str, str], timeout_s: float, allowance: Allowance
) -> AsyncIterator[object]:
    """Exchange messages with a server at a URL, over streamable HTTP."""
    async with (
        httpx2.AsyncClient(
            # Uncompressed, so that the bytes that are counted are those that will be held.
            headers={**headers, "Accept-Encoding": "identity"},
            timeout=httpx2.Timeout(timeout_s, read=None),  # a call has its deadline; an idle stream has none
            transport=_CountedTransport(allowance),
        ) as client,
        streamable_http_client(url, http_client=client, max_sse_event_size=None) as streams,
    ):
        yield streams


class _CountedTransport(httpx2.AsyncHTTPTransport):
    """HTTP whose answers are counted against an allowance, and never decompressed."""

    def __init__(self, allowance: Allowance) -> None:
        super().__init__()
        self._allowance = allowance

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response = await super().handle_async_request(request)
        response.headers.pop("content-encoding", None)
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        response.stream = _CountedStream(response.stream, self._allowance)
        return response


class _CountedStream(httpx2.AsyncByteStream):
    def __init__(self, stream: httpx2.AsyncByteStream, allowance: Allowance) -> None:
        self._stream, self._allowance = stream, allowance

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._stream:
            self._allowance.spend(len(part))
            yield part

    async def aclose(self) -> None:
        await self._stream.aclose()
