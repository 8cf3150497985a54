"""A bounded pool of daemon threads with a deadline for every job.

Jobs are begun in the order in which they were handed in. Python cannot stop a thread, so a job past its
deadline is given up: its result is dropped, its thread ends when the job returns by itself, and a new thread
takes its place, so that hung jobs do not starve the pool. While `MAX_LOST` such threads linger in the
process, no pool starts another one; jobs that no thread is left for are given up at once.

An exception of a job is a bug of whoever wrote it, and is raised again in the caller's thread. All methods
are called from one thread. Knows no environment.
"""

import threading
import time
from collections.abc import Callable
from itertools import takewhile
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

KeyT = TypeVar("KeyT")
ResultT = TypeVar("ResultT")

MAX_LOST = 256
_lost: list[threading.Thread] = []


class _Job(Generic[KeyT, ResultT]):
    """A call on its way through a thread."""

    __slots__ = ("call", "error", "finished", "given_up", "key", "result", "started", "thread")

    def __init__(self, key: KeyT, call: Callable[[], ResultT]) -> None:
        self.key = key
        self.call = call
        self.result: ResultT | None = None
        self.error: BaseException | None = None
        self.thread: threading.Thread | None = None
        self.started: float | None = None
        self.finished = self.given_up = False


class Workers(Generic[KeyT, ResultT]):
    """Runs jobs in threads that are started as they are needed.

    Args:
        limit: Most jobs that run at the same time, at least 1.
        deadline_s: Seconds from a job's beginning after which it is given up; None waits for ever.
        name: What the threads are called.
    """

    def __init__(self, limit: int, *, deadline_s: float | None = None, name: str = "at2po-tool") -> None:
        self._limit = limit
        self._deadline_s = deadline_s
        self._name = name
        self._jobs: SimpleQueue[_Job[KeyT, ResultT] | None] = SimpleQueue()
        self._results: SimpleQueue[_Job[KeyT, ResultT]] = SimpleQueue()
        self._pending: dict[_Job[KeyT, ResultT], None] = {}
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()  # around the moment when a job is finished or given up

    @property
    def pending(self) -> int:
        """Jobs that were handed in and not collected."""
        return len(self._pending)

    def submit(self, key: KeyT, call: Callable[[], ResultT]) -> None:
        """Hand in a job; `collect` returns its key."""
        job = _Job(key, call)
        self._pending[job] = None
        self._jobs.put(job)
        self._staff()

    def collect(self, wait_s: float = 0.0) -> list[tuple[KeyT, ResultT | None]]:
        """What has finished since the last call, in order of finishing; None for a job that was given up.

        Args:
            wait_s: Seconds to sleep until there is something, at most; `inf` until there is, unless nothing
                is pending.
        """
        until = time.monotonic() + wait_s
        arrived: list[_Job[KeyT, ResultT]] = []
        while True:
            done = self._take(arrived)
            if self._pending and self._deadline_s is not None:
                done += self._give_up()
            left = until - time.monotonic()
            if done or not self._pending or left <= 0:
                return done
            try:
                arrived = [self._results.get(timeout=min(left, self._patience(), threading.TIMEOUT_MAX))]
            except Empty:
                arrived = []

    def close(self, grace_s: float = 0.0) -> None:
        """Drop what has not begun, and end the threads.

        Args:
            grace_s: Seconds to wait for jobs under way; those that take longer end unheard.
        """
        try:
            while True:
                self._jobs.get_nowait()
        except Empty:
            pass
        for _ in self._threads:
            self._jobs.put(None)
        until = time.monotonic() + grace_s
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        self._threads.clear()
        self._pending.clear()

    def _staff(self) -> None:
        """Have as many threads as there is work for."""
        while len(self._threads) < min(self._limit, len(self._pending)) and _lost_threads() < MAX_LOST:
            number = len(self._threads)
            thread = threading.Thread(target=self._work, name=f"{self._name}-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.thread = threading.current_thread()
            job.started = time.monotonic()
            try:
                job.result = job.call()
            except BaseException as error:  # noqa: BLE001  raised again in the caller's thread
                job.error = error
            with self._lock:
                if job.given_up:
                    return
                job.finished = True
            self._results.put(job)
            del job  # an idle thread holds nothing

    def _take(self, jobs: list[_Job[KeyT, ResultT]]) -> list[tuple[KeyT, ResultT | None]]:
        """The results of some jobs and of all that have arrived."""
        done: list[tuple[KeyT, ResultT | None]] = []
        while True:
            for job in jobs:
                del self._pending[job]
                if job.error is not None:
                    raise job.error
                done.append((job.key, job.result))
            try:
                jobs = [self._results.get_nowait()]
            except Empty:
                return done

    def _give_up(self) -> list[tuple[KeyT, ResultT | None]]:
        """The jobs whose time is over; those that were handed in first began first."""
        assert self._deadline_s is not None
        over: list[tuple[KeyT, ResultT | None]] = []
        latest = time.monotonic() - self._deadline_s

        def is_over(job: _Job[KeyT, ResultT]) -> bool:
            return not self._threads or (job.started is not None and job.started <= latest)

        for job in list(takewhile(is_over, self._pending)):
            with self._lock:
                job.given_up = not job.finished
            if job.given_up:
                del self._pending[job]
                over.append((job.key, None))
                self._replace(job.thread)
        return over

    def _replace(self, thread: threading.Thread | None) -> None:
        """Count a hung thread as lost; another takes its place."""
        if thread is not None:  # else it never began: no thread was left
            self._threads.remove(thread)
            _lost.append(thread)
            self._staff()

    def _patience(self) -> float:
        """Seconds until the next job may have to be given up."""
        if self._deadline_s is None:
            return float("inf")
        started = next(iter(self._pending)).started
        passed = 0.0 if started is None else time.monotonic() - started
        return max(0.0, self._deadline_s - passed) + 1e-3


def _lost_threads() -> int:
    """How many threads linger in jobs that were given up."""
    if _lost:
        _lost[:] = [thread for thread in _lost if thread.is_alive()]
    return len(_lost)
