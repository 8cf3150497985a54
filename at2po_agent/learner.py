"""The learner: log-probs of sampled tokens under the model, and optimiser updates from them.

Rows are sorted by length and cut into micro-batches by their tokens; logits exist only where a token is
trained. The loss of a minibatch does not depend on the cut, since losses divide by the totals of the
minibatch. Rows whose advantages are all zero add nothing to the gradient and are not computed.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from at2po_agent.losses.base import LossTotals
from at2po_agent.losses.kl import Estimator, kl_penalty
from at2po_agent.packing import Batch, iter_micro_batches
from at2po_agent.settings import OptimizerSettings
from at2po_env.errors import At2poError, ConfigError

LossFunction = Callable[..., tuple[Tensor, Mapping[str, Any]]]


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
    """

    loss: LossFunction
    divisible: bool = True
    needs_advantage: bool = True
    needs_entropy: bool = False
    kl_weight: float = 0.0
    kl_estimator: Estimator = "k3"


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW over all trainable parameters."""
    return torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
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

    def log_probs(self, batch: Batch) -> Tensor:
        """`trained_log_probs` of all rows without gradient, a micro-batch at a time; float32[B, T]."""
        out = torch.zeros(batch.turn_ids.shape, dtype=torch.float32, device=batch.turn_ids.device)
        with torch.no_grad():
            for rows, piece in iter_micro_batches(batch, self.token_budget):
                length = piece.turn_ids.shape[1]
                out[rows, :length] = self._forward(piece)
        return out

    def entropies(self, batch: Batch) -> Tensor:
        """`trained_entropies` of all rows without gradient, a micro-batch at a time; float32[B, T]."""
        out = torch.zeros(batch.turn_ids.shape, dtype=torch.float32, device=batch.turn_ids.device)
        with torch.no_grad():
            for rows, piece in iter_micro_batches(batch, self.token_budget):
                values = trained_entropies(self.model, piece, temperature=self.temperature)
                out[rows, : piece.turn_ids.shape[1]] = values
        return out

    def update(
        self, batch: Batch, old_log_probs: Tensor, ref_log_probs: Tensor | None = None
    ) -> dict[str, float]:
        """One optimiser step on a minibatch.

        Args:
            batch: All rows of the minibatch, on the model's device.
            old_log_probs: float32[B, T], nats.
            ref_log_probs: float32[B, T], nats, of the reference; needed where the objective has a KL term.

        Returns:
            loss, grad_norm, and the loss's own metrics as means over the computed rows.

        Raises:
            TrainingError: The gradient is not finite.
        """
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        self.model.train(self.checkpointing)
        total, figures = self._backward(batch, old_log_probs, ref_log_probs)
        self.model.eval()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        figures |= {"loss": float(total), "grad_norm": float(norm)}
        if not math.isfinite(figures["grad_norm"]):
            self.optimizer.zero_grad(set_to_none=True)
            raise TrainingError(
                f"the gradient is not finite (loss {figures['loss']}); the weights are unchanged. "
                "Fix: lower optimizer.lr, or look for nan in rewards and log-probs"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return figures

    def _forward(self, piece: Batch) -> Tensor:
        device = piece.turn_ids.device.type
        with torch.autocast(device, dtype=self.autocast, enabled=self.autocast is not None):
            return trained_log_probs(self.model, piece, temperature=self.temperature)

    def _backward(
        self, batch: Batch, old_log_probs: Tensor, ref_log_probs: Tensor | None = None
    ) -> tuple[Tensor, dict[str, float]]:
        entropies = self.entropies(batch) if self.objective.needs_entropy else None
        totals = LossTotals.of(batch.turn_ids, entropies)
        total = torch.zeros((), device=old_log_probs.device)
        sums: dict[str, Any] = {}
        computed = torch.zeros((), device=old_log_probs.device)
        for rows, piece in self._pieces(batch):
            length = piece.turn_ids.shape[1]
            log_probs = self._forward(piece)
            loss, metrics = self.objective.loss(
                log_probs,
                old_log_probs[rows, :length],
                piece.advantages,
                piece.turn_ids,
                **({"totals": totals} if self.objective.divisible else {}),
                **({} if entropies is None else {"entropies": entropies[rows, :length]}),
            )
            if self.objective.kl_weight:
                assert ref_log_probs is not None, "a KL term needs the reference's log-probs"
                reference = ref_log_probs[rows, :length]
                kl, about_kl = kl_penalty(
                    log_probs,
                    reference,
                    piece.turn_ids,
                    estimator=self.objective.kl_estimator,
                    totals=totals,
                )
                loss, metrics = loss + self.objective.kl_weight * kl, {**metrics, **about_kl}
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
            computed += (piece.turn_ids >= 0).sum()
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + value
        scale = totals.tokens / max(float(computed), 1.0)
        return total, {name: float(value) * scale for name, value in sums.items()}

    def _pieces(self, batch: Batch) -> Iterator[tuple[Tensor, Batch]]:
        kept = _rows_with_advantage(batch) if self.objective.needs_advantage else None
        budget = self.token_budget if self.objective.divisible else batch.turn_ids.numel()
        return iter_micro_batches(batch, budget, rows=kept)


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
    trained = batch.turn_ids[:, 1:] >= 0
    logits = _tempered(_logits_where(model, batch, trained), temperature)
    chosen = -functional.cross_entropy(logits, batch.input_ids[:, 1:][trained], reduction="none")
    out = torch.zeros(batch.input_ids.shape, dtype=chosen.dtype, device=chosen.device)
    return out.masked_scatter(functional.pad(trained, (1, 0)), chosen)


def trained_entropies(model: nn.Module, batch: Batch, *, temperature: float = 1.0) -> Tensor:
    """Entropy of the distribution that each trained token was drawn from; arguments of `trained_log_probs`.

    Returns:
        float32[B, T] in nats, 0 where turn id is -1.
    """
    trained = batch.turn_ids[:, 1:] >= 0
    log_probs = _tempered(_logits_where(model, batch, trained), temperature).log_softmax(dim=-1)
    values = -(log_probs.exp() * log_probs).nan_to_num(0.0).sum(dim=-1)
    out = torch.zeros(batch.input_ids.shape, dtype=values.dtype, device=values.device)
    return out.masked_scatter(functional.pad(trained, (1, 0)), values)


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    logits = logits.float()
    return logits if temperature in (0.0, 1.0) else logits / temperature


def _rows_with_advantage(batch: Batch) -> Tensor:
    return torch.nonzero((batch.advantages != 0).any(dim=1)).flatten()


def _logits_where(model: nn.Module, batch: Batch, trained: Tensor) -> Tensor:
    """Logits float[S, V] that predict the trained tokens, in row-major order."""
    decoder, head = _decoder_and_head(model)
    if decoder is None or head is None:
        logits: Tensor = model(input_ids=batch.input_ids).logits
        return logits[:, :-1][trained]
    hidden = decoder(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    selected: Tensor = head(hidden[:, :-1][trained])
    return selected


def _decoder_and_head(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    get_head = getattr(model, "get_output_embeddings", None)
    get_decoder = getattr(model, "get_decoder", None)
    if get_head is None or get_decoder is None:
        return None, None
    return get_decoder(), get_head()
