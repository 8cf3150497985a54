"""A retrieval server that the clients of Search-R1, SkyRL, T2PO and at2po understand.

`POST /retrieve` (see `wire`), `GET /health`, `GET /metrics`. Requests that arrive together are searched
together. A stop (SIGTERM, Ctrl-C) refuses new connections and answers what was taken.

This module does not know what it serves: any `Retriever` will do.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from at2po_env.errors import MissingExtraError, RetrievalError
from at2po_env.retrieval.base import Retriever
from at2po_env.retrieval.server_settings import ServerSettings
from at2po_env.retrieval.service import RefusedError, RetrievalService
from at2po_env.retrieval.wire import DIGEST_HEADER

try:
    import uvicorn
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import JSONResponse
    from starlette.routing import Route
    from starlette.types import Receive, Scope, Send
except ModuleNotFoundError as _error:
    raise MissingExtraError(f"{_error}. Fix: pip install 'at2po[serve]'") from _error

__all__ = ["ServerSettings", "create_app", "serve", "uvicorn_server"]


def create_app(retriever: Retriever, settings: ServerSettings | None = None) -> FastAPI:
    """Make the application; `settings.host` and `port` are left to whoever runs it."""
    service = RetrievalService(retriever, settings or ServerSettings())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:  # noqa: ARG001
        yield
        await service.batcher.close()

    async def health() -> dict[str, Any]:
        return {"status": "ok", "digest": retriever.digest, "waiting": service.batcher.waiting}

    async def metrics(request: Request) -> Response:
        try:
            service.authorize(request.headers.get("authorization"))
        except RefusedError as refused:
            return _refusal(refused)
        return Response(service.metrics.page(), media_type=service.metrics.content_type)

    app = FastAPI(title="at2po retrieval", lifespan=lifespan)
    app.router.routes.append(Route("/retrieve", _RetrieveEndpoint(service), methods=["POST"]))
    app.get("/health", response_model=None)(health)
    app.get("/metrics", response_model=None)(metrics)
    return app


class _RetrieveEndpoint:
    """The hot path as a bare ASGI application: FastAPI's handling of a request costs more than a search."""

    def __init__(self, service: RetrievalService) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = time.perf_counter()
        response = await _retrieve(self._service, Request(scope, receive))
        self._service.metrics.requests.labels(response.status_code).inc()
        self._service.metrics.seconds.observe(time.perf_counter() - start)
        await response(scope, receive, send)


async def _retrieve(service: RetrievalService, request: Request) -> Response:
    try:
        service.authorize(request.headers.get("authorization"))
        body = await service.retrieve(await _body(request, service.settings))
    except RefusedError as refused:
        return _refusal(refused)
    return Response(body, media_type="application/json", headers={DIGEST_HEADER: service.retriever.digest})


def _refusal(refused: RefusedError) -> Response:
    headers = {"Retry-After": "1"} if refused.status == 503 else {}
    return JSONResponse({"detail": refused.detail}, status_code=refused.status, headers=headers)


async def _body(request: Request, settings: ServerSettings) -> bytes:
    """Read a body of bounded size in bounded time."""
    too_large = RefusedError(413, f"the body is larger than {settings.max_body_bytes} bytes")
    declared = request.headers.get("content-length", "0")
    if not declared.isdigit() or int(declared) > settings.max_body_bytes:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(settings.timeout_s):
            async for part in request.stream():
                size += len(part)
                if size > settings.max_body_bytes:
                    raise too_large
                parts.append(part)
    except TimeoutError as error:
        raise RefusedError(408, f"the body did not arrive within {settings.timeout_s:g} s") from error
    return b"".join(parts)


def serve(retriever: Retriever, settings: ServerSettings | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C, then answer what was taken and return.

    Raises:
        ConfigError: listening beyond this machine without a token.
        RetrievalError: the address cannot be used.
    """
    settings = settings or ServerSettings()
    settings.check_address()
    try:
        uvicorn_server(retriever, settings).run()
    except SystemExit as error:  # uvicorn exits when it cannot bind
        where = f"{settings.host}:{settings.port}"
        fix = "give another --port, or stop what listens there"
        raise RetrievalError(f"cannot listen on {where}. Fix: {fix}.") from error


def uvicorn_server(retriever: Retriever, settings: ServerSettings) -> uvicorn.Server:
    """Return a server that is not running yet."""
    config = uvicorn.Config(
        create_app(retriever, settings),
        host=settings.host,
        port=settings.port,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=60,
        timeout_graceful_shutdown=int(max(settings.drain_s, 1)),
        backlog=2048,
    )
    return uvicorn.Server(config)
