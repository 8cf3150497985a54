"""A retrieval server that the clients of Search-R1, SkyRL, T2PO and at2po understand.

`POST /retrieve` (see `messages`), `GET /health`, `GET /metrics`. Requests that arrive together are searched
together. The application does not know what it serves: any `Retriever` will do.
"""

import asyncio
import hmac
import ipaddress
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from at2po_env.errors import ConfigError, MissingExtraError, RetrievalError
from at2po_env.retrieval.base import Retriever
from at2po_env.retrieval.counters import counted
from at2po_env.retrieval.messages import DEFAULT_TOPK, DIGEST_HEADER, RetrieveRequest, response_body
from at2po_env.retrieval.server.batching import DynamicBatcher, OverloadedError

try:
    import prometheus_client as prometheus
    from prometheus_client.multiprocess import MultiProcessCollector
    from starlette.applications import Starlette
    from starlette.datastructures import Headers
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
    from starlette.types import ASGIApp, Receive, Scope, Send
except ModuleNotFoundError as _error:
    raise MissingExtraError(f"{_error}. Fix: pip install 'at2po[serve]'") from _error


SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # read by prometheus_client when it is imported
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class ServerConfig(BaseModel):
    """Limits and addresses; every request beyond a limit is refused with the limit in the message."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", description="address to listen on; others than loopback need a token")
    port: int = Field(8000, ge=0, le=65535, description="0 takes any free port")
    token: SecretStr | None = Field(None, description="bearer token that requests must carry")
    max_body_bytes: int = Field(4 * 2**20, ge=1, description="largest request body")
    max_queries: int = Field(512, ge=1, description="queries of one request")
    max_query_chars: int = Field(8192, ge=1, description="characters of one query")
    max_topk: int = Field(100, ge=1, description="passages of one query")
    max_batch: int = Field(256, ge=1, description="queries searched together")
    max_wait_ms: float = Field(0.0, ge=0, description="how long an idle server waits for company")
    max_waiting: int = Field(8192, ge=1, description="queries that may wait before new ones are refused")
    workers: int = Field(1, ge=1, description="searches at the same time, in each process")
    processes: int = Field(1, ge=1, description="processes that answer; `serve_processes` starts them")
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
                "--token-file (or AT2PO_RETRIEVER_TOKEN), or listen on 127.0.0.1."
            )
        if self.token is not None and not self.token.get_secret_value():
            raise ConfigError("the token is empty. Fix: give one of some length, or none.")


class ServerMetrics:
    """One server's metrics for Prometheus, in a registry of their own: several servers may live in a process.

    Where several processes serve one address, `SHARED_FOLDER` names a folder in which each keeps its numbers
    (prometheus_client's multiprocess mode), and any of them shows the sum of all.
    """

    def __init__(self) -> None:
        own = self._registry = prometheus.CollectorRegistry()
        self._requests = prometheus.Counter("at2po_retrieve_requests", "Answers.", ["status"], registry=own)
        self._queries = prometheus.Counter("at2po_retrieve_queries", "Searched queries.", registry=own)
        self._seconds = prometheus.Histogram(
            "at2po_retrieve_seconds", "From request to answer.", buckets=_SECONDS, registry=own
        )
        self._batch = prometheus.Histogram(
            "at2po_search_batch_queries", "Queries per search.", buckets=_SIZES, registry=own
        )
        self._search = prometheus.Histogram(
            "at2po_search_seconds", "One search.", buckets=_SECONDS, registry=own
        )
        self.waiting = prometheus.Gauge(
            "at2po_waiting_queries", "Waiting queries.", registry=own, multiprocess_mode="livesum"
        )
        self._totals: dict[str, prometheus.Counter] = {}  # of `counters.counted`
        self._seen: dict[str, int] = {}

    def answered(self, status: int, seconds: float) -> None:
        """Record one answer."""
        self._requests.labels(status).inc()
        self._seconds.observe(seconds)

    def on_batch(self, queries: int, seconds: float) -> None:
        """Record one search."""
        self._queries.inc(queries)
        self._batch.observe(queries)
        self._search.observe(seconds)
        self._take_totals()

    def page(self) -> bytes:
        """Return the page in Prometheus' text form."""
        self._take_totals()
        registry = self._registry
        if SHARED_FOLDER in os.environ:
            registry = prometheus.CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return prometheus.generate_latest(registry)

    def _take_totals(self) -> None:
        """Bring what retrieval has counted in this process (hits of a cache, retries, ...) up to date."""
        for name, value in counted().items():
            if name not in self._totals:
                text = f"Total of {name} in this process."
                self._totals[name] = prometheus.Counter(
                    f"at2po_retrieval_{name}", text, registry=self._registry
                )
            self._totals[name].inc(value - self._seen.get(name, 0))
            self._seen[name] = value


def create_app(retriever: Retriever, config: ServerConfig | None = None) -> Starlette:
    """Make the application that answers for `retriever` within the limits of `config`.

    `config.host`, `port` and `processes` are for the functions of `running`.
    """
    config = config or ServerConfig()
    metrics = ServerMetrics()
    batcher = DynamicBatcher(
        retriever,
        max_batch=config.max_batch,
        max_wait_s=config.max_wait_ms / 1000,
        max_waiting=config.max_waiting,
        workers=config.workers,
        on_batch=metrics.on_batch,
    )

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:  # noqa: ARG001
        yield
        await batcher.close()

    async def retrieve(request: Request) -> Response:
        start, response = time.perf_counter(), None
        try:
            response = await _retrieve(request, config, batcher)
            response.headers[DIGEST_HEADER] = retriever.digest
        except HTTPException as refused:
            response = await _refusal(request, refused)
        finally:
            status = response.status_code if response else 500
            metrics.answered(status, time.perf_counter() - start)
            metrics.waiting.set(batcher.waiting)
        return response

    async def health(request: Request) -> Response:  # noqa: ARG001
        return JSONResponse({"status": "ok", "digest": retriever.digest, "waiting": batcher.waiting})

    async def show_metrics(request: Request) -> Response:  # noqa: ARG001
        metrics.waiting.set(batcher.waiting)
        return Response(metrics.page(), media_type=prometheus.CONTENT_TYPE_LATEST)

    routes = [
        Route("/retrieve", retrieve, methods=["POST"]),
        Route("/health", health),
        Route("/metrics", show_metrics),
    ]
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _refusal})
    if config.token:
        app.add_middleware(_NeedsToken, token=config.token.get_secret_value(), metrics=metrics)
    return app


