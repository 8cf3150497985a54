"""The learner: log-probs of sampled tokens under the model, and optimiser updates from them.

A minibatch is a `PackedBatch`, which computes every token that branches share once, or a `Batch` of rows.
Both are cut into micro-batches by their tokens; logits exist only where a token is trained. The loss of a
minibatch does not depend on the cut, since losses divide by the totals of the minibatch. Branches whose
advantages are all zero add nothing to the gradient and are not computed.

Batches are cut on the host, and whatever depends on what a tensor holds is worked out there. With a fused
optimiser nothing waits for the device until an update is complete; then one transfer brings its figures.
(With rows, transformers waits once in each forward pass: it looks into the positions for packed sequences.)
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from at2po_agent.config.sections import OptimizerConfig
from at2po_agent.learning.mismatch import Mismatch
from at2po_agent.losses.base import LossTotals, RatioLevel
from at2po_agent.losses.kl import Estimator, kl_penalty
from at2po_agent.losses.metrics import drift_metrics
from at2po_agent.packing.forward import check_model, head_of, logits_at, packed_stats
from at2po_agent.packing.rows import Batch, move
from at2po_agent.packing.tree_attention import tree_attention
from at2po_agent.packing.trees import PackedBatch, PackedPiece
from at2po_env.errors import At2poError, ConfigError

LossFunction = Callable[..., tuple[Tensor, Mapping[str, Any]]]

_WHOLE = 1 << 62


class TrainingError(At2poError):
    """An update cannot be made; the weights are as they were before it."""


class Objective(NamedTuple):
    """A loss with its options bound.

    Attributes:
        loss: `loss(log_probs, old_log_probs, advantages, turn_ids, *, totals) -> (loss, metrics)`.
        divisible: Whether it takes `totals`: then the losses of the pieces of a minibatch add up. One that
            does not gets each minibatch whole.
        needs_advantage: Whether a row without advantage adds neither loss nor gradient.
        needs_entropy: Whether it takes `entropies`, those of the policy when the update begins.
        kl_weight: Weight of the KL to the reference that is added to it.
        kl_estimator: The KL's estimator.
        level: Whose tokens make one importance ratio.
    """

    loss: LossFunction
    divisible: bool = True
    needs_advantage: bool = True
    needs_entropy: bool = False
    kl_weight: float = 0.0
    kl_estimator: Estimator = "k3"
    level: RatioLevel = "token"


def make_optimizer(model: nn.Module, settings: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over all trainable parameters, as one fused kernel where torch has one."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    return torch.optim.AdamW(
        parameters,
        fused=fused and type(parameters[0]) is nn.Parameter,
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
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


@dataclass(frozen=True)
class Learner:
    """A model under an objective.

    Attributes:
        model: Changed in place by `update`.
        optimizer: Over the model's parameters.
        objective: The loss.
        token_budget: Most tokens, padding included, that go through the model at once.
        max_grad_norm: Gradients are scaled down to this norm.
        temperature: What the logits are divided by, as in sampling; 0 counts as 1.
        autocast: Number format of the matrix products; None is that of the weights.
        checkpointing: Whether the model recomputes activations, which transformers does in train mode only.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    objective: Objective
    token_budget: int
    max_grad_norm: float
    temperature: float = 1.0
    autocast: torch.dtype | None = None
    checkpointing: bool = False

    def log_probs(self, batch: Batch | PackedBatch) -> Tensor:
        """Log-probs of all trained tokens without gradient, a micro-batch at a time; float32[B, T]."""
        return self._without_gradient(batch, self._forward)

    def entropies(self, batch: Batch | PackedBatch) -> Tensor:
        """Entropies of all trained tokens without gradient, a micro-batch at a time; float32[B, T]."""
        return self._without_gradient(batch, self._entropies)

    def first_mismatch(self, batch: Batch | PackedBatch) -> dict[str, float]:
        """How far the sampler's log-probs are from the model's, judged by one micro-batch (`Mismatch.read`).

        Args:
            batch: Sampled with the model's weights.
        """
        found = Mismatch()
        with torch.no_grad(), self._attention(batch):
            pieces: Iterator[tuple[Tensor, Batch | PackedPiece]] = batch.micro_batches(self.token_budget)
            here = next(pieces)[1].to(self._device)
            found.add(self._forward(here), here.sampled_log_probs, here.turn_ids)
        return found.read()

    def update(
        self,
        batch: Batch | PackedBatch,
        old_log_probs: Tensor,
        ref_log_probs: Tensor | None = None,
        *,
        mismatch: Mismatch | None = None,
    ) -> dict[str, float]:
        """One optimiser step on a minibatch.

        Args:
            batch: The minibatch.
            old_log_probs: float32[B, T], nats.
            ref_log_probs: float32[B, T], nats, of the reference; needed where the objective has a KL term.
            mismatch: Takes the log-probs that the update computes (before it changes the weights) beside
                those of the sampler.

        Returns:
            loss, grad_norm, and the loss's own metrics as means over the computed rows.

        Raises:
            TrainingError: The gradient is not finite.
        """
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        self.model.train(self.checkpointing)
        figures = self._backward(batch, old_log_probs, ref_log_probs, mismatch)
        self.model.eval()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        figures["grad_norm"] = getattr(norm, "full_tensor", lambda: norm)()
        return self._step(figures)

    def _step(self, figures: dict[str, Any]) -> dict[str, float]:
        """Let the optimiser step unless the gradient's norm is not finite, and read the figures."""
        fused = bool(self.optimizer.param_groups[0].get("fused"))
        if fused:
            # The kernel itself skips the step where found_inf is 1, so that nobody has to wait for the norm.
            infinite = (~torch.isfinite(figures["grad_norm"])).float()
            self.optimizer.found_inf = infinite  # type: ignore[attr-defined]
            self.optimizer.step()
        read = _read(figures)
        finite = math.isfinite(read["grad_norm"])
        if finite and not fused:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if not finite:
            raise TrainingError(
                f"the gradient is not finite (loss {read['loss']}); the weights are unchanged. "
                "Fix: lower optimizer.lr, or look for nan in rewards and log-probs"
            )
        return read

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _attention(self, batch: Batch | PackedBatch) -> AbstractContextManager[None]:
        if not isinstance(batch, PackedBatch):
            return nullcontext()
        check_model(self.model)
        return tree_attention(self.model)

    def _without_gradient(
        self, batch: Batch | PackedBatch, function: Callable[[Batch | PackedPiece], Tensor]
    ) -> Tensor:
        out = torch.zeros(batch.turn_ids.shape, dtype=torch.float32, device=self._device)
        with torch.no_grad(), self._attention(batch):
            for rows, piece in batch.micro_batches(self.token_budget):
                here = piece.to(self._device)
                out[move(rows, self._device), : here.turn_ids.shape[1]] = function(here).float()
        return out

    def _entropies(self, piece: Batch | PackedPiece) -> Tensor:
        with self._number_format(piece):
            if isinstance(piece, PackedPiece):
                return packed_stats(
                    self.model, piece, temperature=self.temperature, with_entropies=True
                ).entropies
            return trained_entropies(self.model, piece, temperature=self.temperature)

    def _number_format(self, piece: Batch | PackedPiece) -> AbstractContextManager[Any]:
        device = piece.turn_ids.device.type
        return torch.autocast(device, dtype=self.autocast, enabled=self.autocast is not None)

    def _forward(self, piece: Batch | PackedPiece) -> Tensor:
        with self._number_format(piece):
            if isinstance(piece, PackedPiece):
                return packed_stats(self.model, piece, temperature=self.temperature).log_probs
            return trained_log_probs(self.model, piece, temperature=self.temperature)

    def _backward(
        self,
        batch: Batch | PackedBatch,
        old_log_probs: Tensor,
        ref_log_probs: Tensor | None = None,
        mismatch: Mismatch | None = None,
    ) -> dict[str, Any]:
        device = self._device
        entropies = self.entropies(batch) if self.objective.needs_entropy else None
        totals = LossTotals.of(batch.turn_ids, entropies)
        given = [t if t is None else move(t, device) for t in (old_log_probs, ref_log_probs, entropies)]
        total = torch.zeros((), device=device)
        sums: dict[str, Any] = {}
        computed = 0
        with self._attention(batch):
            for rows, piece in self._pieces(batch):
                computed += int((piece.turn_ids >= 0).sum())
                here, width = piece.to(device), piece.turn_ids.shape[1]
                index = move(rows, device)
                old, ref, entropy = (t if t is None else t[index, :width] for t in given)
                log_probs = self._forward(here)
                if mismatch is not None:
                    mismatch.add(log_probs, here.sampled_log_probs, here.turn_ids)
                loss, metrics = self._loss(log_probs, here, old, ref, entropy, totals=totals)
                loss.backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
                for name, value in metrics.items():
                    sums[name] = sums.get(name, 0.0) + value
        scale = totals.tokens / max(computed, 1)
        return {"loss": total} | {name: value * scale for name, value in sums.items()}

    def _loss(
        self,
        log_probs: Tensor,
        piece: Batch | PackedPiece,
        old_log_probs: Tensor | None,
        ref_log_probs: Tensor | None,
        entropies: Tensor | None,
        *,
        totals: LossTotals,
    ) -> tuple[Tensor, Mapping[str, Any]]:
        objective = self.objective
        loss, metrics = objective.loss(
            log_probs,
            old_log_probs,
            piece.advantages,
            piece.turn_ids,
            **({"totals": totals} if objective.divisible else {}),
            **({} if entropies is None else {"entropies": entropies}),
        )
        if old_log_probs is not None:
            moved = drift_metrics(log_probs.detach(), old_log_probs, piece.turn_ids, totals=totals)
            metrics = {**moved, **metrics}
        if not objective.kl_weight:
            return loss, metrics
        assert ref_log_probs is not None, "a KL term needs the reference's log-probs"
        kl, about_kl = kl_penalty(
            log_probs, ref_log_probs, piece.turn_ids, estimator=objective.kl_estimator, totals=totals
        )
        return loss + objective.kl_weight * kl, {**metrics, **about_kl}

    def _pieces(self, batch: Batch | PackedBatch) -> Iterator[tuple[Tensor, Batch | PackedPiece]]:
        kept = _rows_with_advantage(batch) if self.objective.needs_advantage else None
        return batch.micro_batches(self.token_budget if self.objective.divisible else _WHOLE, rows=kept)


