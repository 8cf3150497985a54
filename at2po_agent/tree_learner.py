"""From the trees of a step to new weights: packs, old log-probs, the reference, and the updates.

`learner` knows one minibatch and one update; this module knows a step: which trees make a minibatch, where
the old log-probs come from, and what the reference is asked. The trainer knows neither.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from at2po_agent.algorithms import Credit, objective
from at2po_agent.clock import Clock
from at2po_agent.learner import Learner, checkpoint_activations, make_optimizer
from at2po_agent.packed_forward import check_model
from at2po_agent.packing import Batch, pack_rows
from at2po_agent.reference import reference_learner, with_kl_in_reward
from at2po_agent.seeding import RunPurpose, run_generator
from at2po_agent.settings import Config
from at2po_agent.tree import Tree
from at2po_agent.tree_packing import PackedBatch, pack_trees
from at2po_env.errors import ConfigError


class TreeLearner:
    """Trains a model on the trees of one step after another.

    Args:
        model: What learns.
        config: The run.
        folder: The run's folder, where a reference keeps its weights.
        report: Takes a line that a person should read.
    """

    def __init__(self, model: nn.Module, config: Config, folder: Path, report: Callable[[str], None]) -> None:
        self.optimizer = make_optimizer(model, config.optimizer)
        self._config = config
        self._folder = folder
        self._report = report
        self._learner = Learner(
            model,
            self.optimizer,
            objective(config.algorithm),
            config.train.micro_batch_tokens,
            config.optimizer.max_grad_norm,
            config.rollout.temperature,
            None if config.train.autocast == "none" else getattr(torch, config.train.autocast),
            config.train.gradient_checkpointing,
        )
        if config.train.gradient_checkpointing:
            checkpoint_activations(model)
        self._pack = self._choose_packing()
        self._reference: Learner | None = None

    def with_kl(self, trees: Sequence[Tree], step: int) -> Sequence[Tree]:
        """The trees, with the KL to the reference taken from their rewards where the settings want that."""
        settings = self._config.algorithm
        if not settings.kl_weight or settings.kl_place != "reward":
            return trees
        return with_kl_in_reward(
            trees, self._frozen(step), weight=settings.kl_weight, estimator=settings.kl_estimator
        )

    def learn(
        self, trees: Sequence[Tree], credits: Sequence[Credit], *, step: int, clock: Clock
    ) -> dict[str, float]:
        """Make the updates of a step.

        Args:
            trees: Trees with leaves; none leaves the weights as they are.
            credits: Their advantages.
            step: Number of the step, from 1; with `run.seed` it decides the minibatches.
            clock: Takes the seconds of packing, old_log_probs, reference and update.

        Returns:
            Means of the updates' figures, learning_rate, and how many updates there were.
        """
        settings = self._config.train
        rate = self._set_learning_rate(step)
        if not trees:
            return {"learning_rate": rate, "updates": 0}
        generator = run_generator(self._config.run.seed, RunPurpose.MINIBATCHES, step)
        order = generator.permutation(len(trees))
        batches: list[Batch | PackedBatch] = []
        for chosen in np.array_split(order, max(1, len(trees) // settings.minibatch_questions)):
            batches.append(self._pack([trees[i] for i in chosen], [credits[i].advantages for i in chosen]))
        clock.lap("packing")
        old = self._old_log_probs(batches)
        clock.lap("old_log_probs")
        weighs_kl = self._learner.objective.kl_weight
        references = [self._frozen(step).log_probs(batch) if weighs_kl else None for batch in batches]
        clock.lap("reference")
        updates = []
        for epoch in range(settings.epochs):
            turn = range(len(batches)) if epoch == 0 else generator.permutation(len(batches))
            updates += [self._learner.update(batches[i], old[i], references[i]) for i in turn]
        clock.lap("update")
        return {**_means(updates), "learning_rate": rate, "updates": len(updates)}

    def _choose_packing(self) -> Callable[..., Batch | PackedBatch]:
        """`pack_trees` where the model can be trained on packed trees, unless the settings decide."""
        packing = self._config.train.packing
        if packing == "auto":
            try:
                check_model(self._learner.model)
            except ConfigError as error:
                self._report(f"training on rows: {error}")
                packing = "rows"
        return pack_rows if packing == "rows" else pack_trees

    def _frozen(self, step: int) -> Learner:
        """The reference, made when it is first asked for."""
        if self._reference is None:
            self._reference = reference_learner(self._learner, self._folder, started=step > 1)
        return self._reference

    def _old_log_probs(self, batches: Sequence[Batch | PackedBatch]) -> list[Tensor]:
        source = self._config.train.old_log_probs
        if source == "sampler" or (source == "auto" and self._learner.sampler_agrees(batches[0])):
            return [batch.sampled_log_probs for batch in batches]
        return [self._learner.log_probs(batch) for batch in batches]

    def _set_learning_rate(self, step: int) -> float:
        settings = self._config.optimizer
        rate = settings.lr * min(1.0, step / max(settings.warmup_steps, 1))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate


def _means(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each figure over the updates that have it."""
    names = dict.fromkeys(name for update in updates for name in update)
    return {name: float(np.mean([update[name] for update in updates if name in update])) for name in names}
