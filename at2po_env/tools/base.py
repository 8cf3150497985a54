"""Defines tools and calls them: with valid arguments, within their time, retried a bounded number of times.

The error model: a tool that fails is data. Arguments that do not fit, a time-out and every exception in
`Tool.failures` become a `ToolResult` with `ok=False` whose text says why; the episode goes on. `SystemExit`
is always such a failure: a tool that calls `sys.exit` must not end a training run. Any other exception is a
bug and raises.

A tool keeps nothing between calls. An episode's memory of it is its *state*: an immutable JSON value that
comes with the context and goes back with the result, so that a forked episode shares and never disturbs it.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
from pydantic import BaseModel, ValidationError

from at2po_env.data.tasks import Task
from at2po_env.deadlines import DeadlineError, run_with_deadline
from at2po_env.errors import RetrievalError, ToolError
from at2po_env.forking.frozen import EMPTY, freeze
from at2po_env.retrieval.counters import count

MAX_BACKOFF_S = 5.0
MAX_ERROR_CHARS = 500


class _Unchanged:
    """The type of `UNCHANGED`."""

    def __repr__(self) -> str:
        return "UNCHANGED"


UNCHANGED: Any = _Unchanged()
"""As a result's state: the tool's state stays as it was."""


class ToolResult(NamedTuple):
    """The result of a call.

    Attributes:
        text: The text that the policy sees.
        state: The tool's new per-episode state; `UNCHANGED` keeps the old one.
        ok: False when the call failed; `text` then says why.
        ends: True when this call is the end of the episode (an order placed, a game won).
    """

    text: str
    state: Any = UNCHANGED
    ok: bool = True
    ends: bool = False


class ToolContext:
    """The part of an episode that a call may know.

    Attributes:
        task: The episode's task.
        state: The tool's own per-episode state, immutable.
        seed: The episode's seed.
        turn: Number of turns taken before this one.
    """

    __slots__ = ("_rng", "seed", "state", "task", "turn")

    def __init__(self, task: Task, state: Any = None, seed: int = 0, turn: int = 0) -> None:
        self.task = task
        self.state = state
        self.seed = seed
        self.turn = turn
        self._rng: np.random.Generator | None = None

    @property
    def rng(self) -> np.random.Generator:
        """The generator of this call, a function of (seed, turn) alone: a fork draws the same numbers."""
        if self._rng is None:
            self._rng = np.random.default_rng([self.seed, self.turn])
        return self._rng


class Backend(ABC):
    """What several tools call into, such as a server: in an episode they share one state.

    Attributes:
        key: Name under which an episode keeps the state.
    """

    key: str

    @abstractmethod
    def attach(self, user: object) -> None:
        """Note that an environment uses the tools; a fork is an environment of its own."""

    @abstractmethod
    def detach(self, user: object) -> None:
        """Note that an environment was closed; called again for the same one, this does nothing."""


class Tool(ABC):
    """A tool: a name, a description, a pydantic model of its arguments, and `run`.

    Attributes:
        name: Name by which the policy calls it.
        description: One sentence for the prompt.
        Arguments: Model of the arguments; the prompt and the validation follow it.
        timeout_s: Seconds after which an attempt counts as failed; None = no limit (and no thread). A hung
            attempt goes on in its thread; `deadlines.MAX_ABANDONED` of them may linger for each tool.
        retries: Further attempts after a failed one. Arguments that do not fit are never tried again.
        backoff_s: Pause before the first retry; doubles each time, at most `MAX_BACKOFF_S`.
        max_chars: Longest text shown; the rest is cut, with a note.
        info: What users should know of this tool (in which sandbox it runs): `ToolEnv.reset` shows it in
            `info["tools"]` under the tool's name.
        backend: What the tool shares with others, their state included; None: the tool stands for itself.
        failures: Exceptions of `run` that are failures of the tool; any other is a bug and raises. A time-out
            and `SystemExit` are always failures.
    """

    name: str
    description: str
    Arguments: type[BaseModel]
    timeout_s: float | None = None
    retries: int = 0
    backoff_s: float = 0.1
    max_chars: int = 20_000
    info: Mapping[str, Any] = EMPTY
    backend: Backend | None = None
    failures: ClassVar[tuple[type[BaseException], ...]] = (Exception,)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        always = (DeadlineError, SystemExit)
        cls.failures = (*cls.failures, *(kind for kind in always if kind not in cls.failures))

    def start(self, task: Task) -> Any:
        """Return the tool's state at the start of an episode about `task`: a JSON value."""
        del task
        return None

    def validate(self, arguments: Mapping[str, Any]) -> Any:
        """Turn raw arguments into what `run` gets; raises pydantic's `ValidationError`."""
        return self.Arguments.model_validate(arguments)

    @abstractmethod
    def run(self, arguments: Any, context: ToolContext) -> Any:
        """Do the work.

        Args:
            arguments: An instance of `Arguments`.
            context: Task, state and generator.

        Returns:
            A `ToolResult`, a string, or any JSON value, which is shown as JSON.
        """


