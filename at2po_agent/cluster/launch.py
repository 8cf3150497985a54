"""Starts the learners of a command on this machine, and ends all of them when one fails.

torch starts the processes, and each finds its place in the environment variables that `torchrun` sets too, so
a learner need not know who started it. This process trains nothing: it waits, passes signals on, and says in
one message what went wrong. For learners on several machines, `torchrun` takes its place.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from torch import distributed
from torch.multiprocessing.spawn import ProcessExitedException, start_processes

from at2po_agent.cluster.learners import LearnerError
from at2po_agent.runs.folder import RunFolder
from at2po_env.errors import At2poError, ConfigError

GRACE_S = 5.0
"""How long the other learners may take to end by themselves when one has failed, and once more when they were
told to; then they are killed."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NOTES = "AT2PO_LEARNER_NOTES"
_RUN = "run"


def launch(count: int, work: Callable[..., None], *arguments: Any) -> int:
    """Let some processes do the same work, each with its place among them in its environment variables.

    Every signal that this process gets goes to all of them, so one Ctrl-C reaches each of them once.

    Args:
        count: How many there are.
        work: A function of a module.
        arguments: Its arguments, which can be pickled.

    Returns:
        0, or the exit code with which the work raised SystemExit; 130 when a signal broke it off.

    Raises:
        LearnerError: A learner failed; the others were ended, and the first failure is told.
        ConfigError: The system cannot do this.
        RuntimeError: A bug; the message ends with the learner's traceback.
    """
    if sys.platform == "win32":
        raise ConfigError("cluster.learners: Windows is not supported. Fix: cluster.learners=1")
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # it tells what it ends
    # The learners meet at this store. Its port is a free one, so that two runs never collide.
    store = distributed.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )
    with tempfile.TemporaryDirectory(prefix="at2po-learners-") as notes:
        # Signals wait until the learners are there to hear of them; these inherit the mask, and lift it.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        before, heard = {}, list[float]()
        try:
            context: Any = start_processes(  # type: ignore[no-untyped-call]
                _learn, (work, arguments, count, store.port, notes), nprocs=count, join=False
            )

            def pass_on(number: int, frame: FrameType | None) -> None:
                del frame
                heard.append(time.monotonic())
                for process in context.processes:
                    if process.is_alive():
                        os.kill(process.pid, number)

            before = {number: signal.signal(number, pass_on) for number in _SIGNALS}
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            first: int | None = None
            try:
                while not context.join(timeout=1.0, grace_period=GRACE_S):
                    # A second signal is meant to stop everything at once. A learner that waits for another
                    # cannot heed it.
                    if len(heard) > 1 and time.monotonic() > heard[1] + GRACE_S:
                        for process in context.processes:
                            process.kill()
            except ProcessExitedException as error:
                first = error.error_index
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            for number, handler in before.items():
                signal.signal(number, handler)
        found = [json.loads(path.read_text()) for path in Path(notes).glob("*.json")]
        if first is not None and heard and all(note["kind"] in ("left", "lost") for note in found):
            return 128 + signal.SIGINT  # those that had to wait for others could not leave by themselves
        if first is not None:
            run = Path(notes, _RUN)
            _fail(first, found, context.processes, RunFolder(Path(run.read_text())) if run.exists() else None)
        return max((note["code"] for note in found), default=0)


def tell_folder(folder: RunFolder) -> None:
    """Let the process that launched this one know the run's folder, for what it says of a killed learner."""
    if _NOTES in os.environ:
        Path(os.environ[_NOTES], _RUN).write_text(str(folder.path))


def _learn(
    rank: int, work: Callable[..., None], arguments: tuple[Any, ...], count: int, port: int, notes: str
) -> None:
    """One learner: do the work, and leave a note where it did not return."""
    os.setpgrp()  # the terminal's Ctrl-C goes to the launching process alone, which passes it on
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    names = {"TORCHELASTIC_RUN_ID": "at2po", _NOTES: notes}
    os.environ.update({name: str(value) for name, value in {**place, **store, **names}.items()})
    code, kind, text = 1, "bug", ""
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        work(*arguments)
        return
    except SystemExit as left:
        code, kind = (left.code if isinstance(left.code, int) else int(left.code is not None)), "left"
    except KeyboardInterrupt:
        code, kind = 128 + signal.SIGINT, "left"
    except At2poError as error:
        kind, text = "error", str(error)
    except Exception as error:  # noqa: BLE001  the launching process raises it again
        text = traceback.format_exc()
        if isinstance(error, RuntimeError) and any(
            word in str(error) for word in ("gloo", "NCCL", "TCPStore")
        ):
            kind = "lost"  # the connection to another learner, which has its own story to tell
    note = {"rank": rank, "time": time.time(), "kind": kind, "text": text, "code": code}
    Path(notes, f"{rank}.json").write_text(json.dumps(note))
    if kind != "left":
        sys.exit(1)


def _fail(first: int, notes: list[dict[str, Any]], processes: list[Any], run: RunFolder | None) -> NoReturn:
    """Raise the failure that came before all others.

    Args:
        first: The learner that was seen to end first; others may have ended at the same moment.
        notes: What the learners left behind.
        processes: The learners.
        run: The run's folder, as far as it was known.
    """
    notes = sorted(notes, key=lambda note: note["time"])
    for note in notes:
        if note["kind"] == "error":
            raise LearnerError(note["text"])
    # What a learner says of itself counts before a signal, with which the others may have been ended for it.
    for note in notes:
        if note["kind"] == "bug":
            raise RuntimeError(f"learner {note['rank']} failed:\n{note['text']}")
    killed = [rank for rank, process in enumerate(processes) if process.exitcode < 0]
    if killed:
        rank = first if first in killed else killed[0]
        name = signal.Signals(-processes[rank].exitcode).name
        again = "start it again" if run is None else f"go on with: {run.resume_command}"
        raise LearnerError(
            f"learner {rank} was ended by {name} (too little memory is a common reason), and all others with "
            f"it. Fix the reason, then {again}"
        )
    lost = [note["text"] for note in notes if note["kind"] == "lost"]
    if lost:  # a network, perhaps
        raise RuntimeError(f"the learners lost each other:\n{lost[0]}")
    raise LearnerError(f"learner {first} ended with exit code {processes[first].exitcode}")
