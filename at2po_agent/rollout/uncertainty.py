"""T2PO's uncertainty of a token and of a turn: pure functions, and their running form for sampling.

Two signals, since paper and released code differ even in sign:

- `paper`: `M_t = a H~_t + (1 - a)(1 - C~_t)`, high = uncertain. H is the entropy, C = -(1/j) sum of the j
  highest log-probs, both min-max normalised over the turn so far (bounds of tokens 1..t, so the signal is
  causal); where the bounds meet, as on a turn's first token, the normalised value is 1/2.
- `released`: `(1 - a) max log-prob + a (1 - H / ln V)` with a = 0.4, high = certain, not normalised.

References:
    T2PO, https://arxiv.org/abs/2605.02178.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from numpy.typing import ArrayLike

from at2po_agent.types import FloatArray

SignalKind: TypeAlias = Literal["paper", "released"]

FLOOR = 1e-6
"""Smallest signal that enters a geometric mean."""


class RunningSignal:
    """The signal of one turn, token by token.

    Args:
        kind: `paper` or `released`.
        weight: a, the weight of the entropy.
        top: j, how many log-probs the confidence averages (paper).
        vocab_size: V (released).

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, kind: SignalKind, *, weight: float = 0.4, top: int = 10, vocab_size: int = 2) -> None:
        if kind not in get_args(SignalKind):
            raise ValueError(f"signal must be one of {get_args(SignalKind)}, got {kind!r}")
        if not 0 <= weight <= 1 or top < 2 or vocab_size < 2:
            raise ValueError(
                f"need 0 <= weight <= 1, top >= 2, vocab_size >= 2; got {weight}, {top}, {vocab_size}"
            )
        self.values: list[float] = []
        self._kind, self._weight, self._top = kind, weight, top
        self._log_vocab = math.log(vocab_size)
        self._bounds = {"entropy": _Bounds(), "confidence": _Bounds()}

    def add(self, entropy: float, top_log_probs: ArrayLike) -> float:
        """Take the next token's distribution: its entropy and its highest log-probs, sorted; returns M_t."""
        top = np.asarray(top_log_probs, dtype=np.float64)
        if self._kind == "released":
            value = (1 - self._weight) * float(top[0]) + self._weight * (1 - entropy / self._log_vocab)
        else:
            confidence = -float(top[: self._top].mean())
            uncertain = self._bounds["entropy"].scale(entropy)
            certain = self._bounds["confidence"].scale(confidence)
            value = self._weight * uncertain + (1 - self._weight) * (1 - certain)
        self.values.append(value)
        return value


class _Bounds:
    """Smallest and largest number so far."""

    def __init__(self) -> None:
        self._low, self._high = math.inf, -math.inf

    def scale(self, value: float) -> float:
        self._low, self._high = min(self._low, value), max(self._high, value)
        spread = self._high - self._low
        return (value - self._low) / spread if spread > 0 else 0.5


def turn_uncertainty(signal: Sequence[float] | FloatArray) -> float:
    """`Phi = exp(mean ln max(M_t, 1e-6))`, the geometric mean of a turn's signal.

    Args:
        signal: M of each token of the turn.

    Returns:
        Phi; 1 for a turn without a token (the empty product).
    """
    values = np.asarray(signal, dtype=np.float64)
    return float(np.exp(np.log(np.maximum(values, FLOOR)).mean())) if values.size else 1.0


def recent_change(signal: Sequence[float], *, kind: SignalKind, window: int) -> float:
    """How much a signal has moved of late: below a threshold, further thinking brings nothing.

    Over the last `window` changes |M_t - M_{t-1}|: paper, their mean; released, the largest.

    Args:
        signal: M of the tokens so far.
        kind: `paper` or `released`.
        window: N changes, so N + 1 tokens.

    Returns:
        The change; infinite where there are fewer tokens.
    """
    if len(signal) < window + 1:
        return math.inf
    changes = np.abs(np.diff(np.asarray(signal[-window - 1 :], dtype=np.float64)))
    return float(changes.mean() if kind == "paper" else changes.max())


class Thresholds(NamedTuple):
    """Thresholds that follow the policy, where a share of the turns is configured instead of a number.

    Attributes:
        epsilon: Thinking whose recent change is below it has stalled; None: not known yet, nothing is ended.
        eta: A turn whose Phi is closer to that of the turn before is discarded; None: not known yet.
    """

    epsilon: float | None = None
    eta: float | None = None


def running_threshold(before: float | None, values: Iterable[float], share: float) -> float | None:
    """The threshold below which a share of some values lie, averaged with the one before.

    `(before + q) / 2`, where q is the `share` quantile of the values: the threshold follows the policy over a
    few steps, and the values of one step decide half of it.

    Args:
        before: The threshold so far; None if there is none.
        values: One for each turn: what is compared with the threshold; infinite where nothing could be.
        share: Of the turns, infinite ones included, that are to lie below.

    Returns:
        The threshold; as before where no value is finite.
    """
    given = list(values)
    finite = sorted(value for value in given if math.isfinite(value))
    if not finite:
        return before
    rank = int(share * len(given))
    quantile = finite[rank] if rank < len(finite) else math.nextafter(finite[-1], math.inf)
    return quantile if before is None else (before + quantile) / 2
