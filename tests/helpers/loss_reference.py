"""The losses transcribed from algorithms.md, float64, a Python loop over every token: slow and obvious.

Stop-gradients are written as `.detach()`, so autograd gives the gradient that the formulas mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOW_HIGH = {
    "atpo": (3e-3, 4e-3),
    "atpo_soft_clip": (3e-3, 4e-3),
    "gspo": (3e-4, 4e-4),
    "grpo": (0.2, 0.2),
    "dapo": (0.2, 0.28),
    "gppo": (0.2, 0.2),
    "aepo": (0.2, 0.2),
}
SOFT = {"atpo_soft_clip": (True, True), "gppo": (True, True), "aepo": (False, True)}
DUAL_CLIP = {"grpo": 3.0, "dapo": 3.0, "gppo": 3.0, "aepo": 3.0}
TOKEN_MEAN = ("grpo", "dapo", "gppo", "aepo")
NAMES = (*LOW_HIGH, "sapo")


def ratios(name: str, log_probs: Tensor, old: Tensor, turn_ids: Tensor) -> dict[tuple[int, int], Tensor]:
    """The ratio of each sampled token."""
    found: dict[tuple[int, int], Tensor] = {}
    for b in range(len(turn_ids)):
        sampled = [t for t in range(turn_ids.shape[1]) if int(turn_ids[b, t]) >= 0]
        for t in sampled:
            if name.startswith("atpo"):
                span = [u for u in sampled if int(turn_ids[b, u]) == int(turn_ids[b, t])]
            elif name == "gspo":
                span = sampled
            else:
                found[b, t] = (log_probs[b, t] - old[b, t]).exp()
                continue
            mean = sum((log_probs[b, u] - old[b, u] for u in span), torch.zeros(())) / len(span)
            log_s = log_probs[b, t] - log_probs[b, t].detach() + mean.detach()
            found[b, t] = log_s.clamp(max=10.0).exp()
    return found


def token_loss(name: str, ratio: Tensor, advantage: Tensor) -> Tensor:
    """The loss of one token."""
    if name == "sapo":
        tau = 1.0 if advantage > 0 else 1.05
        return -advantage * (4.0 / tau) * torch.sigmoid(tau * (ratio - 1.0))
    low, high = LOW_HIGH[name]
    soft_low, soft_high = SOFT.get(name, (False, False))
    lower = (1 - low) / ratio.detach() * ratio if soft_low else ratio.new_tensor(1 - low)
    upper = (1 + high) / ratio.detach() * ratio if soft_high else ratio.new_tensor(1 + high)
    clipped = upper if ratio > 1 + high else lower if ratio < 1 - low else ratio
    loss = torch.maximum(-advantage * ratio, -advantage * clipped)
    if name in DUAL_CLIP and advantage < 0:
        loss = torch.minimum(loss, -DUAL_CLIP[name] * advantage)
    return loss


def reference_loss(name: str, log_probs: Tensor, old: Tensor, advantages: Tensor, turn_ids: Tensor) -> Tensor:
    """The whole loss of a minibatch."""
    found = ratios(name, log_probs, old, turn_ids)
    tokens = {(b, t): token_loss(name, r, advantages[b, t]) for (b, t), r in found.items()}
    if name in TOKEN_MEAN:
        return sum(tokens.values(), torch.zeros(())) / max(len(tokens), 1)
    total = torch.zeros((), dtype=torch.float64)
    for b in range(len(turn_ids)):
        row = [loss for (row, _), loss in tokens.items() if row == b]
        if row:
            total = total + sum(row, torch.zeros(())) / len(row)
    return total / len(turn_ids)
