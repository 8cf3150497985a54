"""An engine in a process of its own: it decodes while this process does something else.

The child runs `Engine` and steps as long as it has requests. Only finished generations come back.
Interventions travel with their requests and their state comes back with the generation.

What can go wrong, and what then happens: the child dies (killed, out of memory, an error of vLLM): every
call says so at once with a `PolicyError`, nothing hangs, and no process stays behind. The child stops making
steps: it is killed after `stall_timeout_s`, and the same error follows. This process dies: the child ends
itself.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import multiprocessing.util
import os
import pickle
import queue
import signal
import threading
import time
import traceback
import weakref
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

from at2po_agent.policies.base import Request, Tokenizer
from at2po_agent.policies.vllm.engine import Engine, Finished
from at2po_agent.policies.vllm.spec import EngineSpec, Limits
from at2po_env.errors import At2poError, PolicyError

_BEAT_S = 1.0
_PATIENCE_S = 10.0
_LEAVING_S = 5.0
_TOKENIZER = "tokenizer"
_TEXT = 300


class RemoteEngine:
    """Runs an engine in a child process.

    Args:
        spec: What to run.
        tokenizer: Travels once.
        number: Names the engine in messages.
    """

    def __init__(self, spec: EngineSpec, tokenizer: Tokenizer, *, number: int) -> None:
        self.number = number
        self.open: set[int] = set()
        self._settings = spec.settings
        self._wire = _Wire(tokenizer)
        self._finished: list[Finished] = []
        self._failures: list[At2poError] = []
        self._replies: list[tuple[bool, Any]] = []
        self._dead: str | None = None
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(
            target=_serve, args=(theirs, spec, tokenizer), name=f"at2po-vllm-{number}"
        )
        with _environment(spec):
            self.process.start()
        theirs.close()
        self._heard = time.monotonic()
        self._end = weakref.finalize(self, _end_process, self.process, self.connection)

    @property
    def tickets(self) -> set[int]:
        """Requests under way."""
        return self.open if self._dead is None else set()

    def wait_ready(self) -> Limits:
        """Wait until the engine can take requests; its limits.

        Raises:
            PolicyError: It cannot be started.
        """
        limits: Limits = self._reply("start", self._settings.start_timeout_s)
        return limits

    def add(self, ticket: int, request: Request) -> None:
        """Hand in a request that fits the model."""
        if not self.open:
            self._heard = time.monotonic()  # it had nothing to do, and so nothing to say
        self._send(("add", ticket, request))
        self.open.add(ticket)

    def collect(self) -> list[Finished]:
        """What has finished since the last call; does not wait.

        Raises:
            PolicyError: The engine has died or hangs, or an intervention failed.
        """
        self._read()
        if self._failures:
            raise self._failures.pop(0)
        if self._dead is None and self.open and self._silence() > self._settings.stall_timeout_s:
            self._kill(f"made no step for {self._settings.stall_timeout_s:g} s")
        if self._dead is not None and self.open:
            raise PolicyError(self._obituary())
        finished = [one for one in self._finished if one.ticket in self.open]
        self._finished.clear()
        self.open.difference_update(one.ticket for one in finished)
        return finished

    def begin(self, method: str, *arguments: Any) -> None:
        """Start a call of `Engine`."""
        self._send(("call", method, arguments))

    def end(self) -> Any:
        """What the call returns.

        Raises:
            PolicyError: It failed, the engine has died, or it took too long.
        """
        return self._reply("answer", self._settings.start_timeout_s)

    def discard(self, ticket: int) -> None:
        """Forget a request."""
        if ticket in self.tickets:
            self.open.discard(ticket)
            with contextlib.suppress(PolicyError):
                self._send(("discard", ticket, None))

    def abort(self, ticket: int) -> Finished:
        """Stop a request; what it generated so far, or all of it where it has just ended."""
        self.begin("remove", ticket)
        finished: Finished | None = self.end()
        for one in [finished] if finished is not None else self._finished:
            if one.ticket == ticket:
                self.open.discard(ticket)
                return one
        raise PolicyError(f"no request with ticket {ticket} is under way")

    def close(self) -> None:
        """End the process."""
        self.open.clear()
        self._dead = self._dead or "was closed"
        self._end()

    # Messages --------------------------------------------------------------------------------------------

    def _send(self, message: Any) -> None:
        if self._dead is not None:
            raise PolicyError(self._obituary())
        try:
            self.connection.send_bytes(self._wire.dumps(message))
        except OSError:
            self._bury()
            raise PolicyError(self._obituary()) from None

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
            raise PolicyError(self._obituary())
        succeeded, value = self._replies.pop(0)
        if succeeded:
            return value
        raise value if isinstance(value, At2poError) else PolicyError(str(value))

    def _silence(self) -> float:
        return time.monotonic() - self._heard

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
            if code is not None and code < 0:
                self._dead = f"was killed by {_signal(-code)}"
            else:
                self._dead = f"ended with exit code {code}"

    def _obituary(self) -> str:
        return (
            f"vLLM engine {self.number} (process {self.process.pid}) {self._dead} with {len(self.open)} "
            "requests open; they are lost. Fix: see its output above, make the policy anew, or go on with "
            "at2po train RUN --resume"
        )


class _Wire:
    """Pickles messages; the tokenizer, which interventions often hold, stays at home."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def dumps(self, message: Any) -> bytes:
        """Bytes of a message."""
        buffer, tokenizer = io.BytesIO(), self._tokenizer

        class Pickler(pickle.Pickler):
            def persistent_id(self, obj: Any) -> str | None:
                return _TOKENIZER if obj is tokenizer else None

        try:
            Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(message)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise PolicyError(
                f"a request cannot travel to the engine's process: {error}. Fix: define the intervention in "
                "a module, without open files or lambdas, or set model.vllm.asynchronous=false"
            ) from error
        return buffer.getvalue()

    def loads(self, data: bytes) -> Any:
        """The message of bytes."""
        tokenizer = self._tokenizer

        class Unpickler(pickle.Unpickler):
            def persistent_load(self, pid: Any) -> Any:  # noqa: ARG002  there is only one
                return tokenizer

        return Unpickler(io.BytesIO(data)).load()


