"""An engine in a process of its own: it decodes while this process does something else.

The child (`child`) runs `Engine` and steps as long as it has requests. Only finished generations come back.
Interventions travel with their requests and their state comes back with the generation.

What can go wrong, and what then happens: the child dies (killed, out of memory, an error of vLLM): every
call says so at once with a `PolicyError`, nothing hangs, and no process stays behind. The child stops making
steps: it is killed after `stall_timeout_s`, and the same error follows. This process dies: the child ends
itself. Shared memory that a killed process has left is removed then, or at the next start (`shared_files`).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
import weakref
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from at2po_agent.policies.base import Request
from at2po_agent.policies.vllm.child import Wire, serve
from at2po_agent.policies.vllm.engine import Finished
from at2po_agent.policies.vllm.shared_files import (
    descendants,
    mapped_files,
    note_files,
    remove_noted,
    sweep,
)
from at2po_agent.policies.vllm.spec import EngineSpec, Limits
from at2po_agent.transcripts.tokenizer import Tokenizer
from at2po_env.errors import At2poError, PolicyError

_PATIENCE_S = 10.0


class RemoteEngine:
    """Runs an engine in a child process.

    Args:
        spec: The engine to run.
        tokenizer: Travels once.
        number: Names the engine in messages.
    """

    def __init__(self, spec: EngineSpec, tokenizer: Tokenizer, *, number: int) -> None:
        self.number = number
        self.open: set[int] = set()
        self._config = spec.config
        self._wire = Wire(tokenizer)
        self._finished: list[Finished] = []
        self._failures: list[At2poError] = []
        self._replies: list[tuple[bool, Any]] = []
        self._dead: str | None = None
        self._notes: list[Path] = []
        sweep()
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(
            target=serve, args=(theirs, spec, tokenizer), name=f"at2po-vllm-{number}"
        )
        with _environment(spec):
            self.process.start()
        theirs.close()
        self._heard = time.monotonic()
        self._end = weakref.finalize(self, _end_process, self.process, self.connection, self._notes)

    @property
    def tickets(self) -> set[int]:
        """Requests under way."""
        return self.open if self._dead is None else set()

    def wait_ready(self) -> Limits:
        """Wait until the engine can take requests; its limits.

        Raises:
            PolicyError: It cannot be started.
        """
        limits: Limits = self._reply("start", self._config.start_timeout_s)
        pid = self.process.pid
        note = note_files(f"engine-{self.number}", mapped_files(descendants(pid)) if pid is not None else ())
        self._notes += [] if note is None else [note]
        return limits

    def add(self, ticket: int, request: Request) -> None:
        """Hand in a request that fits the model."""
        if not self.open:
            self._heard = time.monotonic()  # it had nothing to do, and so nothing to say
        self._send(("add", ticket, request))
        self.open.add(ticket)

    def collect(self) -> list[Finished]:
        """Return what has finished since the last call; does not wait.

        Raises:
            PolicyError: The engine has died or hangs, or an intervention failed.
        """
        self._read()
        if self._failures:
            raise self._failures.pop(0)
        silence = time.monotonic() - self._heard
        if self._dead is None and self.open and silence > self._config.stall_timeout_s:
            self._kill(f"made no step for {self._config.stall_timeout_s:g} s")
        if self._dead is not None and self.open:
            raise self._obituary()
        finished = [one for one in self._finished if one.ticket in self.open]
        self._finished.clear()
        self.open.difference_update(one.ticket for one in finished)
        return finished

    def begin(self, method: str, *arguments: Any) -> None:
        """Start a call of `Engine`."""
        self._send(("call", method, arguments))

    def end(self) -> Any:
        """Wait for the call, and return its result.

        Raises:
            PolicyError: It failed, the engine has died, or it took too long.
        """
        return self._reply("answer", self._config.start_timeout_s)

    def discard(self, ticket: int) -> None:
        """Forget a request."""
        if ticket in self.tickets:
            self.open.discard(ticket)
            with contextlib.suppress(PolicyError):
                self._send(("discard", ticket, None))

    def remove(self, ticket: int) -> Finished | None:
        """Take a request out; what it generated so far, or all of it where it has just ended."""
        self.begin("remove", ticket)
        done: Finished | None = self.end()
        done = done or next((one for one in self._finished if one.ticket == ticket), None)
        if done is not None:
            self.open.discard(ticket)
        return done

    def close(self) -> None:
        """End the process."""
        self.open.clear()
        self._dead = self._dead or "was closed"
        self._end()

    # Messages --------------------------------------------------------------------------------------------

    def _send(self, message: Any) -> None:
        if self._dead is not None:
            raise self._obituary()
        try:
            self.connection.send_bytes(self._wire.dumps(message))
        except OSError:
            self._bury()
            raise self._obituary() from None

    def _read(self, timeout: float = 0.0) -> None:
        """Take all messages that are there; waits for the first."""
        try:
            while self._dead is None and self.connection.poll(timeout):
                self._take(self._wire.loads(self.connection.recv_bytes()))
                timeout = 0.0
        except (OSError, EOFError):
            self._bury()

    def _take(self, message: Any) -> None:
        self._heard = time.monotonic()
        kind, content = message
        if kind == "finished":
            self._finished += content
        elif kind == "failed":
            ticket, error = content
            self.open.discard(ticket)
            self._failures.append(error)
        elif kind == "reply":
            self._replies.append(content)
        elif kind == "broken":
            self._dead = content

    def _reply(self, what: str, timeout: float) -> Any:
        deadline = time.monotonic() + timeout
        while not self._replies and self._dead is None:
            self._read(0.2)
            if time.monotonic() > deadline:
                self._kill(f"did not {what} for {timeout:g} s")
        if not self._replies:
            raise self._obituary()
        succeeded, value = self._replies.pop(0)
        if succeeded:
            return value
        raise value if isinstance(value, At2poError) else PolicyError(str(value))

    # Ends ------------------------------------------------------------------------------------------------

    def _kill(self, why: str) -> None:
        self._dead = why
        self.process.kill()
        self._end()

    def _bury(self) -> None:
        """The connection has ended: the process has died."""
        self._end()
        if self._dead is None:
            code = self.process.exitcode
            self._dead = f"ended with exit code {code}"
            if code is not None and code < 0:
                name = next((one.name for one in signal.Signals if one == -code), f"signal {-code}")
                self._dead = f"was killed by {name}"

    def _obituary(self) -> PolicyError:
        return PolicyError(
            f"vLLM engine {self.number} (process {self.process.pid}) {self._dead} with {len(self.open)} "
            "requests open; they are lost. Fix: see its output above, make the policy anew, or go on with "
            "at2po train RUN --resume"
        )


@contextlib.contextmanager
def _environment(spec: EngineSpec) -> Iterator[None]:
    """Set the GPUs and threads that the child inherits, while it is started."""
    wanted = {}
    if spec.devices is not None:
        wanted["CUDA_VISIBLE_DEVICES"] = ",".join(spec.devices)
    if spec.config.threads:
        wanted["OMP_NUM_THREADS"] = str(spec.config.threads)
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _end_process(process: BaseProcess, connection: Connection, notes: Sequence[Path]) -> None:
    """Close the connection, which ends the child, or use force. Reap it, and remove what it has left."""
    connection.close()
    process.join(_PATIENCE_S)
    if process.is_alive():
        process.terminate()
        process.join(_PATIENCE_S / 2)
    if process.is_alive():
        process.kill()
        process.join()
    deadline = time.monotonic() + _PATIENCE_S / 2  # its workers notice a moment later that it has gone
    while not all([remove_noted(note) for note in notes]) and time.monotonic() < deadline:
        time.sleep(0.1)
