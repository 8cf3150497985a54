"""Serves an application over HTTP within bounds: addresses, tokens, connections, late and large requests."""

import asyncio
import hmac
import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from at2po_env.errors import At2poError, ConfigError, MissingExtraError

try:
    import h11
    import uvicorn
    from starlette.applications import Starlette
    from starlette.datastructures import Headers
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.types import ASGIApp, Receive, Scope, Send
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ModuleNotFoundError as _error:
    raise MissingExtraError(f"{_error}. Fix: pip install 'at2po[serve]'") from _error

BACKLOG = 2048
START_S = 30.0
MAX_HEAD_BYTES = 16 * 2**10  # of a request's first line and headers


class ListenConfig(BaseModel):
    """Addresses and limits of a server; a request beyond a limit is refused with the limit in the message.

    Attributes:
        token_variable: Environment variable from which a command takes the token.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    token_variable: ClassVar[str]

    host: str = Field("127.0.0.1", description="address to listen on; others than loopback need a token")
    port: int = Field(8000, ge=0, le=65535, description="0 takes any free port")
    token: SecretStr | None = Field(None, description="bearer token that requests must carry")
    max_body_bytes: int = Field(4 * 2**20, ge=1, description="largest request body")
    max_connections: int = Field(
        900, ge=1, description="open connections of a process; more are answered 503"
    )
    receive_s: float = Field(20.0, gt=0, description="seconds within which a request must arrive whole")
    timeout_s: float = Field(60.0, gt=0, description="seconds from a request to its answer")
    drain_s: float = Field(30.0, gt=0, description="seconds that a stop waits for requests already taken")

    def check_address(self) -> None:
        """Refuse to listen beyond this machine without a token.

        Raises:
            ConfigError: the host is not loopback and there is no token.
        """
        try:
            loopback = ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            loopback = self.host == "localhost"
        if self.token is None and not loopback:
            raise ConfigError(
                f"host {self.host!r} can be reached from other machines, and there is no token. Fix: give "
                f"--token-file (or {self.token_variable}), or listen on 127.0.0.1."
            )
        if self.token is not None and not self.token.get_secret_value():
            raise ConfigError("the token is empty. Fix: give one of some length, or none.")


def listen(config: ListenConfig, error: type[At2poError]) -> socket.socket:
    """Listen on the address of `config`, of which another server cannot take a share.

    Raises:
        ConfigError: The address can be reached from outside, and there is no token.
        At2poError: It cannot be used; of the class `error`.
    """
    config.check_address()
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)
        family, _, _, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as refused:
        raise error(
            f"cannot listen on {config.host}:{config.port} ({refused.strerror}). Fix: give another --port, "
            "or stop what listens there."
        ) from refused


def make_server(app: Starlette, config: ListenConfig, *, websockets: bool = False) -> uvicorn.Server:
    """Make the server of an application.

    Args:
        app: The application.
        config: Its limits.
        websockets: Whether to take WebSocket connections, where a package for them is installed.
    """

    class Protocol(_ImpatientProtocol):
        receive_s = config.receive_s

    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=Protocol,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            limit_concurrency=config.max_connections,
            ws="auto" if websockets else "none",
            ws_max_size=config.max_body_bytes,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=60,
            timeout_graceful_shutdown=int(max(config.drain_s, 1)),
            backlog=BACKLOG,
        )
    )


@contextmanager
def running_in_thread(
    server: uvicorn.Server, listener: socket.socket, config: ListenConfig, error: type[At2poError]
) -> Iterator[str]:
    """Run a server in a thread of this process while the block runs; yields its URL.

    Raises:
        At2poError: It does not start; of the class `error`.
    """
    port = listener.getsockname()[1]
    thread = threading.Thread(target=server.run, args=([listener],), name="at2po-server", daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + START_S
        while not server.started:
            if not thread.is_alive() or time.monotonic() > deadline:
                raise error(f"the server did not start on {config.host}:{port}")
            time.sleep(0.005)
        yield f"http://{config.host}:{port}"
    finally:
        server.should_exit = True
        thread.join(config.drain_s + 5)


class _ImpatientProtocol(H11Protocol):
    """uvicorn's HTTP, with a limit on the time in which a request must arrive, and quiet about broken bodies.

    uvicorn bounds the size of a request's head, but waits for the rest of an incomplete request for ever: so
    many half-open connections as a process may have files would shut everyone else out.
    """

    receive_s: float
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._timer = self.loop.call_later(self.receive_s, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):  # the request has arrived whole
            self._stop_timer()
        elif self._timer is None:  # its first bytes came on a connection that was kept open
            self._timer = self.loop.call_later(self.receive_s, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP; where it is the body of a request under way, close the connection.

        uvicorn would send this refusal and the request's answer, and both fail with a traceback in the log.
        """
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            super().send_400_response(msg)
            return
        cycle.disconnected = True
        cycle.message_event.set()
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class NeedsToken:
    """Refuses every request without the token, whatever its path, before any of its body is read."""

    def __init__(self, app: ASGIApp, token: str, answered: Callable[[int, float], object]) -> None:
        self._app, self._token, self._answered = app, token.encode(), answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request with the token on, and refuse any other."""
        if scope["type"] in ("http", "websocket"):
            scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
            # Compared in a time that does not depend on where the two differ.
            right = hmac.compare_digest(given.strip().encode(), self._token)
            if scheme.lower() != "bearer" or not right:
                self._answered(401, 0.0)
                if scope["type"] == "websocket":
                    await send({"type": "websocket.close", "code": 1008})
                    return
                said = {"detail": "this server needs its token: Authorization: Bearer TOKEN"}
                await JSONResponse(said, 401)(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def read_body(request: Request, config: ListenConfig) -> bytes:
    """Read the body of a request; the caller sets the deadline.

    Raises:
        HTTPException: It is too large, or the client went away.
    """
    body = bytearray()
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > config.max_body_bytes:
                raise HTTPException(413, f"the body is larger than {config.max_body_bytes} bytes")
    except ClientDisconnect as error:
        raise HTTPException(400, "the client went away") from error
    return bytes(body)


def malformed(error: ValidationError) -> HTTPException:
    """Return the refusal of a body that has not the expected form: 422, and the first thing that is wrong."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(map(str, first["loc"]))
    return HTTPException(422, f"{where + ': ' if where else ''}{first['msg']}")


async def refusal(request: Request, refused: Exception) -> Response:  # noqa: ARG001
    """Answer an `HTTPException` as JSON: `{"detail": ...}`."""
    assert isinstance(refused, HTTPException)
    return JSONResponse({"detail": refused.detail}, refused.status_code, refused.headers)
