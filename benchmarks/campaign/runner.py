"""Runs tries in forked processes, keeps count of them in a folder, and goes on from there.

The kinds take turns. A slice of tries runs in a process of its own, so that a try which hangs, or which ends
its process, is a failure of that try and not the end of the campaign.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import selectors
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from at2po_agent.runs.disk import replace_file

STATE = "campaign.json"
KEPT = 50
"""Failures of a kind after which it is not tried further."""
Try = Callable[[random.Random, int], str]
"""Does one try with its own generator and number; returns what went wrong, or ""."""


class Kind(NamedTuple):
    """A kind of tries.

    Attributes:
        goal: Tries of a whole campaign.
        open: Prepares tries in a folder, which a later slice finds again.
        limit_s: A try that takes longer has hung.
    """

    goal: int
    open: Callable[[Path], AbstractContextManager[Try]]
    limit_s: float = 60.0


class Failure(NamedTuple):
    """A try that went wrong."""

    kind: str
    number: int
    what: str


class Campaign:
    """The tries that were done, by kind, and those that went wrong.

    Args:
        folder: Keeps the state; a folder that holds one is gone on with.
        seed: Decides every try.
        report: Takes a line about each failure.
    """

    def __init__(self, folder: Path, *, seed: int = 0, report: Callable[[str], None] = print) -> None:
        self.folder, self.seed, self._report = folder, seed, report
        self.tries: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.failures: list[Failure] = []
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / STATE).is_file():
            state = json.loads((folder / STATE).read_text(encoding="utf-8"))
            if state["seed"] != seed:
                sys.exit(
                    f"{folder}: holds a campaign of seed {state['seed']}, not {seed}; give another --out"
                )
            self.tries, self.seconds = state["tries"], state["seconds"]
            self.failures = [Failure(*failure) for failure in state["failures"]]

    def run(
        self,
        kinds: Mapping[str, Kind],
        *,
        goals: Mapping[str, int] | None = None,
        seconds: float | None = None,
        slice_s: float = 30.0,
    ) -> None:
        """Let the kinds take turns until their goals are met, or until the time is up.

        Args:
            kinds: What to try.
            goals: Tries of each kind, in place of its own goal.
            seconds: Time; kinds that have met their goals go on if there is time when all have. None stops
                at the goals.
            slice_s: Time of one turn.
        """
        end = None if seconds is None else time.monotonic() + seconds
        wanted = {name: (goals or {}).get(name, kind.goal) for name, kind in kinds.items()}
        while end is None or time.monotonic() < end:
            broken = {name for name in kinds if sum(one.kind == name for one in self.failures) >= KEPT}
            left = {name: wanted[name] - self.tries.get(name, 0) for name in kinds if name not in broken}
            if end is not None and left and max(left.values()) <= 0:
                left = dict.fromkeys(left, 1 << 60)
            if not left or max(left.values()) <= 0:
                return
            for name in [name for name, count in left.items() if count > 0]:
                patience = slice_s if end is None else min(slice_s, end - time.monotonic())
                if patience > 0:
                    self._slice(name, kinds[name], left[name], patience)
                    self._save()

    def once(self, name: str, kind: Kind, number: int) -> str:
        """Do one try in this process, and return what went wrong."""
        home = self.folder / name
        home.mkdir(parents=True, exist_ok=True)
        with kind.open(home) as attempt:
            return attempt(generator(name, self.seed, number), number)

    def _slice(self, name: str, kind: Kind, count: int, patience: float) -> None:
        """Do some tries in a process of their own, and take down how they went."""
        home, first = self.folder / name, self.tries.get(name, 0)
        home.mkdir(parents=True, exist_ok=True)
        reading, writing = os.pipe()
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            _serve(name, kind, home, writing, self.seed, range(first, first + count), patience)
        os.close(writing)
        number, fault, rest, whole = first - 1, "", b"", False
        with os.fdopen(reading, "rb", buffering=0) as stream, selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            while not (fault or whole):
                if not selector.select(kind.limit_s if number >= first else 2 * kind.limit_s):
                    fault = f"it took more than {kind.limit_s:g} s"
                    break
                part = stream.read(1 << 16)
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    entry = json.loads(line)
                    whole = entry is None
                    if entry is not None:
                        number, what = entry
                        if what:
                            self._fail(Failure(name, number, what))
                if not part and not whole:
                    fault = "its process ended"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if fault:
            number += 1
            lines_said = (home / "output.log").read_text(encoding="utf-8", errors="replace").splitlines()
            self._fail(Failure(name, number, f"{fault} (status {status}): {' '.join(lines_said[-1:])[:300]}"))
        self.tries[name] = number + 1
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started

    def _fail(self, failure: Failure) -> None:
        self.failures.append(failure)
        self._report(f"{failure.kind}: try {failure.number}: {failure.what}\n    {self.again(failure)}")

    def again(self, failure: Failure) -> str:
        """The command that does the try again."""
        command = "python -m benchmarks.campaign"
        return f"{command} --only {failure.kind} --seed {self.seed} --try {failure.number}"

    def _save(self) -> None:
        state = {
            "seed": self.seed,
            "tries": self.tries,
            "seconds": self.seconds,
            "failures": [list(failure) for failure in self.failures],
        }
        replace_file(self.folder / STATE, json.dumps(state))

    def result(self, kinds: Mapping[str, Kind]) -> dict[str, Any]:
        """Tries, goals and failures, as JSON values."""
        failed = [one for one in self.failures if one.kind in kinds]
        return {
            "seed": self.seed,
            "kinds": {
                name: {
                    "tries": self.tries.get(name, 0),
                    "goal": kind.goal,
                    "failures": sum(one.kind == name for one in failed),
                    "seconds": round(self.seconds.get(name, 0.0), 1),
                }
                for name, kind in kinds.items()
            },
            "tries": sum(self.tries.get(name, 0) for name in kinds),
            "failures": [{**one._asdict(), "again": self.again(one)} for one in failed],
        }


def words(text: str) -> list[str]:
    """Split a table of words at its bars and the ends of its lines."""
    return text.replace("\n", "|").split("|")


def generator(name: str, seed: int, number: int) -> random.Random:
    """The generator of one try."""
    return random.Random(f"{name}/{seed}/{number}")


def _serve(
    name: str, kind: Kind, home: Path, writing: int, seed: int, numbers: range, patience: float
) -> NoReturn:
    """Do tries in this process, write how each went, and end."""
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        log = os.open(home / "output.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        until = time.monotonic() + patience
        with kind.open(home) as attempt:
            for number in numbers:
                try:
                    what = attempt(generator(name, seed, number), number)
                except Exception:  # noqa: BLE001  a bug of ours, or of the try
                    what = traceback.format_exc(limit=-3)
                os.write(writing, json.dumps([number, what]).encode() + b"\n")
                if time.monotonic() > until:
                    break
        os.write(writing, b"null\n")
        status = 0
    except BaseException:  # noqa: BLE001  the process ends here
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)
