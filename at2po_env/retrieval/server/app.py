"""A retrieval server that the clients of Search-R1, SkyRL, T2PO and at2po understand.

`POST /retrieve` (see `wire`), `GET /health`, `GET /metrics`. Requests that arrive together are searched
together. A stop (SIGTERM, Ctrl-C) refuses new connections and answers what was taken.

This module does not know what it serves: any `Retriever` will do.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from at2po_env.errors import MissingExtraError, RetrievalError
from at2po_env.retrieval.base import Retriever
from at2po_env.retrieval.server.config import ServerConfig
from at2po_env.retrieval.server.endpoint import RetrieveEndpoint
from at2po_env.retrieval.server.processes import SharedPages
from at2po_env.retrieval.server.service import RefusedError, RetrievalService

try:
    import uvicorn
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import JSONResponse
    from starlette.routing import Route
    from starlette.types import Receive, Scope, Send
except ModuleNotFoundError as _error:
    raise MissingExtraError(f"{_error}. Fix: pip install 'at2po[serve]'") from _error

__all__ = ["ServerConfig", "create_app", "serve", "uvicorn_server"]


def create_app(
    retriever: Retriever, settings: ServerConfig | None = None, *, pages: SharedPages | None = None
) -> FastAPI:
    """Make the application; `settings.host` and `port` are left to whoever runs it.

    Args:
        retriever: What to serve.
        settings: Limits.
        pages: Where the metrics of the processes meet, when this is one of several.
    """
    service = RetrievalService(retriever, settings or ServerConfig())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:  # noqa: ARG001
        writing = pages and asyncio.create_task(pages.keep_writing(service.metrics.page))
        yield
        await service.batcher.close()
        if writing:
            writing.cancel()

    async def health() -> dict[str, Any]:
        return {"status": "ok", "digest": retriever.digest, "waiting": service.batcher.waiting}

    async def metrics(request: Request) -> Response:
        try:
            service.authorize(request.headers.get("authorization"))
        except RefusedError as refused:
            return JSONResponse({"detail": refused.detail}, status_code=refused.status)
        page = service.metrics.page()
        return Response(pages.merged(page) if pages else page, media_type=service.metrics.content_type)

    app = _App(title="at2po retrieval", lifespan=lifespan)
    app.endpoint = RetrieveEndpoint(service)
    app.router.routes.append(Route("/retrieve", app.endpoint, methods=["POST"]))
    app.get("/health", response_model=None)(health)
    app.get("/metrics", response_model=None)(metrics)
    return app


class _App(FastAPI):
    """FastAPI for everything but the hot path, which goes around its middleware and routing."""

    endpoint: RetrieveEndpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == "/retrieve" and scope["method"] == "POST":
            await self.endpoint(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def serve(retriever: Retriever, settings: ServerConfig | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C, then answer what was taken and return.

    Raises:
        ConfigError: listening beyond this machine without a token.
        RetrievalError: the address cannot be used.
    """
    settings = settings or ServerConfig()
    settings.check_address()
    try:
        uvicorn_server(create_app(retriever, settings), settings).run()
    except SystemExit as error:  # uvicorn exits when it cannot bind
        where = f"{settings.host}:{settings.port}"
        fix = "give another --port, or stop what listens there"
        raise RetrievalError(f"cannot listen on {where}. Fix: {fix}.") from error


def uvicorn_server(app: FastAPI, settings: ServerConfig) -> uvicorn.Server:
    """Return a server that is not running yet."""
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=60,
        timeout_graceful_shutdown=int(max(settings.drain_s, 1)),
        backlog=2048,
    )
    return uvicorn.Server(config)
