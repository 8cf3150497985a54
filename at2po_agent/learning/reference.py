"""The frozen reference: the policy as it was before training, for KL terms in the loss or in the reward.

Its weights lie in the run's folder, so that a resumed run measures from the same point. Under adapters they
are those of the learner itself, with the adapters off: no second copy is made.
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from at2po_agent.cluster.shards import shard
from at2po_agent.learning.learner import Learner
from at2po_agent.losses.kl import Estimator, token_kl
from at2po_agent.packing.batch import Batch
from at2po_agent.packing.rows import pack_rows
from at2po_agent.policies.weights import is_adapted
from at2po_agent.runs.checkpoint import CheckpointError
from at2po_agent.tree import Tree

FILE = "reference.safetensors"


class _WithoutAdapters(Learner):
    """Scores with a learner's model as it was before its adapters learnt."""

    def __init__(self, learner: Learner) -> None:
        vars(self).update(vars(learner))

    def log_probs(self, batch: Batch) -> Tensor:
        with self.model.disable_adapter():  # type: ignore[operator]  # peft's
            return super().log_probs(batch)


def reference_learner(
    learner: Learner, folder: Path, *, started: bool, whole: nn.Module | None = None
) -> Learner:
    """The learner with its model as it was before training: a frozen copy, or without its adapters.

    Args:
        learner: Holds the model that is trained.
        folder: The run's folder; the reference's weights are written there at the beginning of a run.
        started: Whether steps were done already; then the weights must be there.
        whole: The whole model, where the learner has only a part of it; None takes the learner's.

    Raises:
        CheckpointError: They are not, or do not fit the model.
    """
    if is_adapted(learner.model):
        return _WithoutAdapters(learner)
    reference = copy.copy(learner)
    model = copy.deepcopy(whole or learner.model).requires_grad_(False).eval()
    file = folder / FILE
    if not started:
        if learner.learners.first:
            save_model(model, str(file))
    else:
        _load(model, file)
    reference.model = model if learner.learners.count == 1 else shard(model, learner.learners)
    return reference


def _load(model: nn.Module, file: Path) -> None:
    try:
        load_model(model, file)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"{file}: the policy before training, from which the KL is measured, cannot be read ({error}); "
            "restore the file, or start a new run"
        ) from error


def with_kl_in_reward(
    trees: Sequence[Tree],
    reference: Learner,
    *,
    weight: float,
    estimator: Estimator = "k3",
    pack: Callable[..., Batch] = pack_rows,
) -> list[Tree]:
    """Take the KL to the reference from the rewards: `R <- R - weight * sum_t KL_t` over a branch.

    Args:
        trees: Trees with leaves.
        reference: Scores the sampled tokens.
        weight: Weight of the KL.
        estimator: `k1`, `k2` or `k3`, from the log-probs as sampled.
        pack: `pack_rows`, or `pack_trees`, by which the reference sees shared tokens once.

    Returns:
        The same trees with other rewards; nothing is copied.
    """
    if not trees:
        return []
    batch = pack(trees, [np.zeros(len(tree.leaves())) for tree in trees])
    log_probs = reference.log_probs(batch).cpu()
    kl = token_kl(batch.sampled_log_probs, log_probs, batch.turn_ids, estimator=estimator)
    per_branch = kl.double().sum(dim=1).numpy()
    ends = np.cumsum([len(tree.leaves()) for tree in trees])
    return [
        tree.with_leaf_rewards(tree.leaf_reward[tree.is_leaf] - weight * kl_of_tree)
        for tree, kl_of_tree in zip(trees, np.split(per_branch, ends[:-1]), strict=True)
    ]
