"""The server of environments: `messages` over HTTP, OpenEnv's protocol over a WebSocket, metrics."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any

import gymnasium
from pydantic import BaseModel, Field, ValidationError

from at2po_env.errors import EnvError, MissingExtraError
from at2po_env.forking.base import ForkableEnv, env_id
from at2po_env.http.server import (
    ListenConfig,
    NeedsToken,
    listen,
    make_server,
    malformed,
    read_body,
    refusal,
    running_in_thread,
)
from at2po_env.serving.messages import (
    TOKEN_VARIABLE,
    CloseRequest,
    ResetRequest,
    RestoreRequest,
    SessionRequest,
    StepRequest,
)
from at2po_env.serving.openenv import play_openenv
from at2po_env.serving.sessions import Env, SessionError, Sessions, plain

try:
    import prometheus_client as prometheus
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route, WebSocketRoute
    from starlette.websockets import WebSocket
except ModuleNotFoundError as _error:
    raise MissingExtraError(f"{_error}. Fix: pip install 'at2po[serve]'") from _error

Answers = dict[str, tuple[type[BaseModel], Callable[[Any], dict[str, Any]]]]


class EnvServerConfig(ListenConfig):
    """Limits and addresses of a server of environments."""

    token_variable = TOKEN_VARIABLE

    max_body_bytes: int = Field(16 * 2**20, ge=1, description="largest request body; bounds snapshots")
    max_sessions: int = Field(1024, ge=1, description="sessions at the same time")
    opens_per_s: float = Field(200.0, gt=0, description="sessions opened per second")
    idle_s: float = Field(1800.0, gt=0, description="seconds after which an unused session is closed")
    workers: int = Field(64, ge=1, description="calls of environments at the same time")


class _Metrics:
    """One server's metrics for Prometheus, in a registry of their own."""

    def __init__(self, sessions: Sessions) -> None:
        self._registry = prometheus.CollectorRegistry()
        self._requests = prometheus.Counter(
            "at2po_env_requests", "Answers.", ["path", "status"], registry=self._registry
        )
        self._seconds = prometheus.Histogram(
            "at2po_env_seconds", "From request to answer.", ["path"], registry=self._registry
        )
        open_now = prometheus.Gauge("at2po_env_sessions", "Open sessions.", registry=self._registry)
        open_now.set_function(lambda: len(sessions))

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Record one answer."""
        self._requests.labels(path, status).inc()
        self._seconds.labels(path).observe(seconds)

    def page(self) -> bytes:
        """Return the page in Prometheus' text form."""
        return prometheus.generate_latest(self._registry)


def create_env_app(env: Env, config: EnvServerConfig | None = None) -> Starlette:
    """Make the application that plays episodes of `env` for clients; it closes `env` when it ends.

    Raises:
        SnapshotError: The environment cannot be forked.
    """
    config = config or EnvServerConfig()
    served = _Served(env, config)
    routes = [
        *[Route(path, served.answer, methods=["POST"]) for path in served.answers],
        Route("/", served.describe, methods=["GET", "POST"]),
        Route("/health", served.health),
        Route("/metrics", served.show_metrics),
        WebSocketRoute("/ws", served.openenv),
    ]
    app = Starlette(routes=routes, lifespan=served.lifespan, exception_handlers={HTTPException: refusal})
    if config.token:
        answered = partial(served.metrics.answered, "any")
        app.add_middleware(NeedsToken, token=config.token.get_secret_value(), answered=answered)
    return app