def trained_log_probs(model: nn.Module, batch: Batch, *, temperature: float = 1.0) -> Tensor:
    """Log-probs of the trained tokens under the model.

    Rows are padded on the right, so a causal model needs no mask: no token sees padding.

    Args:
        model: A causal language model of transformers, or any module whose output has `logits`.
        batch: Rows on the model's device.
        temperature: What the logits are divided by; 0 counts as 1.

    Returns:
        float32[B, T] in nats: entry t is the log-prob of token t given the tokens before it, 0 where turn id
        is -1.
    """
    places = batch.find_places()
    logits = _tempered(_logits_before(model, batch, places), temperature)
    chosen = -functional.cross_entropy(logits, batch.input_ids.flatten()[places], reduction="none")
    return _in_rows(chosen, batch, places)


def trained_entropies(model: nn.Module, batch: Batch, *, temperature: float = 1.0) -> Tensor:
    """Entropy of the distribution that each trained token was drawn from; arguments of `trained_log_probs`.

    Returns:
        float32[B, T] in nats, 0 where turn id is -1.
    """
    places = batch.find_places()
    log_probs = _tempered(_logits_before(model, batch, places), temperature).log_softmax(dim=-1)
    values = -(log_probs.exp() * log_probs).nan_to_num(0.0).sum(dim=-1)
    return _in_rows(values, batch, places)


