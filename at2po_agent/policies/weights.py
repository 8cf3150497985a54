"""Names the weights of a model, for samplers that take them over and for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from at2po_env.errors import PolicyError


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights by name, as a checkpoint has them; tied ones once."""
    weights: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in model.state_dict().items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        identity = (whole.data_ptr(), whole.shape)
        if identity not in seen or not whole.numel():
            seen.add(identity)
            weights[name] = whole.detach()
    return weights


def check_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Make sure that weights are those of a model.

    Raises:
        PolicyError: A name is unknown or a shape does not fit.
    """
    own = model.state_dict()
    wrong = [name for name, value in weights.items() if name not in own or own[name].shape != value.shape]
    if wrong:
        raise PolicyError(f"the model has no such weights, or of another shape: {', '.join(sorted(wrong))}")