class _NeedsToken:
    """Refuses every request without the token, whatever its path, before any of its body is read."""

    def __init__(self, app: ASGIApp, token: str, metrics: ServerMetrics) -> None:
        self._app, self._token, self._metrics = app, token.encode(), metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
            # Compared in a time that does not depend on where the two differ.
            right = hmac.compare_digest(given.strip().encode(), self._token)
            if scheme.lower() != "bearer" or not right:
                self._metrics.answered(401, 0.0)
                said = {"detail": "this server needs its token: Authorization: Bearer TOKEN"}
                await JSONResponse(said, 401)(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def _refusal(request: Request, refused: Exception) -> Response:  # noqa: ARG001
    assert isinstance(refused, HTTPException)
    return JSONResponse({"detail": refused.detail}, refused.status_code, refused.headers)


async def _retrieve(request: Request, config: ServerConfig, batcher: DynamicBatcher) -> Response:
    """Answer `POST /retrieve` in bounded time.

    Raises:
        HTTPException: the request is malformed or beyond a limit, or the server cannot answer it.
    """
    body, whole = bytearray(), False
    try:
        async with asyncio.timeout(config.timeout_s):
            async for piece in request.stream():
                body += piece
                if len(body) > config.max_body_bytes:
                    raise HTTPException(413, f"the body is larger than {config.max_body_bytes} bytes")
            whole = True
            asked = _parse(bytes(body), config)
            found = await batcher.search(asked.texts, asked.topk or DEFAULT_TOPK)
    except TimeoutError as error:
        if not whole:
            raise HTTPException(408, f"the body did not arrive within {config.timeout_s:g} s") from error
        raise HTTPException(504, f"no result within {config.timeout_s:g} s") from error
    except ClientDisconnect as error:
        raise HTTPException(400, "the client went away") from error
    except OverloadedError as error:
        raise HTTPException(503, f"overloaded: {error}", {"Retry-After": "1"}) from error
    except RetrievalError as error:
        raise HTTPException(500, str(error)) from error
    content = response_body(found, return_scores=asked.return_scores)
    return Response(content, media_type="application/json")


def _parse(body: bytes, config: ServerConfig) -> RetrieveRequest:
    try:
        request = RetrieveRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise HTTPException(422, f"{where + ': ' if where else ''}{first['msg']}") from error
    texts, topk = request.texts, request.topk or 0
    if len(texts) > config.max_queries:
        raise HTTPException(422, f"{len(texts)} queries, at most {config.max_queries} are taken at once")
    longest = max(map(len, texts), default=0)
    if longest > config.max_query_chars:
        raise HTTPException(
            422, f"a query of {longest} characters, at most {config.max_query_chars} are taken"
        )
    if topk > config.max_topk:
        raise HTTPException(422, f"topk {topk}, at most {config.max_topk} are given")
    return request
