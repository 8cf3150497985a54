"""Kills a process at a chosen moment, for tests of what it leaves behind."""

import os
import signal
from collections.abc import Callable
from typing import Any


def killed_at(name: str, number: int, moment: str, act: Callable[[], object]) -> bool:
    """Do something in a forked process that SIGKILL ends at the n-th call of a function of `os`.

    Args:
        name: The function, such as "fsync", "rename" or "unlink".
        number: Which of its calls, from 1.
        moment: "before" or "after" the call.
        act: What the process does.

    Returns:
        True when it was killed; False when it ended before that call.
    """
    pid = os.fork()
    if pid == 0:
        real, calls = getattr(os, name), 0

        def fatal(*values: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number and moment == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*values, **options)
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(os, name, fatal)
        try:
            act()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])
