"""Random batches of any shape for the loss tests, and what runs a loss on one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from at2po_agent import losses

LOSSES: dict[str, Callable[..., tuple[Tensor, dict[str, Tensor]]]] = {
    "atpo": losses.atpo_loss,
    "atpo_soft_clip": losses.atpo_soft_clip_loss,
    "gspo": losses.gspo_loss,
    "grpo": losses.grpo_loss,
    "dapo": losses.dapo_loss,
    "gppo": losses.gppo_loss,
    "aepo": losses.aepo_loss,
    "sapo": losses.sapo_loss,
}


class Rows(NamedTuple):
    """The four tensors of the common signature."""

    log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    turn_ids: Tensor


@st.composite
def batches(draw: st.DrawFn, *, max_turns: int = 4, drift: float | None = None) -> Rows:
    """Rows with unsampled tokens anywhere, and perhaps nothing sampled at all."""
    seed = draw(st.integers(0, 2**32 - 1))
    rows, tokens = draw(st.integers(1, 5)), draw(st.integers(1, 24))
    turns = draw(st.integers(1, max_turns))
    scale = draw(st.sampled_from([1e-4, 3e-3, 0.3, 3.0])) if drift is None else drift
    return random_rows(seed, rows, tokens, turns, scale, hidden=draw(st.sampled_from([0.0, 0.3, 1.0])))


def random_rows(seed: int, rows: int, tokens: int, turns: int, scale: float, *, hidden: float = 0.3) -> Rows:
    """Float64 rows with log-ratios of standard deviation `scale`; a share `hidden` of tokens is unsampled."""
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.integers(0, tokens + 1, (rows, turns - 1)), axis=1)
    turn_ids = (np.arange(tokens)[None, :, None] >= cuts[:, None, :]).sum(axis=2)
    turn_ids = np.minimum(turn_ids, tokens - 1)
    turn_ids[rng.random((rows, tokens)) < hidden] = -1
    per_turn = rng.normal(size=(rows, turns))
    advantages = np.take_along_axis(per_turn, np.maximum(turn_ids, 0), axis=1)
    old = -rng.exponential(size=(rows, tokens))
    log_probs = old + scale * rng.normal(size=(rows, tokens))
    return Rows(*(torch.from_numpy(x) for x in (log_probs, old, advantages)), torch.from_numpy(turn_ids))


def value_and_grad(
    loss: Callable[..., tuple[Tensor, object]], rows: Rows, **options: object
) -> tuple[Tensor, Tensor]:
    """The loss and its gradient with respect to the current log-probs."""
    leaf = rows.log_probs.clone().requires_grad_()
    value, _ = loss(leaf, *rows[1:], **options)
    (grad,) = torch.autograd.grad(value, leaf)
    return value.detach(), grad
