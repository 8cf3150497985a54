"""Whose weights are where: every learner has the whole model, which samples, and an equal part of another.

The other model is the one that learns. PyTorch's FSDP2 keeps its weights, gradients and moments in parts and
gathers a layer when it is computed. Between updates and rollouts, weights go from the parts into the whole
model (`gather_weights`), or, after a cold start or a resumption, the other way (`spread_weights`). The
checkpoint of a run is that of the whole, so any number of learners can go on from it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from at2po_agent.cluster.learners import Learners
from at2po_env.errors import ConfigError


def shard(model: nn.Module, learners: Learners) -> nn.Module:
    """Leave an equal part of a model's weights to each learner; the model is changed in place.

    Gradients are means over the learners, as is FSDP2's way: to get a sum, multiply the loss by their number.

    Raises:
        ConfigError: Some weights are trained and others are not.
    """
    if len({parameter.requires_grad for parameter in model.parameters()}) > 1:
        raise ConfigError(
            f"cluster.learners: {type(model).__name__} has frozen weights beside trained ones (an adapter?), "
            "which several learners do not support. Fix: cluster.learners=1"
        )
    mesh = init_device_mesh(learners.device, (learners.count,))
    # transformers names the blocks that must stay whole on one device; they are gathered one at a time.
    blocks = set(getattr(model, "_no_split_modules", None) or ())
    for part in list(model.modules()):
        if type(part).__name__ in blocks:
            fully_shard(part, mesh=mesh)
    # The root too gives its weights back after each pass. Otherwise a pass without gradient would leave them
    # whole, and an update would then read them as if they were this learner's part.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    return model


@torch.no_grad()
def gather_weights(sharded: nn.Module, whole: nn.Module) -> None:
    """Copy the weights of a sharded model into a whole one, on every learner."""
    parts = dict(sharded.named_parameters())
    for name, weight in whole.named_parameters():
        weight.copy_(_whole(parts[name]))


@torch.no_grad()
def spread_weights(whole: nn.Module, sharded: nn.Module) -> None:
    """Copy the weights of the first learner's whole model into the sharded one and all other whole ones."""
    parts = dict(sharded.named_parameters())
    for name, weight in whole.named_parameters():
        parts[name].copy_(_like(weight.detach(), parts[name]))
    gather_weights(sharded, whole)


def save_whole_moments(optimizer: torch.optim.Optimizer, learners: Learners) -> None:
    """Let an optimiser over shards save and load its state as if it had whole weights.

    From then on all learners must call `state_dict` together, and the first gets the state (the others get
    none); `load_state_dict` takes the first one's.
    """

    def gather(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        entries: dict[int, dict[str, Any]] = {}
        for index, entry in state["state"].items():
            for key, value in entry.items():
                whole = _whole(value).cpu() if isinstance(value, DTensor) else value
                if learners.first:
                    entries.setdefault(index, {})[key] = whole
        return {**state, "state": entries}

    def scatter(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        entries = {
            index: {
                key: _like(value, weights[index])
                if isinstance(value, Tensor) and value.shape == weights[index].shape
                else value
                for key, value in entry.items()
            }
            for index, entry in state["state"].items()
        }
        return {**state, "state": entries}

    optimizer.register_state_dict_post_hook(gather)
    optimizer.register_load_state_dict_pre_hook(scatter)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(whole: Tensor, part: Tensor) -> Tensor:
    """The first learner's tensor, in parts as another one is."""
    assert isinstance(part, DTensor), "every weight of a sharded model is in parts"
    return distribute_tensor(whole.to(part.device), part.device_mesh, part.placements)
