"""Makes the environments of a configuration through the Gymnasium registry, and orders their questions.

The figures that environments count while they work (`EnvCounters`) pass through here, so that the trainer
need not know what there is to count.
"""

from collections.abc import Mapping, Sized
from typing import Any

import gymnasium
import gymnasium.error
import numpy as np

import at2po_env  # noqa: F401  registers the shipped ids
from at2po_agent.config.sections import Config
from at2po_agent.rollout import Options
from at2po_env.errors import ConfigError
from at2po_env.retrieval.counters import counted

Env = gymnasium.Env[str, str]


def make_training_env(config: Config) -> Env:
    """Make the environment that is trained on."""
    return _make(config, "env", config.env.id, config.env.kwargs)


def make_eval_env(config: Config) -> Env:
    """Make the environment of the evaluation: other questions, often another world."""
    kwargs = {**config.env.kwargs, **config.eval.kwargs}
    return _make(config, "eval", config.eval.id or config.env.id, kwargs)


def make_cold_start_env(config: Config) -> Env:
    """Make the environment that the demonstrations are recorded in."""
    kwargs = {**config.env.kwargs, **config.cold_start.env_kwargs}
    return _make(config, "cold_start", config.env.id, kwargs)


def number_of_tasks(env: Env) -> int | None:
    """How many questions the environment offers by index; None where it draws them by seed."""
    tasks = env.get_wrapper_attr("tasks") if env.has_wrapper_attr("tasks") else None
    return len(tasks) if isinstance(tasks, Sized) else None


def first_tasks(env: Env, count: int) -> list[Options]:
    """Reset options of the first `count` questions, fewer where there are fewer."""
    available = number_of_tasks(env)
    if available is None:
        return [None] * count
    return [{"index": index} for index in range(min(count, available))]


class TaskOrder:
    """Questions in a random order that is drawn anew for every pass over them.

    The order is a function of the seed alone, so a position in it is all that a checkpoint has to keep.
    """

    def __init__(self, count: int | None, seed: int) -> None:
        self._count = count
        self._seed = seed
        self._epoch = -1
        self._permutation = np.zeros(0, dtype=np.int64)

    def options(self, start: int, count: int) -> list[Options]:
        """Reset options of `count` questions from position `start` of the endless order."""
        if self._count is None:
            return [None] * count
        options: list[Options] = []
        for position in range(start, start + count):
            epoch, index = divmod(position, self._count)
            if epoch != self._epoch:
                sequence = np.random.SeedSequence(self._seed, spawn_key=(epoch,))
                self._permutation = np.random.default_rng(sequence).permutation(self._count)
                self._epoch = epoch
            options.append({"index": int(self._permutation[index])})
        return options


class EnvCounters:
    """Counts what happens in the environments of this process from now on."""

    def __init__(self) -> None:
        self._before = counted()

    def counts(self) -> dict[str, int]:
        """Each count that rose since then; the names are listed in `at2po_env.retrieval.counters`."""
        rose = {name: count - self._before.get(name, 0) for name, count in sorted(counted().items())}
        return {name: count for name, count in rose.items() if count}

    def figures(self) -> dict[str, float]:
        """The counts under `retrieval/`, for metrics.

        Failures are given whenever something was counted, and cache_hit_rate where a cache was asked. Empty
        where nothing was counted, as with a retriever in this process and no cache.
        """
        figures: dict[str, float] = dict(self.counts())
        figures.pop("tool_failures", None)  # not of retrieval alone; `health` reads it
        if not figures:
            return {}
        figures.setdefault("failures", 0)
        asked = figures.get("cache_hits", 0) + figures.get("cache_misses", 0)
        if asked:
            figures["cache_hit_rate"] = figures.get("cache_hits", 0) / asked
        return {f"retrieval/{name}": value for name, value in figures.items()}


def _make(config: Config, section: str, env_id: str, kwargs: Mapping[str, Any]) -> Env:
    data = {key: value for key, value in (("dataset", config.dataset), ("corpus", config.corpus)) if value}
    try:
        env: Env = gymnasium.make(env_id, disable_env_checker=True, **{**data, **kwargs})
    except gymnasium.error.UnregisteredEnv as error:
        raise ConfigError(f"{section}.id: {error}; `at2po envs` lists what there is") from error
    except TypeError as error:
        raise ConfigError(f"{section}.kwargs: {env_id} refuses {dict(kwargs)!r}: {error}") from error
    if number_of_tasks(env) == 0:
        raise ConfigError(f"{section}: {env_id} has no questions")
    return env
