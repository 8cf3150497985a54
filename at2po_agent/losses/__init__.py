"""Policy losses, one small file per family.

All share the signature `(log_probs, old_log_probs, advantages, turn_ids, *, own keywords) -> (loss,
metrics)` over [B, T] tensors; `turn_ids` is int64 and -1 where the policy did not sample the token.
"""

from at2po_agent.losses.atpo import atpo_loss, atpo_soft_clip_loss
from at2po_agent.losses.base import LossTotals
from at2po_agent.losses.drift import drift_metrics
from at2po_agent.losses.gspo import gspo_loss
from at2po_agent.losses.kl import kl_penalty, token_kl
from at2po_agent.losses.registry import get_loss, loss_names, make_loss, register_loss
from at2po_agent.losses.sapo import sapo_loss
from at2po_agent.losses.token import aepo_loss, dapo_loss, gppo_loss, grpo_loss

__all__ = [
    "LossTotals",
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