class _Served:
    """The endpoints; every call of an environment runs in a pool of threads."""

    def __init__(self, env: Env, config: EnvServerConfig) -> None:
        self._env, self._config = env, config
        sessions = self._sessions = Sessions(
            env,
            max_sessions=config.max_sessions,
            opens_per_s=config.opens_per_s,
            idle_s=config.idle_s,
            timeout_s=config.timeout_s,
        )
        self.metrics = _Metrics(sessions)
        self._pool = ThreadPoolExecutor(config.workers, "at2po-env")
        self.answers: Answers = {
            "/reset": (ResetRequest, lambda asked: sessions.reset(asked.session, asked.seed, asked.options)),
            "/step": (StepRequest, lambda asked: sessions.step(asked.session, asked.action)),
            "/snapshot": (SessionRequest, lambda asked: sessions.snapshot(asked.session)),
            "/restore": (RestoreRequest, lambda asked: sessions.restore(asked.session, asked.snapshot)),
            "/fork": (SessionRequest, lambda asked: sessions.fork(asked.session)),
            "/close": (CloseRequest, lambda asked: sessions.close(asked.sessions)),
        }

    async def _in_pool(self, call: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:  # noqa: ARG002
        """Close idle sessions while the application runs, and all of them at its end."""

        async def expire() -> None:
            while True:
                await asyncio.sleep(min(self._config.idle_s / 4, 30.0))
                await self._in_pool(self._sessions.close_idle)

        cleaner = asyncio.create_task(expire())
        yield
        cleaner.cancel()
        await self._in_pool(self._sessions.close_all)
        self._pool.shutdown(wait=False)

    async def answer(self, request: Request) -> Response:
        """Answer one of `messages`."""
        start, path = time.perf_counter(), request.url.path
        kind, call = self.answers[path]
        try:
            body = await _body_in_time(request, self._config)
            content = await self._in_pool(lambda: call(_parsed(kind, body)))
            response = _json(content)
        except SessionError as error:
            response = JSONResponse({"detail": str(error)}, error.status)
        except HTTPException as refused:
            response = await refusal(request, refused)
        except Exception:
            self.metrics.answered(path, 500, time.perf_counter() - start)
            raise
        self.metrics.answered(path, response.status_code, time.perf_counter() - start)
        return response

    async def describe(self, request: Request) -> Response:  # noqa: ARG002
        """Say what is served, with actions to try it."""
        spec, base = self._env.spec, self._env.unwrapped
        tasks = getattr(base, "tasks", None)
        return _json(
            {
                "env_id": env_id(base),
                "tasks": len(tasks) if isinstance(tasks, Sized) else None,
                "max_episode_steps": spec.max_episode_steps if spec is not None else None,
                "example_actions": plain(base.example_actions() if isinstance(base, ForkableEnv) else []),
            }
        )

    async def health(self, request: Request) -> Response:  # noqa: ARG002
        """Say that the server lives."""
        return JSONResponse({"status": "ok", "sessions": len(self._sessions)})

    async def show_metrics(self, request: Request) -> Response:  # noqa: ARG002
        """Show the metrics to Prometheus."""
        return Response(self.metrics.page(), media_type=prometheus.CONTENT_TYPE_LATEST)

    async def openenv(self, socket: WebSocket) -> None:
        """Play with a client of OpenEnv."""
        config = self._config
        await play_openenv(
            socket,
            self._sessions,
            self._in_pool,
            first_s=config.receive_s,
            idle_s=config.idle_s,
            max_bytes=config.max_body_bytes,
        )


async def _body_in_time(request: Request, config: EnvServerConfig) -> bytes:
    try:
        async with asyncio.timeout(config.timeout_s):
            return await read_body(request, config)
    except TimeoutError as error:
        raise HTTPException(408, f"the body did not arrive within {config.timeout_s:g} s") from error


def _parsed(kind: type[BaseModel], body: bytes) -> BaseModel:
    """Read a body; Python's own reader takes lone surrogates, which an action may hold."""
    try:
        return kind.model_validate(json.loads(body))
    except ValidationError as error:
        raise malformed(error) from error
    except (ValueError, RecursionError) as error:
        raise HTTPException(422, f"the body is no JSON: {type(error).__name__}: {error}") from error


def _json(content: dict[str, Any]) -> Response:
    """Write an answer as ASCII, so that lone surrogates survive."""
    try:
        text = json.dumps(content, allow_nan=False)
    except ValueError as error:
        raise HTTPException(500, f"the environment's answer is not JSON: {error}") from error
    return Response(text, media_type="application/json")


def make_served_env(id: str, **options: Any) -> Env:
    """Make the environment to serve.

    Raises:
        EnvError: There is no such id, or it does not take these arguments.
    """
    try:
        env: Env = gymnasium.make(id, **options)
    except (gymnasium.error.Error, TypeError) as error:
        raise EnvError(f"{id!r} cannot be made with {options}: {error}") from error
    return env


def serve_env(env: Env, config: EnvServerConfig | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C, then answer what was taken and return.

    Raises:
        ConfigError: Listening beyond this machine without a token.
        EnvError: The address cannot be used, or the environment cannot be forked.
    """
    config = config or EnvServerConfig()
    with listen(config, EnvError) as listener:
        make_server(create_env_app(env, config), config, websockets=True).run([listener])


@contextmanager
def serving_env(env: Env, config: EnvServerConfig | None = None) -> Iterator[str]:
    """Serve from a thread of this process while the block runs; yields the server's URL.

    Args:
        env: The environment.
        config: Default: loopback, any free port.

    Raises:
        ConfigError, EnvError: As `serve_env`, or the server does not start.
    """
    config = config or EnvServerConfig(port=0)
    with (
        listen(config, EnvError) as listener,
        running_in_thread(
            make_server(create_env_app(env, config), config, websockets=True), listener, config, EnvError
        ) as url,
    ):
        yield url
