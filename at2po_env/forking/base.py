"""Forks environments at any turn, through any stack of Gymnasium wrappers.

A `ForkableEnv` keeps everything that changes during an episode in one immutable value. `fork` hands that
value to a twin; `snapshot` keeps it; `restore` puts it back. Around it, the state of each wrapper (time
limits, statistics, normalisers, your own) is copied by value: see `at2po_env.forking.capture`. JSON is
written of known wrappers and of those that say what their state is: see `at2po_env.forking.wrapper_state`.
Samplers of the action and observation spaces are the agent's: a fork gets its own that continues alike, a
snapshot keeps none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, Self, TypeVar

import gymnasium
import numpy as np
from gymnasium.utils import seeding
from gymnasium.wrappers import PassiveEnvChecker

from at2po_env.errors import SnapshotError
from at2po_env.forking.capture import clone_space
from at2po_env.forking.layers import (
    CapturedLayer,
    Layer,
    capture_layers,
    fork_layers,
    name_of,
    restore_layers,
    settle_checker,
)
from at2po_env.forking.random_state import RngState, build_rng, capture_rng, entropy
from at2po_env.forking.snapshots import BaseState, LazyJson, Snapshot, read_base, write_base
from at2po_env.forking.wrapper_state import check_stack, give_layers, read_layers, write_layers

EnvT = TypeVar("EnvT", bound=gymnasium.Env[Any, Any])


class ForkableEnv(gymnasium.Env[str, str], ABC):
    """A text environment whose whole episode is one immutable value.

    Implement `reset` (its first line is `super().reset(seed=seed)`), `step`, and the four methods below.
    Every other attribute is configuration: a fork shares it, so nothing may change it during an episode. Draw
    randomness from `self.np_random`, which is forked and restored for you.
    """

    _rng: np.random.Generator | None = None
    _rng_source: int | RngState | None = None
    _np_random_seed: int | None = None

    @abstractmethod
    def get_state(self) -> Any:
        """Return the episode as an immutable value, in constant time."""

    @abstractmethod
    def set_state(self, state: Any) -> None:
        """Continue from a value that `get_state` returned."""

    @abstractmethod
    def dump_state(self, state: Any) -> Any:
        """Return a JSON value for a state; must depend on nothing else that changes."""

    @abstractmethod
    def load_state(self, data: Any) -> Any:
        """Return the state that `dump_state` wrote; must not change this environment."""

    def example_actions(self) -> Sequence[str]:
        """Return actions that exercise this environment; `check_env` and the contract tests play them."""
        return [self.action_space.sample() for _ in range(4)]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Seed the generator, if a seed is given or none was ever set; subclasses begin the episode."""
        del options
        if seed is not None:
            self._seed(seed)
        elif self._rng is None and self._rng_source is None:
            self._seed(entropy())
        return "", {}

    @property
    def _np_random(self) -> np.random.Generator | None:
        """The generator, built at its first use from the seed or the captured state."""
        if self._rng is None and self._rng_source is not None:
            self._rng, self._rng_source = build_rng(self._rng_source), None
        return self._rng

    @_np_random.setter
    def _np_random(self, value: np.random.Generator | None) -> None:
        self._rng, self._rng_source = value, None

    def _seed(self, seed: int) -> None:
        if type(seed) is not int or seed < 0:
            seeding.np_random(seed)  # raises Gymnasium's own error
        self._rng, self._rng_source, self._np_random_seed = None, seed, seed

    def _get_base(self) -> BaseState:
        """Read the episode, the generator and its seed; a generator never seeded is seeded now."""
        if self._rng is not None:
            return BaseState(self.get_state(), capture_rng(self._rng), self._np_random_seed)
        if self._rng_source is None:
            self._seed(entropy())
        return BaseState(self.get_state(), self._rng_source, self._np_random_seed)

    def _set_base(self, base: BaseState) -> None:
        self._rng, self._rng_source, self._np_random_seed = None, base.rng, base.seed
        self.set_state(base.state)

    def _fork(self) -> Self:
        if self._rng is None and self._rng_source is None:
            self._seed(entropy())
        twin = object.__new__(type(self))
        attributes = twin.__dict__
        attributes.update(self.__dict__)
        if self._rng is not None:
            attributes["_rng"], attributes["_rng_source"] = None, capture_rng(self._rng)
        for name in ("action_space", "observation_space"):
            if name in attributes:
                attributes[name] = clone_space(attributes[name])
        self._hand_over(twin)
        return twin

    def _hand_over(self, twin: Self) -> None:
        """Give a fork its state; for environments whose state is dear to read and cheap to fork elsewhere."""
        twin.set_state(self.get_state())


