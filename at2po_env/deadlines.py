"""Deadlines that fire: calls run in daemon threads, and a late call is given up.

Python cannot stop a thread. A call that was given up goes on in the background until it returns by itself;
its result is dropped, and it cannot keep the process from exiting. Each call has an owner, a tool or an
environment. At most `MAX_ABANDONED` calls of one owner may linger, so that calls which hang for good cannot
fill the process with threads. While they do, further calls of that owner are given up at once; other owners
are not affected. Code that holds the interpreter lock the whole time (a C extension that never yields)
defeats every deadline here: run it in a process, as `tools.programs` does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

KeyT = TypeVar("KeyT")
ResultT = TypeVar("ResultT")

MAX_ABANDONED = 256

_abandoned: list[tuple[object, threading.Thread]] = []  # an owner is kept for as long as its calls linger
_abandoned_lock = threading.Lock()


class DeadlineError(TimeoutError):
    """A call did not return within its time."""


def abandoned_calls(owner: object) -> int:
    """Return how many calls of this owner were given up and are still running."""
    if not _abandoned:
        return 0
    with _abandoned_lock:
        _abandoned[:] = [(other, thread) for other, thread in _abandoned if thread.is_alive()]
        return sum(other is owner for other, _ in _abandoned)


def run_with_deadline(
    function: Callable[[], ResultT], timeout_s: float, *, owner: object, name: str = "call"
) -> ResultT:
    """Return `function()`, or give up after `timeout_s` seconds.

    Args:
        function: The call.
        timeout_s: Its time.
        owner: The object, compared by identity, whose lingering calls are bounded together.
        name: Name of the thread.

    Raises:
        DeadlineError: The time is over, or `MAX_ABANDONED` calls of this owner that were given up are still
            running.
        BaseException: The exception that `function` raised.
    """
    if abandoned_calls(owner) >= MAX_ABANDONED:
        raise DeadlineError(f"no time left: {MAX_ABANDONED} earlier calls that timed out are still running")
    workers: Workers[None, tuple[ResultT]] = Workers(
        1, deadline_s=timeout_s, owner=owner, name=f"at2po-{name}"
    )
    workers.submit(None, lambda: (function(),))  # a tuple, since None means that the call was given up
    try:
        ((_, result),) = workers.collect(float("inf"))
    finally:
        workers.close()
    if result is None:
        raise DeadlineError(f"timed out after {timeout_s:g} s")
    return result[0]


@dataclass(eq=False, slots=True)
class _Job(Generic[KeyT, ResultT]):
    """A call on its way through a thread."""

    key: KeyT
    call: Callable[[], ResultT]
    result: ResultT | None = None
    error: BaseException | None = None
    thread: threading.Thread | None = None
    started: float | None = None
    finished: bool = False
    given_up: bool = False


class Workers(Generic[KeyT, ResultT]):
    """Runs jobs in daemon threads that are started as they are needed, with a deadline for each job.

    Jobs begin in the order in which they were submitted. When a job is given up, a new thread takes the place
    of the one that it holds, so hung jobs do not starve the others. An exception of a job is raised in the
    thread that collects. All methods are called from one thread.

    Args:
        limit: Most jobs that run at the same time, at least 1.
        deadline_s: Seconds from a job's beginning after which it is given up; None waits for ever.
        owner: The object, compared by identity, whose lingering calls are bounded together. Default: this
            pool.
        name: Name of the threads.
    """

    def __init__(
        self, limit: int, *, deadline_s: float | None = None, owner: object = None, name: str = "at2po-call"
    ) -> None:
        self._owner = self if owner is None else owner
        self._limit = limit
        self._deadline_s = deadline_s
        self._name = name
        self._jobs: SimpleQueue[_Job[KeyT, ResultT] | None] = SimpleQueue()
        self._results: SimpleQueue[_Job[KeyT, ResultT]] = SimpleQueue()
        self._pending: dict[_Job[KeyT, ResultT], None] = {}  # in the order of submission
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()  # guards the moment when a job is finished or given up

    @property
    def pending(self) -> int:
        """Number of jobs that were submitted and not collected."""
        return len(self._pending)

    def submit(self, key: KeyT, call: Callable[[], ResultT]) -> None:
        """Hand in a job; `collect` returns its key."""
        job = _Job(key, call)
        self._pending[job] = None
        self._jobs.put(job)
        self._start_threads()

    def collect(self, wait_s: float = 0.0) -> list[tuple[KeyT, ResultT | None]]:
        """Return the results since the last call, in order of finishing; None for a job that was given up.

        Args:
            wait_s: Sleep at most so many seconds until there is a result. `inf` sleeps until there is one,
                unless no job is pending.

        Raises:
            BaseException: What a job raised.
        """
        until = time.monotonic() + wait_s
        done: list[tuple[KeyT, ResultT | None]] = []
        job: _Job[KeyT, ResultT] | None = None
        while True:
            while job is not None or not self._results.empty():
                job = job or self._results.get_nowait()
                del self._pending[job]
                if job.error is not None:
                    raise job.error
                done.append((job.key, job.result))
                job = None
            if self._deadline_s is not None:
                done += self._give_up(self._deadline_s)
            left = until - time.monotonic()
            if done or not self._pending or left <= 0:
                return done
            if self._deadline_s is not None:  # wake when the oldest job may have to be given up
                started = next(iter(self._pending)).started
                passed = 0.0 if started is None else time.monotonic() - started
                left = min(left, max(0.0, self._deadline_s - passed) + 1e-3)
            with suppress(Empty):
                job = self._results.get(timeout=min(left, threading.TIMEOUT_MAX))

    def _give_up(self, deadline_s: float) -> list[tuple[KeyT, ResultT | None]]:
        """Give up the jobs whose time is over, and those for which no thread is left."""
        late: list[tuple[KeyT, ResultT | None]] = []
        latest = time.monotonic() - deadline_s
        for job in list(self._pending):  # the first that was submitted began first
            if self._threads and (job.started is None or job.started > latest):
                break
            with self._lock:
                job.given_up = not job.finished
            if not job.given_up:
                continue
            del self._pending[job]
            late.append((job.key, None))
            if job.thread is not None:  # else it never began
                self._threads.remove(job.thread)
                with _abandoned_lock:
                    _abandoned.append((self._owner, job.thread))
                self._start_threads()
        return late

    def _start_threads(self) -> None:
        """Start as many threads as there is work for."""
        while (
            len(self._threads) < min(self._limit, len(self._pending))
            and abandoned_calls(self._owner) < MAX_ABANDONED
        ):
            thread = threading.Thread(
                target=self._work, name=f"{self._name}-{len(self._threads)}", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.thread = threading.current_thread()
            job.started = time.monotonic()
            try:
                job.result = job.call()
            except BaseException as error:  # noqa: BLE001 - raised again in the thread that collects
                job.error = error
            with self._lock:
                if job.given_up:
                    return
                job.finished = True
            self._results.put(job)
            del job  # an idle thread holds nothing

    def close(self, grace_s: float = 0.0) -> None:
        """Drop the jobs that have not begun, and end the threads.

        Args:
            grace_s: Seconds to wait for the jobs that are running; later ones end unheard.
        """
        with suppress(Empty):
            while True:
                self._jobs.get_nowait()
        for _ in self._threads:
            self._jobs.put(None)
        until = time.monotonic() + grace_s
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        self._threads.clear()
        self._pending.clear()
