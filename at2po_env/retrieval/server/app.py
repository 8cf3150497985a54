"""A retrieval server that the clients of Search-R1, SkyRL, T2PO and at2po understand.

`POST /retrieve` (see `messages`), `GET /health`, `GET /metrics`. Requests that arrive together are searched
together. The application does not know what it serves: any `Retriever` will do.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pydantic import Field, ValidationError

from at2po_env.errors import MissingExtraError, RetrievalError
from at2po_env.http.server import ListenConfig, NeedsToken, malformed, read_body, refusal
from at2po_env.retrieval.base import Retriever
from at2po_env.retrieval.client import TOKEN_VARIABLE
from at2po_env.retrieval.counters import counted
from at2po_env.retrieval.messages import DEFAULT_TOPK, DIGEST_HEADER, RetrieveRequest, response_body
from at2po_env.retrieval.server.batching import DynamicBatcher, OverloadedError

try:
    import prometheus_client as prometheus
    from prometheus_client.multiprocess import MultiProcessCollector
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
except ModuleNotFoundError as _error:
    raise MissingExtraError(f"{_error}. Fix: pip install 'at2po[serve]'") from _error


SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # read by prometheus_client when it is imported
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class ServerConfig(ListenConfig):
    """Limits and addresses; every request beyond a limit is refused with the limit in the message."""

    token_variable = TOKEN_VARIABLE

    max_queries: int = Field(512, ge=1, description="queries of one request")
    max_query_chars: int = Field(8192, ge=1, description="characters of one query")
    max_topk: int = Field(100, ge=1, description="passages of one query")
    max_batch: int = Field(256, ge=1, description="queries searched together")
    max_wait_ms: float = Field(0.0, ge=0, description="how long an idle server waits for company")
    max_waiting: int = Field(8192, ge=1, description="queries that may wait before new ones are refused")
    workers: int = Field(1, ge=1, description="searches at the same time, in each process")
    processes: int = Field(1, ge=1, description="processes that answer; `serve_processes` starts them")


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
            response = await refusal(request, refused)
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
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: refusal})
    if config.token:
        app.add_middleware(NeedsToken, token=config.token.get_secret_value(), answered=metrics.answered)
    return app


async def _retrieve(request: Request, config: ServerConfig, batcher: DynamicBatcher) -> Response:
    """Answer `POST /retrieve` in bounded time.

    Raises:
        HTTPException: the request is malformed or beyond a limit, or the server cannot answer it.
    """
    whole = False
    try:
        async with asyncio.timeout(config.timeout_s):
            body = await read_body(request, config)
            whole = True
            asked = _parse(body, config)
            found = await batcher.search(asked.texts, asked.topk or DEFAULT_TOPK)
    except TimeoutError as error:
        if not whole:
            raise HTTPException(408, f"the body did not arrive within {config.timeout_s:g} s") from error
        raise HTTPException(504, f"no result within {config.timeout_s:g} s") from error
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
        raise malformed(error) from error
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
