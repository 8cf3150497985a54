"""Runs an engine in a process of its own: steps while there are requests, takes messages between steps, ends.

The owner's side is `process.RemoteEngine`; both sides read and write messages by `Wire`.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing.util
import os
import pickle
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from at2po_agent.policies.vllm.engine import Engine
from at2po_agent.policies.vllm.spec import EngineSpec
from at2po_agent.transcripts.tokenizer import Tokenizer
from at2po_env.errors import At2poError, PolicyError

_BEAT_S = 1.0
_LEAVING_S = 5.0
_TEXT = 300
_TOKENIZER = "tokenizer"


class Wire:
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


class _ParentIsGone(Exception):
    """Nothing went wrong here."""


def serve(connection: Connection, spec: EngineSpec, tokenizer: Tokenizer) -> None:
    """Run an engine until the parent says or goes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the parent, who ends us
    wire, code, engine = Wire(tokenizer), 0, None

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
        _work(engine, inbox, wire, tell)
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


def _work(
    engine: Engine, inbox: queue.SimpleQueue[bytes], wire: Wire, tell: Callable[[str, Any], None]
) -> None:
    """Step while there are requests, and take messages between steps, until the parent goes."""
    told = 0.0
    while True:
        messages = [inbox.get()] if engine.idle else []
        with contextlib.suppress(queue.Empty):
            while True:
                messages.append(inbox.get_nowait())
        for message in messages:
            if not message:
                return
            _obey(engine, tell, *wire.loads(message))
        if engine.idle:
            continue
        before = engine.tickets
        try:
            finished = engine.collect()
        except PolicyError as error:
            for ticket in sorted(before - engine.tickets):
                tell("failed", (ticket, error))
            continue
        if finished or time.monotonic() - told > _BEAT_S:
            tell("finished", finished)
            told = time.monotonic()


def _obey(engine: Engine, tell: Callable[[str, Any], None], kind: str, what: Any, content: Any) -> None:
    """Do what a message says: add a request, discard one, or call a method and reply."""
    if kind == "discard":
        engine.discard(what)
        return
    try:
        if kind == "add":
            engine.add(what, content)
            return
        value = getattr(engine, what)(*content)
    except Exception as error:  # noqa: BLE001  raised where the owner polls, or waits for the reply
        traceback.print_exc()
        if kind == "add":
            tell("failed", (what, PolicyError(f"vLLM refuses the request: {error}")))
        else:
            known = isinstance(error, At2poError)
            tell("reply", (False, error if known else f"{what} failed: {error!r}"))
    else:
        tell("reply", (True, value))
