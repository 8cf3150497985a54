"""A policy that is served elsewhere: by vLLM, by a hosted API, by anything that speaks OpenAI's protocol.

Its ids are bytes and marks (`openai.tokens`), so that rollouts, evaluations, trees and pages work unchanged.
For evaluation, not for training: the bytes are not what the model sampled, and the log-probs stand where
`openai.generation` says.

The error model: a request that fails after its tries is data, an aborted generation whose reason is counted
in `stats`. What every request would meet (the key, the model's name), and too many failures in a row where
`max_failures` bounds them, are a `PolicyError` of the next `poll`.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Coroutine, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from at2po_agent.policies.base import Request, SteppingPolicy
from at2po_agent.policies.openai.client import Client, Server
from at2po_agent.policies.openai.errors import RequestFailedError
from at2po_agent.policies.openai.generation import make_generation
from at2po_agent.policies.openai.messages import ENDPOINTS, Dialect, request_body
from at2po_agent.policies.openai.stats import Prices, ServedStats
from at2po_agent.policies.openai.tokens import ByteTokenizer, RoleTranscript
from at2po_agent.transcripts.inline import InlineTranscript, Transcript
from at2po_agent.types import Generation
from at2po_env.errors import ConfigError, PolicyError

POLL_S = 0.02
"""Seconds that `poll` waits for something to finish."""
_CLOSE_S = 10.0
_Result = TypeVar("_Result")


class OpenAIPolicy(SteppingPolicy):
    """A `StreamingPolicy` over a chat or completion endpoint; close it, or use it in a `with` block.

    Args:
        server: Address, key's variable and patience; a text is an address.
        model: The model's name; None takes the only one that the server lists.
        dialect: Endpoint, tools, and what requests hold beside the usual.
        concurrency: Requests under way at the same time; others wait in the order they came.
        max_failures: Aborted generations in a row that are a `PolicyError`; None where somebody else watches
            the share of aborted ones (`health`).
        prices: Of a million tokens.
        system: System message of the transcript of chats.

    Attributes:
        tokenizer: Bytes and marks.
        transcript: Makes the ids of what the environment shows.
        stats: Counters.

    Raises:
        ConfigError: An argument makes no sense, or the variable holds no key.
    """

    def __init__(
        self,
        server: Server | str,
        model: str | None = None,
        *,
        dialect: Dialect | None = None,
        concurrency: int = 16,
        max_failures: int | None = 20,
        prices: Prices | None = None,
        system: str | None = None,
    ) -> None:
        super().__init__()
        self.server = Server(server) if isinstance(server, str) else server
        self.dialect = dialect or Dialect()
        if min(concurrency, 1 if max_failures is None else max_failures, self.dialect.bytes_per_token) < 1:
            raise ConfigError("concurrency, max_failures and bytes_per_token must be at least 1")
        if self.dialect.endpoint not in ENDPOINTS:
            raise ConfigError(f"endpoint: got {self.dialect.endpoint!r}, expected {' or '.join(ENDPOINTS)}")
        self.tokenizer = ByteTokenizer()
        chat = self.dialect.endpoint == "chat"
        self.transcript: Transcript = (
            RoleTranscript(system=system) if chat else InlineTranscript(self.tokenizer)
        )
        self.stats = ServedStats(prices or Prices())
        self._model, self._concurrency, self._max_failures = model, concurrency, max_failures
        self._open: set[int] = set()  # tickets that neither `_finished` nor an error has answered
        self._done: queue.SimpleQueue[tuple[int, Generation | BaseException]] = queue.SimpleQueue()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._in_a_row = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._client: Client | None = None
        self._slots = asyncio.Semaphore(concurrency)
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def model(self) -> str:
        """The model's name, asked of the server where none was given.

        Raises:
            PolicyError: The server cannot be reached, or lists another number of models than one.
        """
        if self._model is None:
            client = self._start()
            models = self._run(client.models())
            if len(models) != 1:
                listed = f"it lists {', '.join(models[:20])}" if models else "it lists none, or is not there"
                raise PolicyError(f"{self.server.url}: which model? {listed}. Fix: name it")
            (self._model,) = models
        return self._model

    @property
    def under_way(self) -> int:
        """Tasks that are asking or waiting for their turn."""
        return len(self._tasks)

    def _check(self, request: Request) -> None:
        if request.intervention is not None:
            raise PolicyError(
                "a served model does not show its sampling token by token, but rollout.expansion, "
                "rollout.thinking or rollout.resampling needs it. Fix: turn these off"
            )

    def _begin(self, ticket: int, request: Request) -> None:
        client, body = self._start(), request_body(request, self.model, self.dialect)
        loop = self._loop
        assert loop is not None
        self._open.add(ticket)
        self.stats.requests += 1

        def begin() -> None:
            task = loop.create_task(self._serve(ticket, client, body, request.stop))
            self._tasks[ticket] = task
            task.add_done_callback(lambda _: self._tasks.pop(ticket, None))

        loop.call_soon_threadsafe(begin)

    def _advance(self) -> None:
        """Take in what has finished; wait a moment for the first.

        Raises:
            PolicyError: No request can succeed, or too many failed in a row.
        """
        wait = bool(self._open)
        with contextlib.suppress(queue.Empty):
            while True:
                ticket, result = self._done.get(wait, POLL_S)
                wait = False
                if ticket not in self._open:
                    continue  # cancelled meanwhile
                self._open.remove(ticket)
                if isinstance(result, BaseException):
                    raise result
                self._finished[ticket] = result

    def cancel(self, ticket: int) -> None:
        """Forget a request, finished or not; its connection is closed."""
        self._finished.pop(ticket, None)
        if ticket not in self._open or self._loop is None:
            return
        self._open.remove(ticket)

        def stop() -> None:
            if ticket in self._tasks:
                self.stats.unanswered += 1
                self._tasks[ticket].cancel()

        self._loop.call_soon_threadsafe(stop)

    def close(self) -> None:
        """Cancel what is under way, close all connections, end the thread. May be called twice."""
        self._closed = True
        self._open.clear()
        self._finished.clear()
        if self._loop is None or self._thread is None or not self._thread.is_alive():
            return
        self._run(self._shut_down())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE_S)
        self._loop.close()

    # --- in the thread of the event loop ------------------------------------------------------------------

    async def _serve(self, ticket: int, client: Client, body: dict[str, Any], stops: Sequence[str]) -> None:
        result: Generation | BaseException
        try:
            async with self._slots:
                result = make_generation(await client.ask(body), stops)
            if result.stop_reason == "abort":
                self.stats.count_failure("content filter", "the server ended the answer")
            self._in_a_row = 0
        except RequestFailedError as error:
            result = self._failed(error)
        except Exception as error:  # noqa: BLE001  whatever it is, `poll` raises it where somebody listens
            result = error
        self._done.put((ticket, result))

    def _failed(self, error: RequestFailedError) -> Generation | PolicyError:
        """An aborted generation, or the end of all of them. A full context is no fault of the server."""
        self.stats.count_failure(error.kind, str(error))
        if error.kind not in ("context", "content filter"):
            self._in_a_row += 1
        if self._max_failures is None or self._in_a_row < self._max_failures:
            return Generation((), np.zeros(0, dtype=np.float32), "abort")
        reasons = ", ".join(f"{kind} {count}" for kind, count in self.stats.reasons.most_common())
        return PolicyError(
            f"{self.server.url}: {self._in_a_row} requests in a row failed, the last one with: {error} "
            f"(all failures: {reasons})"
        )

    async def _shut_down(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._client is not None:
            await self._client.close()

    # --- in the caller's thread ---------------------------------------------------------------------------

    def _start(self) -> Client:
        if self._closed:
            raise PolicyError("the policy is closed")
        if self._client is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="at2po-served", daemon=True)
            self._thread.start()
            self._client = Client(
                self.server, self.dialect.endpoint, self.stats, connections=self._concurrency
            )
        return self._client

    def _run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
