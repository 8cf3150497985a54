"""Steps many text environments concurrently; each fails for itself.

Steps of tool environments wait (for retrieval servers, sandboxes, models), so each episode has a thread.
Gymnasium's `AsyncVectorEnv` has a process for each instead, which loads data and index again. It refuses our
texts in its shared memory, so it needs `shared_memory=False`, and one failing episode ends all.

The error model: an exception in one environment (a bug in a tool, say, or `sys.exit`) ends that episode and
no other. It is recorded in `infos["error"]` and `infos["traceback"]`, the episode is truncated, and the next
reset begins a new one. A reset raises only if every environment fails in it, as with a wrong option.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.wrappers import TimeLimit

from at2po_env.episodes.infos import Infos, add_info
from at2po_env.errors import EnvError
from at2po_env.forking.capture import clone_space
from at2po_env.spaces import Text

Env = gymnasium.Env[str, str]
Texts = tuple[str, ...]
Flags = npt.NDArray[np.bool_]
Rewards = npt.NDArray[np.float64]
MAX_WORKERS = 64


class Outcome(NamedTuple):
    """The result of one call of one environment."""

    observation: str
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    info: dict[str, Any] = {}  # noqa: RUF012  (never changed)
    ended: bool = False
    error: Exception | None = None


class TextVectorEnv(VectorEnv[Texts, Sequence[str], npt.NDArray[Any]]):
    """Steps many text environments concurrently; observations and actions are tuples of `str`.

    Args:
        env_fns: One function per environment that builds it.
        max_workers: Threads; 0 steps the environments one after the other in the caller's thread. Default:
            one per environment, at most 64.
        autoreset_mode: An ended episode begins anew, as in Gymnasium, at the next step (default), in the same
            step (its last observation and info are then in `infos["final_obs"]` and `infos["final_info"]`),
            or never by itself.

    Raises:
        EnvError: If no environment is given, or one is no text environment.

    Example:
        >>> from at2po_env.contract.testing import PigEnv
        >>> envs = TextVectorEnv([PigEnv, PigEnv])
        >>> observations, infos = envs.reset(seed=1)
        >>> envs.step(["roll", "hold"])[0]
        ('You rolled 3 and have 3 points.', 'You hold 0 points.')
        >>> envs.close()
    """

    def __init__(
        self,
        env_fns: Iterable[Callable[[], Env]],
        *,
        max_workers: int | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
    ) -> None:
        try:
            self.autoreset_mode = AutoresetMode(autoreset_mode)
        except ValueError:
            known = [member.value for member in AutoresetMode]
            raise EnvError(
                f"autoreset_mode is {autoreset_mode!r}. Expected an AutoresetMode or one of {known}"
            ) from None
        self.envs: tuple[Env, ...] = tuple([build() for build in env_fns])
        self.num_envs = len(self.envs)
        if not self.envs:
            raise EnvError("TextVectorEnv got no environment. Expected at least one function in env_fns")
        for number, env in enumerate(self.envs):
            for space in (env.observation_space, env.action_space):
                if not isinstance(space, Text | gymnasium.spaces.Text):
                    raise EnvError(
                        f"Environment {number} has the space {space}. Expected text; for others use "
                        "gymnasium.vector.SyncVectorEnv"
                    )
        first = self.envs[0]
        self.metadata = {**first.metadata, "autoreset_mode": self.autoreset_mode}
        self.render_mode = first.render_mode
        self.single_observation_space = first.observation_space
        self.single_action_space = first.action_space
        self.observation_space = gymnasium.spaces.Tuple(
            [clone_space(env.observation_space) for env in self.envs]
        )
        self.action_space = gymnasium.spaces.Tuple([clone_space(env.action_space) for env in self.envs])
        self._observations = [""] * self.num_envs
        self._ended = np.zeros(self.num_envs, dtype=np.bool_)
        self._begun = np.zeros(self.num_envs, dtype=np.bool_)
        workers = min(self.num_envs, MAX_WORKERS) if max_workers is None else max_workers
        self._pool = ThreadPoolExecutor(workers, "at2po-env") if workers > 0 else None

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Texts, Infos]:
        """Begin new episodes.

        Args:
            seed: One seed per environment, or the first of consecutive ones.
            options: Options of every reset. Two keys are for this class: `reset_mask`, a boolean array that
                selects the environments that begin anew, and `per_env`, one dict of options per environment.

        Returns:
            The observations (of environments that the mask leaves out: the last ones), and the infos.

        Raises:
            EnvError: If an argument has the wrong length.
            Exception: If every environment raises: the first one's error.
        """
        if seed is None or isinstance(seed, int):
            seeds: list[int | None] = [
                None if seed is None else seed + number for number in range(self.num_envs)
            ]
        else:
            seeds = list(seed)
        if len(seeds) != self.num_envs:
            raise EnvError(f"Expected {self.num_envs} seeds, one per environment, got {len(seeds)}")
        per_env, mask = _split_options(options, self.num_envs)
        numbers = np.flatnonzero(mask).tolist()
        outcomes = self._map(lambda number: self._reset_one(number, seeds[number], per_env[number]), numbers)
        errors = [outcome.error for outcome in outcomes if outcome.error is not None]
        if len(errors) == len(outcomes):
            raise errors[0]
        self._begun[numbers] = True
        infos = self._record(numbers, outcomes)
        return tuple(self._observations), infos

    def step(self, actions: Sequence[str]) -> tuple[Texts, Rewards, Flags, Flags, Infos]:
        """Take one turn in every environment, concurrently.

        Args:
            actions: One text per environment; unused where an ended episode begins anew.

        Returns:
            Observations, rewards, terminated, truncated, infos. An environment that raised has the
            observation "", is truncated, and has the reason in `infos["error"]`.

        Raises:
            EnvError: If the number of actions is wrong, an environment was never reset, or one has ended and
                `autoreset_mode` is DISABLED.
        """
        if isinstance(actions, str) or len(actions) != self.num_envs:
            raise EnvError(f"Expected {self.num_envs} actions, one per environment, got {actions!r:.200}")
        if not self._begun.all():
            raise EnvError(f"Environments {np.flatnonzero(~self._begun)} were never reset. Fix: call reset")
        if self.autoreset_mode is AutoresetMode.DISABLED and self._ended.any():
            raise EnvError(
                f"Environments {np.flatnonzero(self._ended)} have ended and autoreset is disabled. Fix: "
                'reset(options={"reset_mask": terminated | truncated})'
            )
        numbers = list(range(self.num_envs))
        outcomes = self._map(lambda number: self._advance(number, actions[number]), numbers)
        infos = self._record(numbers, outcomes)
        rewards = np.array([outcome.reward for outcome in outcomes], dtype=np.float64)
        terminated = np.array([outcome.terminated for outcome in outcomes], dtype=np.bool_)
        truncated = np.array([outcome.truncated for outcome in outcomes], dtype=np.bool_)
        return tuple(self._observations), rewards, terminated, truncated, infos

    def _map(self, call: Callable[[int], Outcome], numbers: Sequence[int]) -> list[Outcome]:
        if self._pool is None or len(numbers) == 1:
            return [call(number) for number in numbers]
        return list(self._pool.map(call, numbers))

    def _advance(self, number: int, action: str) -> Outcome:
        """Step one environment, or begin anew where its episode has ended."""
        if self._ended[number]:
            return self._reset_one(number)
        try:
            observation, reward, terminated, truncated, info = self.envs[number].step(action)
            ended = bool(terminated or truncated)
            outcome = Outcome(observation, float(reward), terminated, truncated, info, ended=ended)
        except (Exception, SystemExit) as error:  # noqa: BLE001  (the boundary between episodes)
            outcome = _failed(error)
        if not outcome.ended or self.autoreset_mode is not AutoresetMode.SAME_STEP:
            return outcome
        begun = self._reset_one(number)
        final = {"final_obs": outcome.observation, "final_info": outcome.info}
        return outcome._replace(
            observation=begun.observation, info={**begun.info, **final}, ended=begun.ended, error=begun.error
        )

    def _reset_one(self, number: int, seed: int | None = None, options: Any = None) -> Outcome:
        try:
            observation, info = self.envs[number].reset(seed=seed, options=options)
            return Outcome(observation, info=info)
        except (Exception, SystemExit) as error:  # noqa: BLE001  (the boundary between episodes)
            return _failed(error)

    def _record(self, numbers: Sequence[int], outcomes: Sequence[Outcome]) -> Infos:
        infos: Infos = {}
        for number, outcome in zip(numbers, outcomes, strict=True):
            self._observations[number] = outcome.observation
            self._ended[number] = outcome.ended
            add_info(infos, outcome.info, number, self.num_envs)
        return infos

    def render(self) -> tuple[Any, ...]:
        """Render every environment."""
        return tuple([env.render() for env in self.envs])

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Call a method of every environment, or read an attribute, through its wrappers."""
        return tuple([item(*args, **kwargs) if callable(item) else item for item in self.get_attr(name)])

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """Read an attribute of every environment, through its wrappers."""
        return tuple([env.get_wrapper_attr(name) for env in self.envs])

    @property
    def np_random_seed(self) -> Any:
        """The seeds of all environments."""
        return self.get_attr("np_random_seed")

    @property  # type: ignore[misc]
    def np_random(self) -> Any:
        """The generators of all environments."""
        return self.get_attr("np_random")

    def close_extras(self, **_: Any) -> None:
        """Close every environment and end the threads, even if one refuses."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
        errors = []
        for env in self.envs:
            try:
                env.close()
            except Exception as error:  # noqa: BLE001  (the others must be closed too)
                errors.append(error)
        if errors:
            raise errors[0]


def make_vector(
    make: Callable[..., Env],
    *,
    num_envs: int = 1,
    max_workers: int | None = None,
    autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
    max_episode_steps: int | None = None,
    **options: Any,
) -> TextVectorEnv:
    """Build many environments alike; a `vector_entry_point` calls it.

    Args:
        make: Builds one environment from `options`.
        num_envs: Number of environments.
        max_workers: Threads, see `TextVectorEnv`.
        autoreset_mode: See `TextVectorEnv`.
        max_episode_steps: Truncates each episode after so many steps.
        **options: Arguments of `make`.
    """

    def build() -> Env:
        env = make(**options)
        return env if max_episode_steps is None else TimeLimit(env, max_episode_steps)

    return TextVectorEnv([build] * num_envs, max_workers=max_workers, autoreset_mode=autoreset_mode)


def _failed(error: Exception | SystemExit) -> Outcome:
    if isinstance(error, SystemExit):
        exit_code, cause = error.code, error
        error = EnvError(f"the environment called sys.exit({exit_code!r})")
        error.__cause__ = cause
    info = {
        "error": f"{type(error).__name__}: {error}",
        "traceback": "".join(traceback.format_exception(error)),
    }
    return Outcome("", truncated=True, info=info, ended=True, error=error)


def _split_options(options: dict[str, Any] | None, count: int) -> tuple[list[dict[str, Any] | None], Flags]:
    """Return the options of each environment, and the mask of those that begin anew."""
    common = dict(options or {})
    mask = np.asarray(common.pop("reset_mask", np.ones(count, np.bool_)))
    per_env = common.pop("per_env", None) or [None] * count
    if mask.dtype != np.bool_ or mask.shape != (count,) or not mask.any():
        raise EnvError(
            f"options['reset_mask'] must be a boolean array of shape ({count},) with a True in it, got {mask}"
        )
    if len(per_env) != count:
        raise EnvError(f"options['per_env'] must have {count} entries, got {len(per_env)}")
    return [{**common, **(own or {})} or None for own in per_env], mask
