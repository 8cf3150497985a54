"""Makes the environments of a configuration through the Gymnasium registry, and shares out their questions.

The figures that environments count while they work (`EnvCounters`) pass through here, so that the trainer
need not know what there is to count.
"""

import hashlib
from collections.abc import Mapping, Sequence, Sized
from typing import Any, NamedTuple

import gymnasium
import gymnasium.error
import numpy as np

import at2po_env  # noqa: F401  registers the shipped ids
from at2po_agent.config.sections import Config
from at2po_agent.rollout import Options
from at2po_env.errors import At2poError, ConfigError
from at2po_env.retrieval.counters import counted

Env = gymnasium.Env[str, str]


def make_training_env(config: Config) -> Env:
    """Make the environment that is trained on."""
    return _make(config, "env", config.env.id, config.env.kwargs)


def make_eval_env(config: Config) -> Env:
    """Make the environment of the evaluation: other questions, often another world.

    Where nothing names a split and the environment has several of its own (`ToolEnv.splits`), its test split
    is taken, else its dev split, else its last one.
    """
    kwargs = {**config.env.kwargs, **config.eval.kwargs}
    env_id = config.eval.id or config.env.id
    env = _make(config, "eval", env_id, kwargs)
    splits = env.get_wrapper_attr("splits") if env.has_wrapper_attr("splits") else ()
    if splits and "split" not in kwargs:
        split = next((name for name in ("test", "dev") if name in splits), splits[-1])
        env = _make(config, "eval", env_id, {**kwargs, "split": split})
    return env


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


class TaskSplit(NamedTuple):
    """The questions that a run trains on, and those that its evaluations ask.

    Attributes:
        training: Indices of the questions that are trained on; None where the environment draws them by seed.
        evaluation: Reset options of the questions that evaluations ask, in order.
        seen: How many of these are trained on, too; None where it cannot be told, because an environment
            draws its questions by seed.
        held_out: How many questions of the training environment are kept from training.
    """

    training: Sequence[int] | None
    evaluation: list[Options]
    seen: int | None
    held_out: int = 0


def split_tasks(config: Config, env: Env | None, eval_env: Env) -> TaskSplit:
    """Share out the questions between training and evaluation.

    Where both have the same questions, a share of them (`env.held_out`) is kept for evaluation. A hash of its
    id decides about each, so a question stays on its side when others are added.

    Args:
        config: How many questions an evaluation asks, and the share that is held out.
        env: The environment that is trained on; None where it cannot be made, and nothing is known of it.
        eval_env: The environment of evaluations.
    """
    asked = first_tasks(eval_env, config.eval.questions)
    available, trained = number_of_tasks(eval_env), None if env is None else number_of_tasks(env)
    if env is None or trained is None:
        return TaskSplit(None, asked, None)
    if available is None:
        return TaskSplit(range(trained), asked, None)
    seen = sum(_has_task(env, eval_env, index) for index in range(len(asked)))
    share = config.env.held_out
    if not share or not asked or seen < len(asked) or trained != available or trained == 1:
        return TaskSplit(range(trained), asked, seen)
    # Training and evaluation have the same questions, so some are taken from training: those below the share,
    # or the lowest one where so few questions have none.
    places = [_place(_task_id(env, index)) for index in range(trained)]
    share = min(max(share, min(places)), max(places) - 1e-12)
    kept = [index for index in range(trained) if places[index] <= share]
    training = [index for index in range(trained) if places[index] > share]
    return TaskSplit(training, [{"index": index} for index in kept[: config.eval.questions]], 0, len(kept))


class TaskOrder:
    """Questions in a random order that is drawn anew for every pass over them.

    The order is a function of the seed alone, so a position in it is all that a checkpoint has to keep.

    Args:
        indices: The questions; None where the environment draws them by seed.
        seed: Decides the order.
    """

    def __init__(self, indices: Sequence[int] | None, seed: int) -> None:
        self._indices = indices
        self._seed = seed
        self._epoch = -1
        self._permutation = np.zeros(0, dtype=np.int64)

    def options(self, start: int, count: int) -> list[Options]:
        """Reset options of `count` questions from position `start` of the endless order."""
        if self._indices is None:
            return [None] * count
        options: list[Options] = []
        for position in range(start, start + count):
            epoch, index = divmod(position, len(self._indices))
            if epoch != self._epoch:
                sequence = np.random.SeedSequence(self._seed, spawn_key=(epoch,))
                self._permutation = np.random.default_rng(sequence).permutation(len(self._indices))
                self._epoch = epoch
            options.append({"index": self._indices[int(self._permutation[index])]})
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
    except gymnasium.error.Error as error:
        raise ConfigError(f"{section}.id: {error}; `at2po envs` lists what there is") from error
    except ModuleNotFoundError as error:
        if not isinstance(error.__cause__, ModuleNotFoundError):
            raise  # of the environment; that of the import of an id's module has a cause
        raise ConfigError(
            f"{section}.id: got {env_id!r}, but {error.__cause__}. Fix: install it, or set PYTHONPATH to the "
            "folder that holds it"
        ) from error
    except TypeError as error:
        raise ConfigError(f"{section}.kwargs: {env_id} refuses {dict(kwargs)!r}: {error}") from error
    if number_of_tasks(env) == 0:
        raise ConfigError(f"{section}: {env_id} has no questions")
    return env


def _task(env: Env, index: int) -> Any:
    return env.get_wrapper_attr("tasks")[index]


def _task_id(env: Env, index: int) -> str:
    """The id of a question; its index where the environment has no ids, as a served one."""
    return str(getattr(_task(env, index), "id", index))


def _has_task(env: Env, other: Env, index: int) -> bool:
    """Tell whether an environment has the question that another one has at `index`."""
    tasks, task = env.get_wrapper_attr("tasks"), _task(other, index)
    if not hasattr(tasks, "by_id") or not hasattr(task, "id"):
        # Bare indices: the same ones where both environments were made alike.
        return index < len(tasks) and _recipe(env) == _recipe(other)
    try:
        twin = tasks.by_id(task.id)
    except (KeyError, At2poError):
        return False
    return bool(getattr(twin, "question", None) == getattr(task, "question", None))


def _recipe(env: Env) -> Any:
    return None if env.spec is None else (env.spec.id, env.spec.kwargs)


def _place(task_id: str) -> float:
    """Map an id to a number in [0, 1) that looks random and never changes."""
    return int.from_bytes(hashlib.sha256(task_id.encode()).digest()[:8], "big") / 2**64
