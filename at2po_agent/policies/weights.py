"""Names the weights of a model, for samplers that take them over and for checkpoints.

A model with low-rank adapters (peft) has three kinds: those of its base, those of the adapters, and both
merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from at2po_env.errors import PolicyError, require


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


def is_adapted(model: nn.Module) -> bool:
    """True if a model carries adapters of peft."""
    return hasattr(model, "peft_config")


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights by name, as a checkpoint of the model without its adapters has them."""
    inner: Any = model.get_base_model() if is_adapted(model) else model  # type: ignore[operator]  # peft's
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in named_weights(inner).items()
        if ".lora_" not in name
    }


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model's adapters, by the names under which peft saves them."""
    peft = require("peft", "lora")
    weights: dict[str, Tensor] = peft.get_peft_model_state_dict(
        model, state_dict=named_weights(model), save_embedding_layers=False
    )
    return weights


@torch.no_grad()
def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights by name with the adapters in them: `W + alpha / rank * B A`, in the number format of W.

    The matrices that have adapters are copies.
    """
    weights, inner = base_weights(model), model.get_base_model()  # type: ignore[operator]  # peft's
    for name, module in inner.named_modules():
        if hasattr(module, "get_delta_weight"):
            own = weights[f"{name}.weight"]
            weights[f"{name}.weight"] = own + module.get_delta_weight(module.active_adapters[0]).to(own.dtype)
    return weights


def adapter_dropouts(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that leave out inputs of adapters while they are in train mode."""
    return [module for name, module in model.named_modules() if name.endswith(".lora_dropout.default")]


def check_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Make sure that weights are those of a model.

    Raises:
        PolicyError: A name is unknown or a shape does not fit.
    """
    own = model.state_dict()
    wrong = [name for name, value in weights.items() if name not in own or own[name].shape != value.shape]
    if wrong:
        raise PolicyError(f"the model has no such weights, or of another shape: {', '.join(sorted(wrong))}")
