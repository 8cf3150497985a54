"""Random forests and tiny models of several families for the tests of packing."""

from __future__ import annotations

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from at2po_agent.learning.learner import Learner, Objective
from at2po_agent.losses import make_loss
from at2po_agent.packing.trees import PackedBatch
from at2po_agent.tree import Tree
from at2po_agent.types import Turn

VOCABULARY = 11
FAMILIES = ("qwen3", "qwen2", "llama", "gemma", "gemma2", "gemma3_text")


def random_forest(
    seed: int, *, trees: int = 2, turns: int = 8, longest: int = 6
) -> tuple[list[Tree], list[np.ndarray]]:
    """Trees with shared observations, forced tokens, dead ends; advantages per branch and node."""
    rng = np.random.default_rng(seed)
    forest, advantages = [], []
    for _ in range(trees):
        tree = Tree(_ids(rng, 1, longest))
        seen: dict[int, tuple[int, ...]] = {0: ()}
        for _ in range(turns):
            parent = int(rng.choice(list(seen)))
            node = tree.add(parent, _turn(rng, seen[parent], longest))
            seen[node] = _ids(rng, 0, longest)
        leaves = [node for node in range(1, len(tree)) if not tree.children(node)]
        for leaf in leaves:
            tree.close(leaf, float(rng.normal()))
        forest.append(tree)
        # Every branch weighs a shared turn differently, as group credit and tree_grpo do.
        advantages.append(rng.normal(size=(len(leaves), len(tree))))
    return forest, advantages


def tiny_model(family: str = "qwen3", *, dtype: torch.dtype = torch.float64, **changes) -> PreTrainedModel:
    """Two layers of any family, with weights large enough that every rule of the family matters."""
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.5,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        **changes,
    }
    config = AutoConfig.for_model(family, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def _turn(rng: np.random.Generator, observation: tuple[int, ...], longest: int) -> Turn:
    action = _ids(rng, 1, longest)
    mask = None if rng.random() < 0.5 else rng.random(len(action)) < 0.7
    return Turn(observation, action, -rng.exponential(size=len(action)), mask, "", "", 0.5, "stop")


def _ids(rng: np.random.Generator, low: int, high: int) -> tuple[int, ...]:
    # Few different ids, so that siblings often begin alike by chance.
    return tuple(rng.integers(3, size=rng.integers(low, high, endpoint=True)).tolist())


# Options under which some tokens of the random batches clip and others do not.
WIDE = {"clip_low": 0.1, "clip_high": 0.2}
OPTIONS = {"sapo": {}}


def objective(name: str) -> Objective:
    return Objective(make_loss(name, OPTIONS.get(name, WIDE)), needs_entropy=name == "aepo", kl_weight=0.05)


def loss_learner(model: torch.nn.Module, name: str, budget: int, **changes) -> Learner:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    return Learner(model, optimizer, objective(name), token_budget=budget, max_grad_norm=1.0, **changes)


def gradient(one: Learner, batch, old, reference) -> tuple[torch.Tensor, dict[str, float]]:
    figures = one.backward(batch, old, reference)
    parts = [p.grad.flatten() for p in one.model.parameters() if p.grad is not None]
    return torch.cat(parts).double(), {name: float(value) for name, value in figures.items()}


def as_rows(batch: PackedBatch, values: torch.Tensor, rows) -> torch.Tensor:
    """Numbers per trained token of the packed batch, at their places in the rows."""
    out = torch.zeros(rows.turn_ids.shape, dtype=values.dtype)
    out[rows.turn_ids >= 0] = values[batch.turn_ids >= 0]
    return out
