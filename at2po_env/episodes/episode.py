"""Holds one episode in an immutable `Episode`: its task, the turns so far, the budgets used.

Turns form a linked list from the newest to the oldest, so a fork shares its past instead of copying it and
costs the same after 100 turns as after one. Comparison, hashing, copying, pickling and JSON walk the list in
loops, never by recursion: 10,000 turns must not exhaust the interpreter's stack.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, NamedTuple, Self, SupportsIndex

from at2po_env.data.tasks import Task, TaskSource
from at2po_env.errors import DataError, EnvError, SnapshotError
from at2po_env.forking.frozen import EMPTY, FrozenDict, freeze, thaw
from at2po_env.forking.random_state import next_seed

_new = tuple.__new__  # builds a NamedTuple in a third of the time of its constructor; see benchmarks/env.py


class TurnLink(NamedTuple):
    """One turn and, through `previous`, all the turns before it."""

    previous: TurnLink | None
    action: str
    observation: str
    reward: float
    outcome: str

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TurnLink):
            return NotImplemented
        left: TurnLink | None = self
        right: TurnLink | None = other
        while left is not right:
            if left is None or right is None or left[1:] != right[1:]:
                return False
            left, right = left.previous, right.previous
        return True

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(tuple([link[1:] for link in turns(self)]))

    def __repr__(self) -> str:
        return f"TurnLink(turn={len(turns(self))}, outcome={self.outcome!r})"

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _link_turns, ([tuple(link[1:]) for link in turns(self)],)


class Episode(NamedTuple):
    """Everything that distinguishes one moment of one episode from another.

    Attributes:
        task: What the episode is about.
        prompt: The first observation.
        last: The newest turn; `None` before the first.
        turn: Number of turns taken.
        tool_calls: Number of tool calls made, failed ones included.
        tool_states: Per tool name, what the tool remembers: frozen JSON values (`frozen.freeze`).
        seed: Seed of the episode; generators are derived from (seed, turn), never stored.
        ended: Why the episode has ended; "" while it runs.
    """

    task: Task
    prompt: str
    last: TurnLink | None = None
    turn: int = 0
    tool_calls: int = 0
    tool_states: Mapping[str, Any] = EMPTY
    seed: int = 0
    ended: str = ""

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    @property
    def turns(self) -> list[TurnLink]:
        """The turns so far, oldest first."""
        return turns(self.last)

    def after(
        self,
        action: str,
        observation: str,
        outcome: str,
        calls: int = 0,
        tool_states: Mapping[str, Any] | None = None,
    ) -> Episode:
        """Return the episode one turn later.

        Args:
            action: What the policy wrote in the turn.
            observation: What it was shown.
            outcome: What the turn was: "tool", "answer", ...
            calls: Number of tool calls that the turn made.
            tool_states: What the tools remember now; None leaves it as it is.
        """
        task, prompt, last, turn, tool_calls, states, seed, ended = self
        link = _new(TurnLink, (last, action, observation, 0.0, outcome))
        if tool_states is not None:
            states = tool_states
        return _new(Episode, (task, prompt, link, turn + 1, tool_calls + calls, states, seed, ended))

    def ended_with(self, reward: float, why: str) -> Episode:
        """Return the episode with the reward in its last turn, at its end if `why` says so."""
        task, prompt, last, turn, tool_calls, states, seed, _ = self
        assert last is not None, "an episode ends after a turn"
        link = _new(TurnLink, (last.previous, last.action, last.observation, reward, last.outcome))
        return _new(Episode, (task, prompt, link, turn, tool_calls, states, seed, why))

    def render(self) -> str:
        """Return the transcript so far, for people."""
        parts = [f"[{self.task.id}]\n{self.prompt}"]
        for number, link in enumerate(self.turns, 1):
            parts.append(f"[turn {number}: {link.outcome}]\n{link.action}{link.observation}")
        if self.ended:
            assert self.last is not None
            parts.append(f"[ended: {self.ended}, reward {self.last.reward:g}]")
        return "\n".join(parts)


def turns(last: TurnLink | None) -> list[TurnLink]:
    """Return the linked turns that end in `last`, oldest first."""
    found = []
    while last is not None:
        found.append(last)
        last = last.previous
    found.reverse()
    return found


def find_task(tasks: TaskSource, options: Mapping[str, Any]) -> Task:
    """Return the task that the options of `reset` name.

    Args:
        tasks: Where to look.
        options: {"task_id": ...} or {"index": ...}.

    Raises:
        EnvError: No such task, or another option.
    """
    if len(options) != 1 or set(options) - {"task_id", "index"}:
        raise EnvError(f"options {dict(options)!r}: expected {{'task_id': ...}} or {{'index': ...}}")
    if "index" in options:
        index = options["index"]
        if not isinstance(index, SupportsIndex) or not 0 <= operator.index(index) < len(tasks):
            raise EnvError(f"task index {index!r}: expected 0 to {len(tasks) - 1}")
        return tasks[operator.index(index)]
    try:
        return tasks.by_id(options["task_id"])
    except (KeyError, DataError) as error:
        raise EnvError(f"no task {options['task_id']!r}: {error.args[0]}") from error


def draw_task(tasks: TaskSource, options: Mapping[str, Any] | None, before: int) -> tuple[Task, int]:
    """Return the task of the next episode, and that episode's seed.

    The seed follows from another one: building and forking a generator for it would cost more than the rest
    of a reset. It picks the task where the options name none; the bias is below 1e-12.

    Args:
        tasks: Where to look.
        options: As for `find_task`, or nothing.
        before: The seed of the last episode, or the one that `reset` was given.

    Raises:
        EnvError: As `find_task`.
    """
    seed = next_seed(before)
    return (find_task(tasks, options) if options else tasks[seed % len(tasks)]), seed


def begin_turn(episode: Episode | None, action: object) -> tuple[Episode, str]:
    """Return the episode and the action of a turn, bytes read as UTF-8, once it is sure that it can be taken.

    An episode that runs and a text need no call, which would cost a step more than it checks.

    Raises:
        EnvError: No episode is running, or the action is no text.
    """
    if episode is None:
        raise EnvError("step before the first reset. Fix: call reset first")
    if episode.ended:
        raise EnvError(
            f"the episode ended after turn {episode.turn} ({episode.ended}). Fix: call reset first"
        )
    if isinstance(action, bytes | bytearray):
        return episode, action.decode("utf-8", "surrogateescape")
    if not isinstance(action, str):
        raise EnvError(f"an action is the text of one turn (str), got {type(action).__name__}")
    return episode, action


def dump_episode(episode: Episode) -> dict[str, Any]:
    """Return the episode as one flat JSON object; `load_episode` is its inverse."""
    task = episode.task
    return {
        "task": {
            "id": task.id,
            "question": task.question,
            "golden_answers": list(task.golden_answers),
            "metadata": thaw(task.metadata),
        },
        "prompt": episode.prompt,
        "turns": [list(link[1:]) for link in episode.turns],
        "turn": episode.turn,
        "tool_calls": episode.tool_calls,
        "tool_states": thaw(episode.tool_states),
        "seed": episode.seed,
        "ended": episode.ended,
    }


def load_episode(data: Mapping[str, Any]) -> Episode:
    """Read what `dump_episode` wrote.

    Raises:
        SnapshotError: If a field is missing or has another shape.
    """
    try:
        task = data["task"]
        texts = [task["id"], task["question"], *task["golden_answers"], data["prompt"], data["ended"]]
        for action, observation, reward, outcome in data["turns"]:
            texts += [action, observation, outcome]
            if type(reward) not in (int, float):
                raise TypeError(f"a reward is {reward!r:.80}")
        for text in texts:
            if type(text) is not str:
                raise TypeError(f"{text!r:.80} is no text")
        for count in (data["turn"], data["tool_calls"], data["seed"]):
            if type(count) is not int or not 0 <= count < 1 << 1024:
                raise ValueError(f"{count!r:.80} is no count")
        if not isinstance(data["tool_states"], dict):
            raise TypeError(f"tool_states is {data['tool_states']!r:.80}")
        return Episode(
            task=Task(
                id=task["id"],
                question=task["question"],
                golden_answers=tuple(task["golden_answers"]),
                metadata=FrozenDict(task["metadata"]),
            ),
            prompt=data["prompt"],
            last=_link_turns(data["turns"]),
            turn=data["turn"],
            tool_calls=data["tool_calls"],
            tool_states=freeze(data["tool_states"]),
            seed=data["seed"],
            ended=data["ended"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise SnapshotError(
            f"This is not an episode: {type(error).__name__}: {error}. Expected what dump_episode writes"
        ) from error


def _link_turns(rows: list[Any]) -> TurnLink | None:
    """Link (action, observation, reward, outcome) rows, oldest first."""
    last = None
    for action, observation, reward, outcome in rows:
        last = TurnLink(last, action, observation, reward, outcome)
    return last