# The child -----------------------------------------------------------------------------------------------


class _ParentIsGone(Exception):
    """Nothing went wrong here."""


def _serve(connection: Connection, spec: EngineSpec, tokenizer: Tokenizer) -> None:
    """Run an engine until the parent says or goes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the parent, who ends us
    wire, code, engine = _Wire(tokenizer), 0, None

    def tell(kind: str, content: Any) -> None:
        data = wire.dumps((kind, content))
        try:
            connection.send_bytes(data)
        except OSError:
            raise _ParentIsGone from None

    try:
        engine = Engine(spec, tokenizer)
        tell("reply", (True, engine.limits))
        inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=_receive, args=(connection, inbox), daemon=True).start()
        _Loop(engine, inbox, wire, tell).run()
    except _ParentIsGone:
        pass
    except Exception as error:  # noqa: BLE001  the process's boundary: the parent raises it
        code = 1
        traceback.print_exc()
        text = " ".join(str(error).split())
        with contextlib.suppress(_ParentIsGone):
            tell("broken", f"failed: {type(error).__name__}: {text[:_TEXT]}")
    _leave(code, engine)


def _receive(connection: Connection, inbox: queue.SimpleQueue[bytes]) -> None:
    """Take messages at once, so that the parent never waits for a step; an empty one when it has gone."""
    try:
        while True:
            inbox.put(connection.recv_bytes())
    except (OSError, EOFError):
        inbox.put(b"")
        threading.Timer(_LEAVING_S, os._exit, (0,)).start()


def _leave(code: int, engine: Engine | None) -> NoReturn:
    """End this process within seconds, and all that it made: threads and exit hooks of vLLM would keep it."""
    threading.Timer(_LEAVING_S, os._exit, (code,)).start()
    with contextlib.suppress(Exception):
        if engine is not None:
            engine.close()
    with contextlib.suppress(Exception):
        multiprocessing.util._run_finalizers(0)  # type: ignore[attr-defined]  # what every exit runs
    os._exit(code)


class _Loop:
    """Steps while there are requests, and takes messages between steps."""

    def __init__(self, engine: Engine, inbox: queue.SimpleQueue[bytes], wire: _Wire, tell: Any) -> None:
        self._engine = engine
        self._inbox = inbox
        self._wire = wire
        self._tell = tell
        self._told = 0.0

    def run(self) -> None:
        """Until the parent goes."""
        while True:
            for message in self._messages():
                if not message:
                    return
                self._obey(*self._wire.loads(message))
            if not self._engine.idle:
                self._step()

    def _messages(self) -> Iterator[bytes]:
        if self._engine.idle:
            yield self._inbox.get()
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._inbox.get_nowait()

    def _obey(self, kind: str, what: Any, content: Any) -> None:
        if kind == "discard":
            self._engine.discard(what)
            return
        if kind == "add":
            try:
                self._engine.add(what, content)
            except Exception as error:  # noqa: BLE001  whoever polls raises it
                traceback.print_exc()
                self._tell("failed", (what, PolicyError(f"vLLM refuses the request: {error}")))
            return
        try:
            value = getattr(self._engine, what)(*content)
        except Exception as error:  # noqa: BLE001  the caller raises it
            traceback.print_exc()
            self._tell(
                "reply", (False, error if isinstance(error, At2poError) else f"{what} failed: {error!r}")
            )
        else:
            self._tell("reply", (True, value))

    def _step(self) -> None:
        before = self._engine.tickets
        try:
            finished = self._engine.collect()
        except PolicyError as error:
            for ticket in sorted(before - self._engine.tickets):
                self._tell("failed", (ticket, error))
            return
        now = time.monotonic()
        if finished or now - self._told > _BEAT_S:
            self._tell("finished", finished)
            self._told = now


# Processes -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _environment(spec: EngineSpec) -> Iterator[None]:
    """What the child inherits: its GPUs, its threads."""
    wanted = {}
    if spec.devices is not None:
        wanted["CUDA_VISIBLE_DEVICES"] = ",".join(spec.devices)
    if spec.settings.threads:
        wanted["OMP_NUM_THREADS"] = str(spec.settings.threads)
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


def _end_process(process: BaseProcess, connection: Connection) -> None:
    """Close the connection, which ends the child; use force where that does not help. Reaps it."""
    connection.close()
    process.join(_PATIENCE_S)
    if process.is_alive():
        process.terminate()
        process.join(_PATIENCE_S / 2)
    if process.is_alive():
        process.kill()
        process.join()


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
