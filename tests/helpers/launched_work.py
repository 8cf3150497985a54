"""What learners do in the tests of the launcher."""

import os
import signal
import time
from pathlib import Path

from at2po_agent.cluster.learners import rank
from at2po_env.errors import DataError


def go_wrong(how: str) -> None:
    """The first learner waits for ever, and the second ends."""
    if rank() == 0:
        time.sleep(600)
    if how == "error":
        raise DataError("questions.jsonl: line 3 is no JSON")
    if how == "bug":
        raise ZeroDivisionError("a bug")
    os.kill(os.getpid(), signal.SIGKILL)


def leave(code: int) -> None:
    """All end with an exit code."""
    raise SystemExit(code)


def wait(folder: str) -> None:
    """All write their process ids, and wait for ever."""
    Path(folder, str(rank())).write_text(str(os.getpid()))
    time.sleep(600)
