"""Policy losses, one small file per family.

All share the signature `(log_probs, old_log_probs, advantages, turn_ids, *, own keywords) -> (loss,
metrics)` over [B, T] tensors; `turn_ids` is int64 and -1 where the policy did not sample the token.

Read `base` first (what a loss is made of), then any loss: `atpo` (AT2PO), `grpo` (GRPO, DAPO), `gspo`, `gppo`
(GPPO, AEPO), `sapo`; `kl` (the term beside a loss), `metrics`, `segments` (sums over turns), and `registry`
(losses by name, and how to register your own).
"""

from at2po_agent.losses.atpo import atpo_loss, atpo_soft_clip_loss
from at2po_agent.losses.base import LossTotals, RatioLevel
from at2po_agent.losses.gppo import aepo_loss, gppo_loss
from at2po_agent.losses.grpo import dapo_loss, grpo_loss
from at2po_agent.losses.gspo import gspo_loss
from at2po_agent.losses.kl import kl_penalty, token_kl
from at2po_agent.losses.metrics import drift_metrics
from at2po_agent.losses.registry import get_loss, loss_names, make_loss, register_loss
from at2po_agent.losses.sapo import sapo_loss

__all__ = [
    "LossTotals",
    "RatioLevel",
    "aepo_loss",
    "atpo_loss",
    "atpo_soft_clip_loss",
    "dapo_loss",
    "drift_metrics",
    "get_loss",
    "gppo_loss",
    "grpo_loss",
    "gspo_loss",
    "kl_penalty",
    "loss_names",
    "make_loss",
    "register_loss",
    "sapo_loss",
    "token_kl",
]
