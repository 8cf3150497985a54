"""Time-outs that fire: a call runs in a daemon thread and is given up when its time is over.

Python cannot stop a thread. A call that was given up keeps running in the background until it returns by
itself, its result is dropped, and it cannot keep the process from exiting. So that a tool that hangs for good
cannot fill the process with threads, at most `MAX_ABANDONED` of them may linger; beyond that calls fail at
once. Code that holds the interpreter lock for the whole time (a C extension that never yields) cannot be
timed out this way: run it in a process, as `tools.python` does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

MAX_ABANDONED = 64

_abandoned: list[threading.Thread] = []
_lock = threading.Lock()


class DeadlineError(TimeoutError):
    """A call did not return within its time."""


def abandoned_calls() -> int:
    """How many calls that were given up are still running."""
    with _lock:
        _abandoned[:] = [thread for thread in _abandoned if thread.is_alive()]
        return len(_abandoned)


def run_with_deadline(function: Callable[[], Any], timeout_s: float, *, name: str = "call") -> Any:
    """Return `function()`, or give up after `timeout_s` seconds.

    Raises:
        DeadlineError: The time is over, or `MAX_ABANDONED` calls that were given up are still running.
        Exception: Whatever `function` raised.
    """
    if abandoned_calls() >= MAX_ABANDONED:
        raise DeadlineError(f"no time left: {MAX_ABANDONED} earlier calls that timed out are still running")
    outcome: list[tuple[bool, Any]] = []
    done = threading.Event()

    def work() -> None:
        try:
            outcome.append((True, function()))
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread, which raises it
            outcome.append((False, error))
        done.set()

    thread = threading.Thread(target=work, name=f"at2po-{name}", daemon=True)
    thread.start()
    if not done.wait(timeout_s):
        with _lock:
            _abandoned.append(thread)
        raise DeadlineError(f"timed out after {timeout_s:g} s")
    ok, value = outcome[0]
    if ok:
        return value
    raise value