def fork(env: EnvT) -> EnvT:
    """Return an independent environment in the same state.

    The same actions give the same observations, rewards and infos in both, and neither can change the other.
    Costs a few microseconds, however long the episode: the past is shared. Takes no lock: step, fork and
    capture an environment in one thread at a time.

    Args:
        env: A `ForkableEnv` under any number of wrappers.

    Raises:
        SnapshotError: If the environment is not forkable, a wrapper holds something that cannot be copied, or
            another thread is seen to change it meanwhile.
    """
    wrappers, base = _unstack(env)
    child: Any = base._fork()
    try:
        return fork_layers(wrappers, base, child) if wrappers else child  # type: ignore[no-any-return]
    except RuntimeError as error:
        _refuse_motion(error)
        raise


def snapshot(env: gymnasium.Env[Any, Any]) -> Snapshot:
    """Keep the state of an environment; costs a few microseconds, and JSON is written only when asked for.

    Args:
        env: A `ForkableEnv` under any number of wrappers.

    Raises:
        SnapshotError: As in `fork`.
    """
    wrappers, base = _unstack(env)
    try:
        captured = capture_layers(wrappers, base) if wrappers else ()
    except RuntimeError as error:
        _refuse_motion(error)
        raise
    return Snapshot.of(
        env_id(base),
        LazyJson(base._get_base(), partial(write_base, base.dump_state)),
        LazyJson(captured, write_layers),
    )


def restore(env: gymnasium.Env[Any, Any], snap: Snapshot) -> None:
    """Put an environment back into the state that a snapshot keeps, of this process or another.

    The environment must be built like the one that was captured: same id, same wrappers, same arguments. On a
    `SnapshotError` nothing has changed.

    Args:
        env: The environment to change; it need not have been reset.
        snap: A result of `snapshot` or `Snapshot.from_json`.

    Raises:
        SnapshotError: If the snapshot does not fit the environment.
    """
    if not isinstance(snap, Snapshot):
        raise SnapshotError(
            f"restore needs a Snapshot, got {type(snap).__name__}. Fix: Snapshot.from_json(text) reads one"
        )
    wrappers, base = _unstack(env)
    if snap.env_id != env_id(base):
        raise SnapshotError(f"The snapshot is of {snap.env_id!r} and the environment is {env_id(base)!r}")
    if snap.state.live is None:
        _restore_json(env, snap, wrappers, base)
        return
    captured: Sequence[CapturedLayer] = snap.wrappers.live
    if [layer.kind for layer in captured] != [type(wrapper) for wrapper in wrappers]:
        check_stack([name_of(layer.kind) for layer in captured], wrappers)
    base._set_base(snap.state.live)
    if wrappers:
        restore_layers(wrappers, base, captured)


def _refuse_motion(error: RuntimeError) -> None:
    """Name the cause where a container changed while it was copied."""
    if "during iteration" in str(error):
        raise SnapshotError(
            f"The environment changed while it was copied ({error}): another thread steps it. Fix: step, "
            "fork and capture an environment in one thread at a time"
        ) from error


def _restore_json(
    env: gymnasium.Env[Any, Any], snap: Snapshot, wrappers: list[Layer], base: ForkableEnv
) -> None:
    """Read everything before anything is changed; where a `set_state` still refuses, put all back."""
    layers = read_layers(snap.wrappers.json, wrappers)
    state = read_base(snap.state.json, base.load_state)
    before = snapshot(env)
    try:
        base._set_base(state)
        give_layers(wrappers, layers)
    except Exception as error:  # foreign code: whatever it raises, the state does not fit it
        restore(env, before)
        raise SnapshotError(f"set_state refused the state: {type(error).__name__}: {error}") from error
    for wrapper in wrappers:
        if isinstance(wrapper, PassiveEnvChecker):
            settle_checker(wrapper)


def _unstack(env: gymnasium.Env[Any, Any]) -> tuple[list[Layer], ForkableEnv]:
    """Split a stack into its wrappers, outermost first, and the environment under them."""
    wrappers: list[Layer] = []
    layer: Any = env
    while isinstance(layer, gymnasium.Wrapper):
        wrappers.append(layer)
        layer = layer.env
    if type(layer) not in _FORKABLE:
        if isinstance(layer, gymnasium.vector.VectorEnv):
            raise SnapshotError(
                f"{type(layer).__name__} cannot be forked: it steps {layer.num_envs} episodes together and "
                "is no episode itself. Fix: fork or capture the environments in it, such as "
                "at2po_env.fork(envs.envs[0])"
            )
        if not isinstance(layer, ForkableEnv):
            raise SnapshotError(
                f"{type(layer).__name__} cannot be forked. Expected a subclass of at2po_env.ForkableEnv "
                "under the wrappers. Fix: derive it from ForkableEnv, the episode being one immutable value"
            )
        _FORKABLE.add(type(layer))
    return wrappers, layer


_FORKABLE: set[type] = set()
"""Classes known to be forkable: `isinstance` of an abstract class costs more than the rest of the walk."""


def env_id(base: gymnasium.Env[Any, Any]) -> str:
    """Return the registered id of an environment; of one that was built directly, its class."""
    if base.spec is not None:
        return base.spec.id
    return f"{type(base).__module__}:{type(base).__qualname__}"
