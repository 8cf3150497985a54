"""From the trees of a step to new weights: packs, old log-probs, the reference, and the updates.

`learner` knows one minibatch and one update. This module knows a step: which trees make a minibatch, where
the old log-probs come from, and what the reference is asked. The trainer knows neither.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import get_scheduler

from at2po_agent.cluster.learners import Learners
from at2po_agent.cluster.shards import gather_weights, save_whole_moments, shard, spread_weights
from at2po_agent.config.sections import AlgorithmConfig, Config, OptimizerConfig
from at2po_agent.credit.registry import Credit, credit_rules
from at2po_agent.learning.learner import Learner, Objective, checkpoint_activations, make_optimizer
from at2po_agent.learning.mismatch import Mismatch, importance_weights
from at2po_agent.learning.reference import reference_learner, with_kl_in_reward
from at2po_agent.packing.batch import Batch, move
from at2po_agent.packing.rows import pack_rows
from at2po_agent.packing.trees import check_model, pack_trees
from at2po_agent.runs.progress import Clock
from at2po_agent.runs.seeding import RunPurpose, run_generator, run_seed
from at2po_agent.tree import Tree
from at2po_env.errors import ConfigError

SAMPLER_TOLERANCE = 1e-3
"""Mean difference of log-probs in nats up to which the sampler's are taken; AT2PO's clip begins at 3e-3."""


def give_credit(tree: Tree, config: AlgorithmConfig) -> Credit:
    """Advantages of one tree under the credit rule that a configuration names."""
    return credit_rules()[config.credit](tree, **config.credit_options)


def next_clip_scale(scale: float, clipped: float, share: float) -> float:
    """Widen or narrow the bounds of a loss after a step, so that it comes to clip a share of the tokens.

    `scale * sqrt(clamp(clipped / share, 1/4, 4))`: at most twice or half as wide. A loss clips less the wider
    its bounds are, so the scale comes to rest where `clipped == share`.

    Args:
        scale: Factor of the bounds in this step.
        clipped: Share of the tokens that were clipped in it, 0 to 1.
        share: The share that is wanted, above 0.
    """
    return scale * math.sqrt(min(max(clipped / share, 0.25), 4.0))


def learning_rates(config: OptimizerConfig, steps: int) -> Callable[[int], float]:
    """The learning rate of each step, counted from 1, by transformers' schedules.

    `lr * step / warmup` up to the last step of the warmup, or up to step 1 without one. Then, with the share
    p of the steps from there to the one after the last: lr, `lr (1 - p)` or `lr (1 + cos(pi p)) / 2`. So no
    step is lost to a rate of 0. It is a function of the step alone, and a resumed run needs no state of it.

    Args:
        config: The optimiser's settings.
        steps: Steps of the run.
    """
    name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    nothing = torch.optim.SGD([torch.zeros(1)], lr=1.0)  # only the shape of the schedule counts
    schedule = get_scheduler(
        name, nothing, num_warmup_steps=max(config.warmup_steps, 1), num_training_steps=steps + 1
    )
    (shape,) = schedule.lr_lambdas
    return lambda step: config.lr * float(shape(step))


class TreeLearner:
    """Trains a model on the trees of one step after another.

    Args:
        model: The model that learns.
        config: The run.
        folder: The run's folder, where a reference keeps its weights.
        report: Takes a line that a person should read.
        learners: The processes that train it together; what learns is then a copy of which each has a part.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        folder: Path,
        report: Callable[[str], None],
        learners: Learners | None = None,
    ) -> None:
        self._whole = model
        self._learners = learners or Learners()
        if self._learners.count > 1:
            model = shard(copy.deepcopy(model), self._learners)
        self.optimizer = make_optimizer(model, config.optimizer)
        if self._learners.count > 1:
            save_whole_moments(self.optimizer, self._learners)
        self._rate = learning_rates(config.optimizer, config.train.steps)
        self._config = config
        self._folder = folder
        self._report = report
        self._learner = Learner(
            model,
            self.optimizer,
            Objective.of(config.algorithm),
            token_budget=config.train.micro_batch_tokens,
            max_grad_norm=config.optimizer.max_grad_norm,
            temperature=config.rollout.temperature,
            autocast=None if config.train.autocast == "none" else getattr(torch, config.train.autocast),
            checkpointing=config.train.gradient_checkpointing,
            learners=self._learners,
        )
        if config.train.gradient_checkpointing:
            checkpoint_activations(model)
        self._pack: Callable[..., Batch] = pack_rows if config.train.packing == "rows" else pack_trees
        if config.train.packing == "auto":
            try:
                check_model(model)
            except ConfigError as error:
                report(f"training on rows: {error}")
                self._pack = pack_rows
        self._reference: Learner | None = None
        self._warned = False

    @property
    def clip_scale(self) -> float:
        """Factor of the loss's bounds in the next step; 1 unless `algorithm.clip_share` is set."""
        return self._learner.clip_scale

    @clip_scale.setter
    def clip_scale(self, scale: float) -> None:
        self._learner.clip_scale = scale

    def weights_changed(self) -> None:
        """Take over the model's weights, which something else changed; those of the first learner count."""
        if self._learners.count > 1:
            spread_weights(self._whole, self._learner.model)

    def with_kl(self, trees: Sequence[Tree], step: int) -> Sequence[Tree]:
        """The trees, with the KL to the reference taken from their rewards if the configuration says so."""
        config = self._config.algorithm
        if not config.kl_weight or config.kl_place != "reward":
            return trees
        return with_kl_in_reward(
            trees,
            self._frozen(step),
            weight=config.kl_weight,
            estimator=config.kl_estimator,
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
            Means of the updates' figures, learning_rate, how many updates there were, clip_scale where
            `algorithm.clip_share` is set, and the mismatch of
            sampler and learner (`Mismatch.read`), where a token could be compared.
        """
        config, learner = self._config.train, self._learner
        rate = self._rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if not trees:
            return {"learning_rate": rate, "updates": 0}

        # Minibatches of whole trees, in random order.
        generator = run_generator(self._config.run.seed, RunPurpose.MINIBATCHES, step)
        order = generator.permutation(len(trees))
        batches = [
            self._pack([trees[i] for i in chosen], [credits[i].advantages for i in chosen])
            for chosen in np.array_split(order, max(1, len(trees) // config.minibatch_questions))
        ]
        clock.lap("packing")

        old, measured = self._old_log_probs(batches)
        weighing: list[dict[str, float]] = []
        if config.importance_cap is not None:
            for i, batch in enumerate(batches):
                weights, about = importance_weights(
                    old[i].cpu(),
                    batch.sampled_log_probs,
                    batch.turn_ids,
                    cap=config.importance_cap,
                    level=learner.objective.level,
                )
                batches[i] = batch.with_advantages(batch.advantages * weights)
                weighing.append({name: float(value) for name, value in about.items()})
        clock.lap("old_log_probs")

        references: list[Tensor | None] = [None] * len(batches)
        if learner.objective.kl_weight:
            references = [self._frozen(step).log_probs(batch) for batch in batches]
        clock.lap("reference")

        # The first update measures the mismatch where that has not been done: it computes the log-probs of
        # its branches before it changes a weight.
        mismatch = None if measured else Mismatch()
        updates: list[dict[str, float]] = []
        device = next(learner.model.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else [], device_type="cuda"):
            torch.manual_seed(run_seed(self._config.run.seed, RunPurpose.DROPOUT, step))
            for epoch in range(config.epochs):
                for i in range(len(batches)) if epoch == 0 else generator.permutation(len(batches)):
                    first = None if updates else mismatch
                    updates.append(learner.update(batches[i], old[i], references[i], mismatch=first))
        if mismatch is not None:
            measured = mismatch.read(self._learners)
        if self._learners.count > 1:
            gather_weights(self._learner.model, self._whole)
        clock.lap("update")
        figures = {"learning_rate": rate, "updates": len(updates)}
        means = _means(updates)
        share = self._config.algorithm.clip_share
        if share is not None:
            figures["clip_scale"] = self.clip_scale
            if "clip_fraction" in means:  # not where every advantage was 0
                learner.clip_scale = next_clip_scale(self.clip_scale, means["clip_fraction"], share)
        return {**means, **_means(weighing), **self._judge(measured, step), **figures}

    def _frozen(self, step: int) -> Learner:
        """The reference, made when it is first asked for."""
        if self._reference is None:
            self._reference = reference_learner(
                self._learner, self._folder, started=step > 1, whole=self._whole
            )
        return self._reference

    def _old_log_probs(self, batches: Sequence[Batch]) -> tuple[list[Tensor], dict[str, float]]:
        """Old log-probs of each minibatch, and how far the sampler's are from the model's, if that is known.

        Recomputed ones are compared token by token. `auto` compares one micro-batch, and that is measured
        where the sampler's are taken. With `sampler` nothing is computed here, since measuring in the first
        update costs nothing. Only where none of its branches has an advantage, and nothing would be computed
        there, one micro-batch is.
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


def _means(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each figure over the updates that have it."""
    names = dict.fromkeys(name for update in updates for name in update)
    return {name: float(np.mean([update[name] for update in updates if name in update])) for name in names}
