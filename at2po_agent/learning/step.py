"""From the trees of a step to new weights: packs, old log-probs, the reference, and the updates.

`learner` knows one minibatch and one update; this module knows a step: which trees make a minibatch, where
the old log-probs come from, and what the reference is asked. The trainer knows neither.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from at2po_agent.config.sections import Config
from at2po_agent.credit.registry import Credit
from at2po_agent.learning.learner import Learner, checkpoint_activations, make_optimizer
from at2po_agent.learning.mismatch import Mismatch, importance_weights
from at2po_agent.learning.objective import objective
from at2po_agent.learning.reference import reference_learner, with_kl_in_reward
from at2po_agent.packing.forward import check_model
from at2po_agent.packing.rows import Batch, move, pack_rows
from at2po_agent.packing.trees import PackedBatch, pack_trees
from at2po_agent.runs.clock import Clock
from at2po_agent.runs.seeding import RunPurpose, run_generator
from at2po_agent.tree import Tree
from at2po_env.errors import ConfigError

SAMPLER_TOLERANCE = 1e-3
"""Mean difference of log-probs in nats up to which the sampler's are taken; AT2PO's clip begins at 3e-3."""


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
        self._warned = False

    def with_kl(self, trees: Sequence[Tree], step: int) -> Sequence[Tree]:
        """The trees, with the KL to the reference taken from their rewards where the settings want that."""
        settings = self._config.algorithm
        if not settings.kl_weight or settings.kl_place != "reward":
            return trees
        return with_kl_in_reward(
            trees,
            self._frozen(step),
            weight=settings.kl_weight,
            estimator=settings.kl_estimator,
            pack=self._pack,
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
            Means of the updates' figures, learning_rate, how many updates there were, and the mismatch of
            sampler and learner (`Mismatch.read`), where a token could be compared.
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
        old, measured = self._old_log_probs(batches)
        weighing = self._weigh(batches, old)
        clock.lap("old_log_probs")
        weighs_kl = self._learner.objective.kl_weight
        references = [self._frozen(step).log_probs(batch) if weighs_kl else None for batch in batches]
        clock.lap("reference")
        mismatch = None if measured else Mismatch()
        updates: list[dict[str, float]] = []
        for epoch in range(settings.epochs):
            for i in range(len(batches)) if epoch == 0 else generator.permutation(len(batches)):
                first = None if updates else mismatch
                updates.append(self._learner.update(batches[i], old[i], references[i], mismatch=first))
        if mismatch is not None:
            measured = mismatch.read()
        clock.lap("update")
        figures = {"learning_rate": rate, "updates": len(updates)}
        return {**_means(updates), **_means(weighing), **self._judge(measured, step), **figures}

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

    def _old_log_probs(self, batches: Sequence[Batch | PackedBatch]) -> tuple[list[Tensor], dict[str, float]]:
        """Old log-probs of each minibatch, and how far the sampler's are from the model's, if that is known.

        Recomputed ones are compared token by token. `auto` compares one micro-batch, and that is measured
        where the sampler's are taken. With `sampler` nothing is computed here: the first update computes the
        log-probs of its branches before it changes a weight, so measuring there costs nothing. Only where
        none of them has an advantage, and nothing would be computed, one micro-batch is.
        """
        source = self._config.train.old_log_probs
        sampled = [batch.sampled_log_probs for batch in batches]
        if source == "sampler" and (batches[0].advantages != 0).any():
            return sampled, {}
        if source != "recompute":
            figures = self._learner.first_mismatch(batches[0])
            if source == "sampler" or figures.get("mismatch/mean_difference", 0.0) <= SAMPLER_TOLERANCE:
                return sampled, figures
        mismatch, recomputed = Mismatch(), [self._learner.log_probs(batch) for batch in batches]
        for batch, log_probs in zip(batches, recomputed, strict=True):
            device = log_probs.device
            mismatch.add(log_probs, move(batch.sampled_log_probs, device), move(batch.turn_ids, device))
        return recomputed, mismatch.read()

    def _weigh(self, batches: list[Batch | PackedBatch], old: Sequence[Tensor]) -> list[dict[str, float]]:
        """Put importance weights on the advantages of all minibatches, where the settings want that."""
        cap = self._config.train.importance_cap
        if cap is None:
            return []
        figures = []
        for index, (batch, log_probs) in enumerate(zip(batches, old, strict=True)):
            weights, about = importance_weights(
                log_probs.cpu(),
                batch.sampled_log_probs,
                batch.turn_ids,
                cap=cap,
                level=self._learner.objective.level,
            )
            batches[index] = replace(batch, advantages=batch.advantages * weights)
            figures.append({name: float(value) for name, value in about.items()})
        return figures

    def _judge(self, measured: Mapping[str, float], step: int) -> dict[str, float]:
        """The mismatch with `mismatch/warning`, 1 beyond the threshold; a person is told once."""
        if not measured:
            return {}
        kl, most = measured["mismatch/kl_k3"], self._config.train.mismatch_warning
        if kl > most and not self._warned:
            self._warned = True
            self._report(
                f"step {step}: sampler and learner differ by a KL of {kl:.2g} nats per token, more than "
                f"train.mismatch_warning ({most:g}); compare their number formats and versions, or correct "
                "for it with train.importance_cap=2 and train.old_log_probs=recompute"
            )
        return {**measured, "mismatch/warning": int(kl > most)}

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
