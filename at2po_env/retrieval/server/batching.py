"""Searches concurrent requests together: those that arrive while a search runs go into the next one."""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, cast

from at2po_env.data.corpus import Passage
from at2po_env.retrieval.base import Retriever

Found = list[list[Passage]]


class OverloadedError(Exception):
    """More queries are waiting than the server is willing to hold."""


class _Job(NamedTuple):
    queries: list[str]
    topk: int
    answer: "asyncio.Future[Found]"


class DynamicBatcher:
    """Searches the queries of concurrent callers in common batches; lives in one event loop.

    Requests with different `topk` never share a batch, so that a caller's result does not depend on who
    else is there. When a batch fails, its requests are searched one by one, so that only the one that made
    it fail fails.

    Args:
        retriever: Where to search; called in a thread.
        max_batch: Queries in one search; a single request with more is searched alone.
        max_wait_s: How long an idle searcher waits for company after the first request. 0: not at all,
            batches then form by themselves while a search is running.
        max_waiting: Queries that may wait; more are refused with `OverloadedError`.
        workers: Searches at the same time.
        on_batch: Called with the number of queries and the seconds of each search.
    """

    def __init__(
        self,
        retriever: Retriever,
        *,
        max_batch: int = 256,
        max_wait_s: float = 0.0,
        max_waiting: int = 8192,
        workers: int = 1,
        on_batch: Callable[[int, float], object] = lambda queries, seconds: None,  # noqa: ARG005
    ) -> None:
        self._retriever = retriever
        self._max_batch, self._max_wait_s = max_batch, max_wait_s
        self._max_waiting, self._workers = max_waiting, workers
        self._on_batch = on_batch
        self._jobs: deque[_Job] = deque()
        self.waiting = 0  # queries that no search has taken yet
        self._running: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="at2po-search")

    async def search(self, queries: list[str], topk: int) -> Found:
        """Search `queries` together with those of other callers.

        Raises:
            OverloadedError: too many queries are waiting.
            RetrievalError: the retriever cannot answer.
        """
        if self.waiting and self.waiting + len(queries) > self._max_waiting:
            raise OverloadedError(f"{self.waiting} queries are waiting")
        job = _Job(queries, topk, asyncio.get_running_loop().create_future())
        self._jobs.append(job)
        self.waiting += len(queries)
        if len(self._running) < self._workers:
            self._running.add(asyncio.create_task(self._work()))
        return await job.answer

    async def close(self) -> None:
        """Answer everything that was taken, then stop."""
        while self._running:
            await asyncio.gather(*self._running)
        self._threads.shutdown()

    async def _work(self) -> None:
        if self._max_wait_s:
            await asyncio.sleep(self._max_wait_s)
        try:
            while self._jobs:
                await self._answer(self._take())
        finally:
            # At once, and not in a callback of the task: a search that comes in between would take this task
            # for a searcher at work and wait for ever.
            self._running.discard(cast("asyncio.Task[None]", asyncio.current_task()))

    def _take(self) -> list[_Job]:
        """Take the first job and those after it that fit into its batch, in order."""
        first = self._jobs.popleft()
        taken, size, left = [first], len(first.queries), deque[_Job]()
        while self._jobs:
            job = self._jobs.popleft()
            if job.topk == first.topk and size + len(job.queries) <= self._max_batch:
                taken.append(job)
                size += len(job.queries)
            else:
                left.append(job)
        self._jobs = left
        self.waiting -= size
        return taken

    async def _answer(self, jobs: list[_Job]) -> None:
        queries = [query for job in jobs for query in job.queries]
        loop = asyncio.get_running_loop()
        begun = loop.time()
        try:
            found = await loop.run_in_executor(self._threads, self._retriever.search, queries, jobs[0].topk)
        except Exception as error:  # noqa: BLE001 - handed to the callers that wait for it
            if len(jobs) > 1:
                for job in jobs:
                    await self._answer([job])
            elif not jobs[0].answer.done():
                jobs[0].answer.set_exception(error)
            return
        finally:
            self._on_batch(len(queries), loop.time() - begun)
        start = 0
        for job in jobs:
            if not job.answer.done():  # a caller that went away has cancelled its future
                job.answer.set_result(found[start : start + len(job.queries)])
            start += len(job.queries)
