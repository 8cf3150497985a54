"""Steps of environments: quick ones in the caller's thread, slow ones in a pool of threads.

The errors that live here: whatever an environment raises from `step`, and a step past its deadline, is data,
recorded as the outcome of its branch. Everything else that goes wrong is a bug, and stays an exception.
"""

import time
import traceback
from collections.abc import Mapping
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import gymnasium

from at2po_env import Snapshot, snapshot
from at2po_env.deadlines import Workers

Env = gymnasium.Env[str, str]
KeyT = TypeVar("KeyT")

_FREE_S = 0.02  # what steps may cost in line before they are called slow ...
_QUICK_S = 5e-4  # ... and for each further step: about what a thread costs
_GRACE_S = 5.0  # how long a rollout that is given up waits for the steps under way


class Stepped(NamedTuple):
    """What one step of an environment gave.

    Attributes:
        observation: What it newly shows.
        reward: Of this step.
        terminated: End of the task.
        truncated: Outer limit.
        info: As returned.
        state: The environment after the step; None where the episode ended.
        fault: Why there is nothing of all this; empty otherwise.
        traceback: Of the exception that is the fault; empty otherwise.
        late: Whether the fault is that the step was not back in time.
        seconds: How long it took.
    """

    observation: str = ""
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    info: Mapping[str, Any] = {}
    state: Snapshot | None = None
    fault: str = ""
    traceback: str = ""
    late: bool = False
    seconds: float = 0.0


def take_step(env: Env, action: str) -> Stepped:
    """Step an environment, and note where it stands then."""
    start = time.perf_counter()
    try:
        observation, reward, terminated, truncated, info = env.step(action)
    except (Exception, SystemExit) as error:  # noqa: BLE001  a foreign environment's failure is data
        seconds = time.perf_counter() - start
        return Stepped(
            fault=f"{type(error).__name__}: {error}", traceback=traceback.format_exc(), seconds=seconds
        )
    ended = bool(terminated or truncated)
    state = None if ended else snapshot(env)
    return Stepped(
        observation,
        float(reward),
        bool(terminated),
        bool(truncated),
        info,
        state=state,
        seconds=time.perf_counter() - start,
    )


class Steps(Generic[KeyT]):
    """Takes steps for branches and says when they are done.

    Without a deadline steps are taken in the caller's thread for as long as they are quick: threads are for
    environments that make one wait.

    Args:
        workers: Most threads; 0 takes every step in the caller's thread.
        deadline_s: Seconds after which a step is given up; None waits for ever.
        owner: The environment whose forks are stepped: hung steps are bounded for each owner. Default: these
            steps alone.

    Attributes:
        seconds: Time spent in steps, over all threads.
        inline_seconds: The part of it that was spent in the caller's thread.
    """

    def __init__(self, workers: int, deadline_s: float | None, *, owner: object = None) -> None:
        self._workers: Workers[KeyT, Stepped] | None = (
            Workers(workers, deadline_s=deadline_s, owner=owner, name="at2po-step") if workers else None
        )
        self._deadline_s = deadline_s
        self._done: list[tuple[KeyT, Stepped]] = []
        self._allowed = _FREE_S
        self.seconds = self.inline_seconds = 0.0

    @property
    def pending(self) -> int:
        """Steps begun and not collected."""
        return len(self._done) + (0 if self._workers is None else self._workers.pending)

    def begin(self, key: KeyT, env: Env, action: str) -> None:
        """Take a step; `collect` will return its key. The environment is not to be touched until then."""
        if self._workers is None or self._is_quick():
            stepped = take_step(env, action)
            self.inline_seconds += stepped.seconds
            self._allowed += _QUICK_S
            self._done.append((key, stepped))
        else:
            self._workers.submit(key, partial(take_step, env, action))

    def collect(self, wait_s: float = 0.0) -> list[tuple[KeyT, Stepped]]:
        """Steps that were taken since the last call.

        Args:
            wait_s: Seconds to sleep until there is one, at most; `inf` until there is.
        """
        done, self._done = self._done, []
        if self._workers is not None and self._workers.pending:
            finished = self._workers.collect(0.0 if done else wait_s)
            done += [(key, self._late() if stepped is None else stepped) for key, stepped in finished]
        self.seconds += sum(stepped.seconds for _, stepped in done)
        return done

    def close(self) -> None:
        """End the threads; a step under way is waited for a few seconds, and then left alone."""
        if self._workers is not None:
            self._workers.close(_GRACE_S)

    def _is_quick(self) -> bool:
        return self._deadline_s is None and self.inline_seconds <= self._allowed

    def _late(self) -> Stepped:
        fault = f"not back after tool_deadline_s = {self._deadline_s:g} s"
        return Stepped(fault=fault, late=True, seconds=self._deadline_s or 0.0)