def call_tool(tool: Tool, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
    """Call a tool; a failure is a result, never an exception.

    Args:
        tool: The tool.
        arguments: Raw arguments, as the policy wrote them.
        context: The episode's side of the call.

    Returns:
        The result; its state is frozen, its text encodable as UTF-8 and at most `tool.max_chars` long.
    """
    try:
        checked = tool.validate(arguments)
    except ValidationError as error:
        # One line per wrong field, without echoing the input.
        faults = error.errors(include_url=False, include_context=False, include_input=False)[:5]
        places = [".".join(str(part)[:80] for part in fault["loc"]) for fault in faults]
        lines = [
            f"{place}: {f['msg']}" if place else f["msg"] for place, f in zip(places, faults, strict=True)
        ]
        return _failure(f"wrong arguments for {tool.name}: {'; '.join(lines)}")
    attempt = 0
    while True:
        try:
            if tool.timeout_s is None:
                result = tool.run(checked, context)
            else:
                call = partial(tool.run, checked, context)
                result = run_with_deadline(call, tool.timeout_s, owner=tool, name=tool.name)
            break
        except tool.failures as error:
            if attempt == tool.retries:
                tries = f" ({tool.retries + 1} attempts)" if tool.retries else ""
                # a service that failed, and not a complaint about what the policy wrote
                count(tool_failures=int(isinstance(error, RetrievalError | OSError)))
                return _failure(f"{tool.name} failed{tries}: {_message(error)}")
        time.sleep(min(tool.backoff_s * 2**attempt, MAX_BACKOFF_S))
        attempt += 1
        context = ToolContext(context.task, context.state, context.seed, context.turn)  # a fresh generator
    if type(result) is str and result.isascii() and len(result) <= tool.max_chars:
        return tuple.__new__(ToolResult, (result, UNCHANGED, True, False))  # as its constructor, faster
    if not isinstance(result, ToolResult):
        if result is None:
            result = ""
        elif not isinstance(result, str):
            result = json.dumps(result, ensure_ascii=False, default=str)
        result = ToolResult(result)
    text, state, ok, ends = result
    if len(text) > tool.max_chars:
        text = f"{text[: tool.max_chars]}\n[cut: {len(text):,} characters in all]"
    if state is not UNCHANGED:
        state = freeze(state)
    return ToolResult(encodable(text), state, ok, ends)


def encodable(text: str) -> str:
    """Replace lone surrogates, which no tokenizer takes, by '?'."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


def _failure(reason: str) -> ToolResult:
    return ToolResult(encodable(reason[:MAX_ERROR_CHARS]), UNCHANGED, ok=False)


def _message(error: BaseException) -> str:
    """Say what went wrong; the class is named unless the message was written for the reader."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - a user's exception may fail to describe itself
        text = ""
    if isinstance(error, ToolError | RetrievalError | TimeoutError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
