"""Makes a foreign environment forkable by playing its actions again.

Such an environment cannot hand out its state, but a deterministic one can be brought to the same state: reset
another instance with the same seed and options, and repeat the actions. The state is then the seed, the
options and the actions, all of it JSON. Beside every action stands a digest of what the environment answered,
and a replay that is answered differently is an error that names the step.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Self

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec

from at2po_env.errors import EnvError, SnapshotError
from at2po_env.forking.base import ForkableEnv
from at2po_env.forking.capture import clone_space
from at2po_env.forking.layers import name_of
from at2po_env.forking.random_state import next_seed
from at2po_env.forking.wrapper_state import read_data, write_data
from at2po_env.spaces import Text


class Answer(NamedTuple):
    """What the environment answered in one step, short.

    Attributes:
        observation: Digest of the observation.
        reward: The reward; 0.0 at reset.
        terminated: As returned.
        truncated: As returned.
    """

    observation: str
    reward: float
    terminated: bool
    truncated: bool


class Played(NamedTuple):
    """An episode so far; as immutable as the texts it is made of.

    Attributes:
        env: Which environment it is, so that no other takes it up.
        seed: Seed of the reset.
        options: Options of the reset, as JSON.
        first: The answer to the reset.
        turns: (action as JSON, answer) of every step.
    """

    env: str
    seed: int
    options: str
    first: Answer
    turns: tuple[tuple[str, Answer], ...] = ()


class Replay(ForkableEnv):
    """A deterministic environment of anybody, as a `ForkableEnv`.

    Taking a snapshot, restoring and forking cost microseconds; the first `step` or `render` after a restore,
    or in a fork, repeats the episode's actions in an instance of its own. Infos are passed on, and compared
    where `info_keys` says so.

    Any object with Gymnasium's `reset` and `step` will do. Without spaces it counts as one of text, and
    `reset` is given a seed and options only if it takes them.

    Args:
        make: An id, a spec, a function that builds the environment, or an environment that has a spec.
        own_random: Give the environment its own state of Python's and NumPy's global generators, apart from
            the program's and other instances'. Needed if it draws from them, as GEM's do.
        info_keys: Keys of the infos that are compared like observations; GEM's games show their board in
            the info `suffix`.
        **kwargs: Arguments for `gymnasium.make`, with an id or a spec.

    Raises:
        EnvError: No environment can be built from `make`.

    Example:
        >>> from at2po_env import fork
        >>> env = Replay("FrozenLake-v1")
        >>> env.reset(seed=1)[0]
        0
        >>> env.step(2)[0]
        0
        >>> child = fork(env)
        >>> [env.step(2)[0] for _ in range(3)] == [child.step(2)[0] for _ in range(3)]
        True
    """

    metadata: dict[str, Any] = {"render_modes": ["human", "rgb_array", "ansi"]}  # noqa: RUF012 - Gymnasium declares it so

    def __init__(
        self,
        make: str | EnvSpec | Callable[[], Any] | gymnasium.Env[Any, Any],
        *,
        own_random: bool = False,
        info_keys: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        self._live: Any = None
        self._at: Played | None = None
        if isinstance(make, gymnasium.Env):
            if make.spec is None:
                raise EnvError(
                    f"Replay cannot build another {make}: it has no spec. Fix: pass a function that builds it"
                )
            self._live, make = make, make.spec
        if isinstance(make, str | EnvSpec):
            self._make: Callable[[], Any] = partial(gymnasium.make, make, **kwargs)
        elif callable(make) and not kwargs:
            self._make = make
        else:
            raise EnvError(
                f"Replay got {make!r:.80}. Expected an id, a spec or a function, the first two with kwargs"
            )
        self._own_random = own_random
        self._info_keys = tuple(info_keys)
        self._globals: Any = None
        live = self._live = self._live or self._build()
        inner = getattr(live, "unwrapped", live)
        self.name = live.spec.id if getattr(live, "spec", None) is not None else name_of(type(inner))
        self.action_space = getattr(live, "action_space", None) or Text()
        self.observation_space = getattr(live, "observation_space", None) or Text()
        self.render_mode = getattr(live, "render_mode", None)
        shown = [] if self.render_mode is None else [self.render_mode]  # it was built for this mode alone
        self.metadata = {**(getattr(live, "metadata", None) or {}), "render_modes": shown}
        taken = inspect.signature(live.reset).parameters
        anything = any(each.kind is each.VAR_KEYWORD for each in taken.values())
        self._takes = frozenset(name for name in ("seed", "options") if anything or name in taken)
        self._played: Played | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode, always with a seed: the one given, or one that follows from the last one."""
        super().reset(seed=seed)
        if seed is None:
            before = self._played.seed if self._played is not None else self._np_random_seed
            seed = next_seed(before or 0) % 2**31
        written = _write(options or None, "options")
        observation, info = self._begin(seed, written)
        self._played = self._at = Played(self.name, seed, written, self._answer(observation, info))
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Take one step; after a restore, or in a fork, the steps before it are repeated first.

        Raises:
            EnvError: No episode is running.
            SnapshotError: The environment did not answer the repeated steps as it did before.
        """
        self.replay()
        played = self._played
        last = played.turns[-1][1] if played is not None and played.turns else None
        if played is None or (last is not None and (last.terminated or last.truncated)):
            raise EnvError("step without a running episode. Fix: call reset first")
        written = _write(action, "the action")
        self._at = None  # wherever an exception leaves the instance
        observation, reward, terminated, truncated, info = self._take(action)
        answer = self._answer(observation, info, reward, terminated, truncated)
        self._played = self._at = played._replace(turns=(*played.turns, (written, answer)))
        return observation, reward, terminated, truncated, info

    def replay(self) -> None:
        """Bring the environment underneath to the present state now, and not at the next step.

        Raises:
            SnapshotError: It answers differently than before; names the step.
        """
        goal, at = self._played, self._at
        if goal is None or goal is at:
            return
        self._at = None
        same = at is not None and at[:4] == goal[:4] and goal.turns[: len(at.turns)] == at.turns
        done = len(at.turns) if same and at is not None else 0
        if not same:
            self._compare(0, goal.first, self._answer(*self._begin(goal.seed, goal.options)))
        for number, (written, expected) in enumerate(goal.turns[done:], done + 1):
            observation, *ends, info = self._take(read_data(json.loads(written)))
            self._compare(number, expected, self._answer(observation, info, *ends))
        self._at = goal

    def render(self) -> Any:
        """Render the environment underneath, in the present state."""
        self.replay()
        return self._live.render()

    def close(self) -> None:
        """Close the environment underneath; forks have their own."""
        if self._live is not None and hasattr(self._live, "close"):
            self._live.close()
        self._live = self._at = self._globals = None

    def example_actions(self) -> Sequence[Any]:
        """Return eight samples of the action space, always the same."""
        space = clone_space(self.action_space)
        space.seed(0)
        return [space.sample() for _ in range(8)]

    def get_state(self) -> Played | None:
        """Return the episode; None before the first reset."""
        return self._played

    def set_state(self, state: Played | None) -> None:
        """Continue an episode, at the next step."""
        if state is not None and state.env != self.name:
            raise SnapshotError(f"The snapshot is of {state.env!r} and this is a Replay of {self.name!r}")
        self._played = state

    def dump_state(self, state: Played | None) -> Any:
        """Return the environment's name, the seed, the options, and the actions with the answers."""
        if state is None:
            return None
        turns = [[json.loads(action), *answer] for action, answer in state.turns]
        options = json.loads(state.options)
        first = state.first.observation
        return {"env": state.env, "seed": state.seed, "options": options, "first": first, "turns": turns}

    def load_state(self, data: Any) -> Played | None:
        """Return the state that `dump_state` wrote."""
        if data is None:
            return None
        if data["env"] != self.name:
            raise SnapshotError(f"The snapshot is of {data['env']!r} and this is a Replay of {self.name!r}")
        seed, first = data["seed"], data["first"]
        if type(seed) is not int or not 0 <= seed < 1 << 128 or type(first) is not str:
            raise ValueError(f"a seed and a digest are expected, got {seed!r:.80} and {first!r:.80}")
        options = read_data(data["options"])
        if not (options is None or isinstance(options, dict)):
            raise ValueError(f"options are an object or null, got {options!r:.80}")
        turns = []
        for action, observation, reward, terminated, truncated in data["turns"]:
            if not self.action_space.contains(read_data(action)):
                raise ValueError(f"the action {action!r:.80} does not lie in the action space")
            answer = Answer(observation, reward, terminated, truncated)
            if [type(item) for item in answer] != [str, float, bool, bool]:
                raise ValueError(f"{answer!r:.80} is no answer")
            turns.append((json.dumps(action), answer))
        begun = Answer(first, 0.0, terminated=False, truncated=False)
        return Played(self.name, seed, json.dumps(data["options"]), begun, tuple(turns))

    def _fork(self) -> Self:
        twin = super()._fork()
        twin._live = twin._at = twin._globals = None
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_live": None, "_at": None, "_globals": None}

    def _build(self) -> Any:
        env = self._make()
        if not (callable(getattr(env, "reset", None)) and callable(getattr(env, "step", None))):
            raise EnvError(f"Replay's function returned {env!r:.80}. Expected an object with reset and step")
        return env

    def _begin(self, seed: int, options: str) -> tuple[Any, dict[str, Any]]:
        """Reset the instance, which is built if there is none."""
        self._at = None
        given = {"seed": seed, "options": read_data(json.loads(options))}
        with self._apart(seed):
            if self._live is None:
                self._live = self._build()
            observation, info = self._live.reset(**{name: given[name] for name in self._takes})
        return observation, info

    def _take(self, action: Any) -> Any:
        with self._apart(None):
            result = self._live.step(action)
        if not isinstance(result, tuple) or len(result) != 5:
            raise EnvError(
                f"{self.name}.step returned {result!r:.80}. Expected observation, reward, terminated, "
                "truncated and info. Fix: adapt the environment to Gymnasium's interface first"
            )
        return result

    @contextmanager
    def _apart(self, seed: int | None) -> Iterator[None]:
        """Let the environment have the global generators to itself, from a seed or where it left them."""
        if not self._own_random:
            yield
            return
        ours = random.getstate(), np.random.get_state()  # noqa: NPY002 - the environment uses them
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
        else:
            random.setstate(self._globals[0])
            np.random.set_state(self._globals[1])  # noqa: NPY002
        try:
            yield
        finally:
            self._globals = random.getstate(), np.random.get_state()  # noqa: NPY002
            random.setstate(ours[0])
            np.random.set_state(ours[1])  # noqa: NPY002

    def _answer(
        self,
        observation: Any,
        info: Mapping[str, Any],
        reward: Any = 0.0,
        terminated: Any = False,
        truncated: Any = False,
    ) -> Answer:
        """Return the short form of an answer."""
        seen = observation
        if self._info_keys:
            seen = (observation, {key: info.get(key) for key in self._info_keys})
        try:
            text = json.dumps(write_data(_plain(seen)), sort_keys=True)
        except (TypeError, ValueError) as error:
            raise EnvError(f"Replay cannot compare observations: {error}") from error
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return Answer(digest, float(reward), bool(terminated), bool(truncated))

    def _compare(self, step: int, expected: Answer, actual: Answer) -> None:
        """Raise at the first field that differs."""
        for name, one, other in zip(Answer._fields, expected, actual, strict=True):
            if repr(one) != repr(other):  # NaN equals NaN
                values = "" if name == "observation" else f" ({other} instead of {one})"
                where = f"step {step}" if step else "the reset"
                raise SnapshotError(
                    f"{self.name} is not deterministic: when the episode was played again, {where} gave "
                    f"another {name}{values}. Likely cause: randomness that reset(seed=...) does not set, a "
                    "clock, or another version than the one captured. Fix: seed all of it (own_random=True "
                    "if it draws from Python's or NumPy's global generators)"
                )


def _write(value: Any, what: str) -> str:
    """Return an action or options as JSON."""
    try:
        return json.dumps(write_data(value))
    except (TypeError, ValueError) as error:
        raise EnvError(f"Replay cannot keep {what}: {error}") from error


def _plain(value: Any) -> Any:
    """Return subclasses of dict and tuple (ordered dicts, named tuples) as plain ones."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    return [_plain(item) for item in value] if isinstance(value, list) else value
