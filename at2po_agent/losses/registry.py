"""Losses by name: the built-in ones, and what a user registers beside them.

A loss is one pure function `(log_probs, old_log_probs, advantages, turn_ids, *, own keywords) -> (loss,
metrics)`. The keywords `totals`, `weights` and whatever stands in `requires` are per batch and come from
the trainer; all others are options that a configuration may set.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch

from at2po_agent.losses.atpo import atpo_loss, atpo_soft_clip_loss
from at2po_agent.losses.base import LossResult, RatioLevel
from at2po_agent.losses.gppo import aepo_loss, gppo_loss
from at2po_agent.losses.grpo import dapo_loss, grpo_loss
from at2po_agent.losses.gspo import gspo_loss
from at2po_agent.losses.sapo import sapo_loss

LossFunction: TypeAlias = Callable[..., LossResult]
PER_BATCH = frozenset({"totals", "weights"})


@dataclass(frozen=True)
class LossSpec:
    """One registered loss.

    Attributes:
        name: What a configuration calls it.
        function: The pure function.
        requires: Names of further [B, T] tensors that the trainer must pass, such as `entropies`.
        level: Whose tokens make one importance ratio.
    """

    name: str
    function: LossFunction
    requires: tuple[str, ...] = ()
    level: RatioLevel = "token"

    @property
    def options(self) -> dict[str, Any]:
        """Options that a configuration may set, with their defaults."""
        parameters = inspect.signature(self.function).parameters.values()
        reserved = PER_BATCH | set(self.requires)
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in reserved}


_LOSSES: dict[str, LossSpec] = {}


def register_loss(
    name: str, function: LossFunction, *, requires: tuple[str, ...] = (), level: RatioLevel = "token"
) -> LossSpec:
    """Make a loss known under a name.

    Args:
        name: What configurations call it.
        function: `(log_probs, old_log_probs, advantages, turn_ids, *, own keywords) -> (loss, metrics)`.
        requires: Names of further [B, T] tensors that it must be called with.
        level: Whose tokens make one importance ratio: a `token`, a `turn` or a `branch`.

    Raises:
        ValueError: The name is taken by another function.
    """
    known = _LOSSES.get(name)
    if known is not None and known.function is not function:
        raise ValueError(f"a loss named {name!r} exists already; registered names: {', '.join(loss_names())}")
    spec = LossSpec(name, function, requires, level)
    _LOSSES[name] = spec
    return spec


def loss_names() -> list[str]:
    """Registered names, sorted."""
    return sorted(_LOSSES)


def get_loss(name: str) -> LossSpec:
    """Look a loss up.

    Raises:
        ValueError: No such loss; the message lists those that exist.
    """
    if name not in _LOSSES:
        raise ValueError(f"unknown loss {name!r}; registered names: {', '.join(loss_names())}")
    return _LOSSES[name]


def make_loss(name: str, options: Mapping[str, Any] | None = None) -> LossFunction:
    """Bind a loss to its options and check both before training starts.

    Args:
        name: A registered name.
        options: Values of its own keywords; the others keep their defaults.

    Returns:
        A function of the four tensors, `totals`, `weights` and what the loss requires.

    Raises:
        ValueError: Unknown name or option, or a value that the loss refuses.
    """
    spec = get_loss(name)
    chosen = dict(options or {})
    unknown = sorted(set(chosen) - set(spec.options))
    if unknown:
        allowed = ", ".join(spec.options) or "none"
        raise ValueError(f"loss {name!r} has no option {', '.join(unknown)}; its options: {allowed}")
    probe = {"turn_ids": torch.zeros(1, 1, dtype=torch.int64)}
    tensors = {key: torch.zeros(1, 1) for key in ("log_probs", "old_log_probs", "advantages", *spec.requires)}
    try:
        spec.function(**tensors, **probe, **chosen)
    except (TypeError, ValueError) as error:
        raise ValueError(f"loss {name!r} refuses its options {chosen}: {error}") from error
    bound = partial(spec.function, **chosen)
    if not spec.requires:
        return bound

    def call(*tensors: torch.Tensor, **per_batch: Any) -> LossResult:
        missing = [key for key in spec.requires if per_batch.get(key) is None]
        if missing:
            raise ValueError(
                f"loss {spec.name!r} needs {', '.join(missing)} ([B, T] tensors) with every batch"
            )
        return bound(*tensors, **per_batch)

    return call


register_loss("atpo", atpo_loss, level="turn")
register_loss("atpo_soft_clip", atpo_soft_clip_loss, level="turn")
register_loss("gspo", gspo_loss, level="branch")
register_loss("grpo", grpo_loss)
register_loss("dapo", dapo_loss)
register_loss("gppo", gppo_loss)
register_loss("aepo", aepo_loss, requires=("entropies",))
register_loss("sapo", sapo_loss)