def _in_rows(per_token: Tensor, batch: Batch, places: Tensor) -> Tensor:
    """Numbers float[S] at their places in rows float[B, T] of zeros."""
    out = torch.zeros(batch.input_ids.numel(), dtype=per_token.dtype, device=per_token.device)
    return out.index_put((places,), per_token).view(batch.input_ids.shape)


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    logits = logits.float()
    return logits if temperature in (0.0, 1.0) else logits / temperature


def _rows_with_advantage(batch: Batch | PackedBatch) -> Tensor:
    return torch.nonzero((batch.advantages != 0).any(dim=1)).flatten()


def _read(figures: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of scalars on a device, in one transfer."""
    device = figures["grad_norm"].device
    scalars = [torch.as_tensor(value, dtype=torch.float32, device=device) for value in figures.values()]
    return dict(zip(figures, torch.stack(scalars).tolist(), strict=True))


def _logits_before(model: nn.Module, batch: Batch, places: Tensor) -> Tensor:
    """Logits float[S, V] of the tokens before the given places, which predict those there."""
    if head_of(model) is None:
        logits: Tensor = model(input_ids=batch.input_ids).logits
        return logits.flatten(0, 1)[places - 1]
    return logits_at(
        model, lambda hidden: hidden.flatten(0, 1)[places - 1], input_ids=batch.input_ids, use_cache=False
    )
