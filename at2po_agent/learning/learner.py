"""The learner: log-probs of sampled tokens under the model, and optimiser updates from them.

A minibatch (`packing.batch`) is cut into micro-batches by their tokens; logits exist only where a token is
trained. The loss of a minibatch does not depend on the cut, since losses divide by the totals of the
minibatch. Branches whose advantages are all zero add nothing to the gradient and are not computed.

Batches are cut on the host, and whatever depends on the contents of a tensor is worked out there. With a
fused optimiser nothing waits for the device until an update is complete; then one transfer brings its
figures. (With rows, transformers waits once in each forward pass: it looks into the positions for packed
sequences.)

Several learners hold the same minibatch. Each computes the branches of some trees, and they add up what they
found: log-probs, figures, and, in the sharded model, gradients. Nothing else here knows that there are more.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from at2po_agent.cluster.learners import Learners, share_out
from at2po_agent.config.sections import AlgorithmConfig, OptimizerConfig
from at2po_agent.learning.mismatch import Mismatch
from at2po_agent.losses import LossTotals, RatioLevel, drift_metrics, get_loss, kl_penalty, make_loss
from at2po_agent.losses.kl import Estimator
from at2po_agent.packing.batch import Batch, MicroBatch, move
from at2po_agent.policies.weights import adapter_dropouts
from at2po_env.errors import At2poError, ConfigError

LossFunction = Callable[..., tuple[Tensor, Mapping[str, Any]]]

_WHOLE = 1 << 62
"""The budget of a minibatch that must not be cut."""


class TrainingError(At2poError):
    """An update cannot be made; the weights are as they were before it."""


class Objective(NamedTuple):
    """A loss with its options bound.

    Attributes:
        loss: `loss(log_probs, old_log_probs, advantages, turn_ids, *, totals) -> (loss, metrics)`.
        divisible: Whether it takes `totals`: then the losses of micro-batches add up. One that does not gets
            each minibatch whole.
        needs_advantage: Whether a row without advantage adds neither loss nor gradient.
        needs_entropy: Whether it takes `entropies`, those of the policy when the update begins.
        kl_weight: Weight of the KL to the reference that is added to it.
        kl_estimator: The KL's estimator.
        level: Whose tokens make one importance ratio.
        bounds: clip_low and clip_high of the loss, where `clip_share` moves them; else empty.
    """

    loss: LossFunction
    divisible: bool = True
    needs_advantage: bool = True
    needs_entropy: bool = False
    kl_weight: float = 0.0
    kl_estimator: Estimator = "k3"
    level: RatioLevel = "token"
    bounds: Mapping[str, float] = MappingProxyType({})

    @classmethod
    def of(cls, config: AlgorithmConfig) -> Self:
        """The loss that a configuration names, with its options."""
        spec = get_loss(config.loss)
        built_in = spec.function.__module__.startswith("at2po_agent.losses.")
        kl_weight = config.kl_weight if config.kl_place == "loss" else 0.0
        return cls(
            make_loss(config.loss, config.loss_options),
            divisible="totals" in inspect.signature(spec.function).parameters,
            needs_advantage=built_in and not kl_weight,
            needs_entropy="entropies" in spec.requires,
            kl_weight=kl_weight,
            kl_estimator=config.kl_estimator,
            level=spec.level,
            bounds={}
            if config.clip_share is None
            else {name: {**spec.options, **config.loss_options}[name] for name in ("clip_low", "clip_high")},
        )


class Learner:
    """A model under an objective.

    Attributes:
        model: Changed in place by `update`.
        optimizer: Over the model's parameters.
        objective: The loss.
        token_budget: Most tokens, padding included, that go through the model at once.
        max_grad_norm: Gradients are scaled down to this norm.
        temperature: Logits are divided by it, as in sampling; 0 counts as 1.
        autocast: Number format of the matrix products; None is that of the weights.
        checkpointing: Whether the model recomputes activations, which transformers does in train mode only.
        clip_scale: Factor of the objective's bounds.
        learners: The processes that compute minibatches together; the model is then sharded among them.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        *,
        token_budget: int,
        max_grad_norm: float,
        temperature: float = 1.0,
        autocast: torch.dtype | None = None,
        checkpointing: bool = False,
        learners: Learners | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.objective = objective
        self.token_budget = token_budget
        self.max_grad_norm = max_grad_norm
        self.temperature = temperature or 1.0
        self.autocast = autocast
        self.checkpointing = checkpointing
        self.clip_scale = 1.0
        self.learners = learners or Learners()

    def update(
        self,
        batch: Batch,
        old_log_probs: Tensor,
        ref_log_probs: Tensor | None = None,
        *,
        mismatch: Mismatch | None = None,
    ) -> dict[str, float]:
        """One optimiser step on a minibatch: its gradient, clipped, and new weights.

        Args:
            batch: The minibatch.
            old_log_probs: float32[B, T], nats.
            ref_log_probs: float32[B, T], nats, of the reference; needed where the objective has a KL term.
            mismatch: Takes the log-probs that the update computes (before it changes the weights) beside
                those of the sampler.

        Returns:
            loss, grad_norm, update_norm (the L2 norm of the change of all weights), and the loss's own
            metrics as means over the computed rows.

        Raises:
            TrainingError: The gradient is not finite.
        """
        figures = self.backward(batch, old_log_probs, ref_log_probs, mismatch=mismatch)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        figures["grad_norm"] = norm = getattr(norm, "full_tensor", lambda: norm)()  # of all shards
        # What an update changes is measured on the weights: in half precision they round small changes away,
        # which no figure of the optimiser shows. The copy lies where the activations were.
        weights = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        before = [weight.detach().clone() for weight in weights]

        # The weights must not change when the norm is not finite. Reading the norm waits for the device, so a
        # fused optimiser gets the test as a tensor: its kernel skips the step itself where found_inf is 1.
        fused = bool(self.optimizer.param_groups[0].get("fused"))
        if fused:
            self.optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
            self.optimizer.step()
            figures["update_norm"] = weight_change(before, weights)
        scalars = [
            torch.as_tensor(value, dtype=torch.float32, device=norm.device) for value in figures.values()
        ]
        read = dict(zip(figures, torch.stack(scalars).tolist(), strict=True))  # the one transfer
        finite = math.isfinite(read["grad_norm"])
        if finite and not fused:
            self.optimizer.step()
            read["update_norm"] = float(weight_change(before, weights))
        self.optimizer.zero_grad(set_to_none=True)
        if not finite:
            raise TrainingError(
                f"the gradient is not finite (loss {read['loss']}); the weights are unchanged. "
                "Fix: lower optimizer.lr, or look for nan in rewards and log-probs"
            )
        return read

    def backward(
        self,
        batch: Batch,
        old_log_probs: Tensor,
        ref_log_probs: Tensor | None = None,
        *,
        mismatch: Mismatch | None = None,
    ) -> dict[str, Any]:
        """Put the gradient of a minibatch's loss in the place of the parameters' gradients.

        Args and figures are those of `update`, without grad_norm; the figures are scalars on the device.
        """
        objective, device = self.objective, self._device
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        entropies = self.entropies(batch) if objective.needs_entropy else None
        self.model.train(self.checkpointing)
        for dropout in adapter_dropouts(self.model):
            dropout.train()
        totals = LossTotals.of(batch.turn_ids, entropies)
        old = move(old_log_probs, device)
        ref = None if ref_log_probs is None else move(ref_log_probs, device)
        rows = (
            torch.nonzero((batch.advantages != 0).any(dim=1)).flatten() if objective.needs_advantage else None
        )
        budget = self.token_budget if objective.divisible else _WHOLE
        bounds = {name: self.clip_scale * bound for name, bound in objective.bounds.items()}

        total, sums, computed = torch.zeros((), device=device), dict[str, Any](), 0
        with batch.attention(self.model):
            for chosen, micro, filler in self._pieces(batch, budget, rows):
                computed += 0 if filler else int((micro.turn_ids >= 0).sum())
                here = micro.to(device)
                # The chosen branches' part of a tensor of the whole minibatch, as wide as the micro-batch.
                part = (move(chosen, device), slice(micro.turn_ids.shape[1]))
                log_probs = self._log_probs(here)
                if mismatch is not None and not filler:
                    mismatch.add(log_probs, here.sampled_log_probs, here.turn_ids)
                loss, metrics = objective.loss(
                    log_probs,
                    old[part],
                    here.advantages,
                    here.turn_ids,
                    **bounds,
                    **({"totals": totals} if objective.divisible else {}),
                    **({} if entropies is None else {"entropies": entropies[part]}),
                )
                moved = drift_metrics(log_probs.detach(), old[part], here.turn_ids, totals=totals)
                metrics = {**moved, **metrics}
                if objective.kl_weight:
                    assert ref is not None, "a KL term needs the reference's log-probs"
                    kl, about_kl = kl_penalty(
                        log_probs, ref[part], here.turn_ids, estimator=objective.kl_estimator, totals=totals
                    )
                    loss, metrics = loss + objective.kl_weight * kl, {**metrics, **about_kl}
                # A sharded model takes the mean of the learners' gradients, and their sum is wanted.
                weight = 0 if filler else self.learners.count
                (weight * loss).backward()  # type: ignore[no-untyped-call]
                total += 0.0 if filler else loss.detach()
                for name, value in metrics.items():
                    sums[name] = sums.get(name, 0.0) + (0.0 if filler else value)
        self.model.eval()
        if self.learners.count > 1:
            # A learner without branches computed a filler, so all have the same metrics.
            found = [torch.as_tensor(value, device=device) for value in (total, computed, *sums.values())]
            total, tokens, *rest = self.learners.sum(torch.stack([value.double() for value in found]))
            computed, sums = int(tokens), dict(zip(sums, rest, strict=True))
        # Metrics are means over the minibatch, of which rows without advantage were not computed.
        scale = totals.tokens / max(computed, 1)
        return {"loss": total} | {name: value * scale for name, value in sums.items()}

    def log_probs(self, batch: Batch) -> Tensor:
        """Log-probs of all trained tokens without gradient, a micro-batch at a time; float32[B, T]."""
        return self._without_gradient(batch, self._log_probs)

    def entropies(self, batch: Batch) -> Tensor:
        """Entropies of all trained tokens without gradient, a micro-batch at a time; float32[B, T]."""

        def entropies(here: MicroBatch) -> Tensor:
            with self._number_format():
                return here.entropies(self.model, temperature=self.temperature)

        return self._without_gradient(batch, entropies)

    @torch.no_grad()
    def first_mismatch(self, batch: Batch) -> dict[str, float]:
        """How far the sampler's log-probs are from the model's, judged by one micro-batch (`Mismatch.read`).

        Args:
            batch: Sampled with the model's weights.
        """
        found = Mismatch()
        with batch.attention(self.model):
            _, micro = next(batch.micro_batches(self.token_budget))
            here = micro.to(self._device)
            found.add(self._log_probs(here), here.sampled_log_probs, here.turn_ids)
        return found.read()

    @torch.no_grad()
    def _without_gradient(self, batch: Batch, function: Callable[[MicroBatch], Tensor]) -> Tensor:
        out = torch.zeros(batch.turn_ids.shape, dtype=torch.float32, device=self._device)
        with batch.attention(self.model):
            for rows, micro, filler in self._pieces(batch, self.token_budget):
                here = micro.to(self._device)
                found = function(here).float()
                if not filler:
                    out[move(rows, self._device), : here.turn_ids.shape[1]] = found
        return self.learners.sum(out)  # a branch was computed by one learner, and is 0 in the others' tensors

    def _pieces(
        self, batch: Batch, budget: int, rows: Tensor | None = None
    ) -> Iterator[tuple[Tensor, MicroBatch, bool]]:
        """The micro-batches that this learner computes of some branches, or of all.

        Every pass through a sharded model is one of all learners. So all get equally many micro-batches: who
        has fewer computes the shortest branch again.

        Yields:
            As `Batch.micro_batches`, and whether the micro-batch is such a filler, which counts nowhere.
        """
        if self.learners.count == 1:
            yield from ((chosen, micro, False) for chosen, micro in batch.micro_batches(budget, rows=rows))
            return
        every = torch.arange(len(batch.turn_ids)) if rows is None else rows
        trees = batch.trees[every]
        groups = [every[trees == tree] for tree in dict.fromkeys(trees.tolist())]
        owners = share_out([batch.tokens(group) for group in groups], self.learners.count)
        mine = [group for group, owner in zip(groups, owners, strict=True) if owner == self.learners.rank]
        cuts = list(batch.micro_batches(budget, rows=torch.cat(mine))) if mine else []
        most = int(self.learners.largest(torch.tensor(len(cuts))))
        yield from ((chosen, micro, False) for chosen, micro in cuts)
        if most > len(cuts):
            shortest = min(range(len(batch.turn_ids)), key=lambda row: batch.tokens(torch.tensor([row])))
            chosen, micro = next(iter(batch.micro_batches(budget, rows=torch.tensor([shortest]))))
            yield from [(chosen, micro, True)] * (most - len(cuts))

    def _log_probs(self, here: MicroBatch) -> Tensor:
        with self._number_format():
            return here.log_probs(self.model, temperature=self.temperature)

    def _number_format(self) -> torch.autocast:
        return torch.autocast(self._device.type, dtype=self.autocast, enabled=self.autocast is not None)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def weight_change(before: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """L2 norm of the change of all weights, over all shards, on their device; `before` is overwritten."""
    for old, new in zip(before, weights, strict=True):
        old.sub_(new.detach())
    norm: Tensor = nn.utils.get_total_norm(before)
    whole: Tensor = getattr(norm, "full_tensor", lambda: norm)()
    return whole


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over all trainable parameters, as one fused kernel where torch has one."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    return torch.optim.AdamW(
        parameters,
        fused=fused and type(parameters[0]) is nn.Parameter,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
    )


def checkpoint_activations(model: nn.Module) -> None:
    """Let a model recompute its activations in the backward pass (transformers' new name, else the old one).

    Raises:
        ConfigError: It cannot.
    """
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is not None:
        enable()
        return
    enable = getattr(model, "gradient_checkpointing_enable", None)
    if enable is None:
        raise ConfigError(
            f"train.gradient_checkpointing: {type(model).__name__} has no gradient_checkpointing_enable"
        )
    enable(gradient_checkpointing_kwargs={"use_reentrant": False})
