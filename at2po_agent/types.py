"""A policy's generation and a turn of an episode.

The shape alphabet of the whole agent: B branches, T tokens, K turns, N nodes, V vocabulary, G branches per
question. Log-probabilities are natural logarithms (nats) of the distribution that was sampled from.

This module knows neither trees nor tensors of a training batch; those are `tree` and `packing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

BoolArray: TypeAlias = NDArray[np.bool_]
IntArray: TypeAlias = NDArray[np.int64]
Float32Array: TypeAlias = NDArray[np.float32]
FloatArray: TypeAlias = NDArray[np.float64]

StopReason: TypeAlias = Literal["stop", "eos", "length", "abort"]
STOP_REASONS: frozenset[str] = frozenset(get_args(StopReason))


@dataclass(frozen=True, eq=False)
class Generation:
    """A policy's answer to one request: exactly the sampled token ids, nothing after them.

    Attributes:
        ids: The sampled ids, the token that completed a stop string or the end of sequence included.
        log_probs: float32[T], nats, as sampled.
        stop_reason: `stop` (a stop string), `eos`, `length` (token limit) or `abort` (cancelled).
        sampled: bool[T], False where a token was forced instead of sampled; None means that all were sampled.
        version: Version of the weights that sampled.
    """

    ids: tuple[int, ...]
    log_probs: Float32Array
    stop_reason: StopReason
    sampled: BoolArray | None = None
    version: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", tuple(self.ids))
        _freeze_tokens(self, len(self.ids), "log_probs", self.sampled)
        _check_stop_reason(self.stop_reason)


@dataclass(frozen=True, eq=False)
class Turn:
    """One committed turn: the observation that opened it and the action that the policy wrote after it.

    Attributes:
        observation_ids: Ids of what the environment newly showed; empty on the first turn, whose prompt is
            the root's.
        action_ids: The ids that the policy sampled (or was forced to write).
        sampled_log_probs: float32[T] over `action_ids`, nats, as sampled.
        sampled: bool[T] over `action_ids`, False where a token was forced; None means that all were sampled.
        observation: The observation's text.
        action: The action's text, verbatim.
        entropy: Mean surprisal of the sampled tokens in nats (AT2PO's entropy of a turn); 0 without any.
        stop_reason: Why sampling stopped.
        version: Version of the weights that sampled, as the policy counts them.
        prompt_ids: Ids of the turn's own prompt, which the policy saw instead of all that precedes the turn
            (a window transcript); it holds the observation. None: the turn goes on where its parent ended.
    """

    observation_ids: tuple[int, ...]
    action_ids: tuple[int, ...]
    sampled_log_probs: Float32Array
    sampled: BoolArray | None
    observation: str
    action: str
    entropy: float
    stop_reason: StopReason
    version: int = 0
    prompt_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "observation_ids", tuple(self.observation_ids))
        if self.prompt_ids is not None:
            object.__setattr__(self, "prompt_ids", tuple(self.prompt_ids))
            if self.observation_ids or not self.prompt_ids:
                raise ValueError(
                    "a turn with a prompt of its own has its observation there, and no other ids"
                )
        object.__setattr__(self, "action_ids", tuple(self.action_ids))
        _freeze_tokens(self, len(self.action_ids), "sampled_log_probs", self.sampled)
        _check_stop_reason(self.stop_reason)

    @classmethod
    def from_generation(
        cls,
        generation: Generation,
        *,
        observation_ids: Sequence[int] = (),
        observation: str = "",
        action: str,
        prompt_ids: Sequence[int] | None = None,
    ) -> Self:
        """Commit what a policy generated after an observation; the entropy is that of its sampled tokens."""
        return cls(
            observation_ids=tuple(observation_ids),
            action_ids=generation.ids,
            sampled_log_probs=generation.log_probs,
            sampled=generation.sampled,
            observation=observation,
            action=action,
            entropy=mean_surprisal(generation.log_probs, generation.sampled),
            stop_reason=generation.stop_reason,
            version=generation.version,
            prompt_ids=None if prompt_ids is None else tuple(prompt_ids),
        )

    @property
    def ids(self) -> tuple[int, ...]:
        """The turn's token piece: its own prompt or the observation, then the action."""
        return (self.prompt_ids or self.observation_ids) + self.action_ids

    @property
    def response_tokens(self) -> int:
        """Tokens that the turn adds to the response: observation and action, without a prompt of its own."""
        return len(self.observation_ids) + len(self.action_ids)

    @property
    def sampled_mask(self) -> BoolArray:
        """bool[T] over `action_ids`: which tokens the policy sampled, and hence may be trained."""
        return np.ones(len(self.action_ids), dtype=np.bool_) if self.sampled is None else self.sampled


def mean_surprisal(log_probs: Float32Array, sampled: BoolArray | None = None) -> float:
    """Entropy of a turn, `H = -(1/|y|) sum_t log pi(y_t)` over its sampled tokens.

    Args:
        log_probs: float32[T], nats.
        sampled: bool[T], or None when all tokens were sampled.

    Returns:
        H in nats, 0.0 when no token was sampled.
    """
    chosen = np.asarray(log_probs, dtype=np.float64)
    if sampled is not None:
        chosen = chosen[sampled]
    return -float(chosen.mean()) if chosen.size else 0.0


def _freeze_tokens(target: Generation | Turn, length: int, name: str, sampled: Any) -> None:
    """Store private read-only arrays of the expected length on a frozen dataclass."""
    log_probs = np.array(getattr(target, name), dtype=np.float32)
    if log_probs.shape != (length,):
        raise ValueError(f"{name} must hold one number per id: got shape {log_probs.shape} for {length} ids")
    log_probs.setflags(write=False)
    object.__setattr__(target, name, log_probs)
    if sampled is None:
        return
    mask = np.array(sampled, dtype=np.bool_)
    if mask.shape != (length,):
        raise ValueError(f"sampled must hold one flag per id: got shape {mask.shape} for {length} ids")
    mask.setflags(write=False)
    object.__setattr__(target, "sampled", mask)


def _check_stop_reason(stop_reason: str) -> None:
    if stop_reason not in STOP_REASONS:
        raise ValueError(f"stop_reason must be one of {sorted(STOP_REASONS)}, got {stop_reason!r}")
