"""Draws tokens: from the logits of a step to the next token of every active request.

A draw inverts the distribution function at a uniform of the request's own stream, so it depends on nothing
else that is in the batch. `HFPolicy` calls `choose`; vLLM's logits processor calls `draw_tokens`.
Below them stand pure tensor functions without state or generator.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from at2po_agent.policies.base import NextToken, Request
from at2po_agent.policies.stops import StopTable
from at2po_agent.types import Generation, StopReason
from at2po_env.errors import PolicyError

_DRAWS_AT_ONCE = 64
_LARGEST_UNIFORM = 1.0 - 2.0**-22  # below the sum of a float32 CDF whatever its rounding
_BLOCK = 1024


class Draws(list[float]):
    """Holds a request's uniform draws so far: the float64 stream in [0, 1) of Philox with key `seed`."""

    __slots__ = ("_generator",)

    def __init__(self, seed: int) -> None:
        self._generator = np.random.Generator(np.random.Philox(key=seed))
        super().__init__()
        self.more()

    def more(self) -> None:
        """Append the next 64 draws."""
        self += self._generator.random(_DRAWS_AT_ONCE).tolist()


@dataclass(kw_only=True, eq=False, slots=True)
class ActiveRequest:
    """A request under way and the tokens that it has so far.

    Attributes:
        request: The request.
        stop: Number of its stop strings in the stop table.
        version: Version of the weights that sample its first token.
        draws: Uniform draws, one per token; always one more than there are ids.
        ids: Generated ids.
        log_probs: Log-probs of `ids` in nats.
        forced: Positions in `ids` that were forced.
        pending: Ids that an intervention has still to force.
        plain: Whether it samples from the model itself: temperature 1, top-p 1, no intervention.
    """

    request: Request
    stop: int = 0
    version: int = 0
    draws: Draws = field(init=False)
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    forced: list[int] = field(default_factory=list)
    pending: deque[int] = field(default_factory=deque)
    plain: bool = field(init=False)

    def __post_init__(self) -> None:
        request = self.request
        self.draws = Draws(request.seed)
        self.plain = request.temperature == request.top_p == 1.0 and request.intervention is None

    def generation(self, reason: StopReason) -> Generation:
        """Return what was generated so far as the answer to the request."""
        sampled = None
        if self.forced:
            sampled = np.ones(len(self.ids), dtype=np.bool_)
            sampled[self.forced] = False
        log_probs = np.array(self.log_probs, dtype=np.float32)
        return Generation(tuple(self.ids), log_probs, reason, sampled, self.version)


RequestT = TypeVar("RequestT", bound=ActiveRequest)


class Draw(NamedTuple):
    """tokens: int64[B]; log_probs: float32[B], nats."""

    tokens: Tensor
    log_probs: Tensor


def choose(active: Sequence[RequestT], logits: Tensor, stops: StopTable) -> list[tuple[RequestT, StopReason]]:
    """Append one token to each request; returns the requests that it ends.

    Args:
        active: B requests, in the order of `logits`.
        logits: float[B, V].
        stops: When generations end.

    Raises:
        FloatingPointError: The logits are not finite; no request has changed.
        PolicyError: An intervention forced an id outside the vocabulary.
    """
    drawn, forced = draw_tokens(active, logits)
    # One transfer for both: float64 holds every id exactly.
    both = torch.stack([drawn.tokens.double(), drawn.log_probs.double()]).cpu().numpy()
    if not np.isfinite(both[1]).all():
        raise FloatingPointError("the model's log-probs are not finite; its weights hold nan")
    tokens = both[0].astype(np.int64)
    # Most tokens cannot end anything: one look-up for the batch spares decoding them.
    may_end = stops.candidates[[one.stop for one in active], tokens].tolist()
    ended: list[tuple[RequestT, StopReason]] = []
    for one, token, log_prob, candidate in zip(
        active, tokens.tolist(), both[1].tolist(), may_end, strict=True
    ):
        ids = one.ids
        ids.append(token)
        one.log_probs.append(log_prob)
        if len(ids) == len(one.draws):
            one.draws.more()
        reason = stops.ends(one.stop, ids) if candidate else None
        if reason is None and len(ids) >= one.request.max_tokens:
            reason = "length"
        if reason is not None:
            ended.append((one, reason))
    if forced is not None:
        for one, token in zip(active, forced, strict=True):
            if token >= 0:
                one.forced.append(len(one.ids) - 1)
    return ended


def draw_tokens(active: Sequence[ActiveRequest], logits: Tensor) -> tuple[Draw, list[int] | None]:
    """Ask the interventions of the requests, then draw each one's next token; their ids stay as they are.

    Args:
        active: B requests, in the order of `logits`.
        logits: float[B, V].

    Returns:
        The draws, and the id that each request was forced to take (-1: none); None where nothing was forced.

    Raises:
        PolicyError: An intervention forced an id outside the vocabulary.
    """
    device = logits.device
    uniforms = torch.tensor([one.draws[len(one.ids)] for one in active], dtype=torch.float64, device=device)
    if all(one.plain for one in active):
        return draw(distribution(logits), uniforms), None

    def option(of_request: Callable[[Request], float]) -> Tensor | None:
        """float32[B] of a request's option; None when all are 1."""
        values = [of_request(one.request) for one in active]
        return None if all(value == 1.0 for value in values) else torch.tensor(values, device=device)

    log_probs = distribution(logits, option(lambda request: request.temperature))
    greedy = [one.request.temperature == 0 for one in active]
    # An intervention is asked once its earlier ids are all forced, and sees the undisturbed distribution.
    asking = [i for i, one in enumerate(active) if one.request.intervention is not None and not one.pending]
    if asking:
        _ask([active[i] for i in asking], log_probs[asking])
    forced = None
    if any(one.pending for one in active):
        forced = [one.pending.popleft() if one.pending else -1 for one in active]
    drawn = draw(
        log_probs,
        uniforms,
        greedy=torch.tensor(greedy, device=device) if any(greedy) else None,
        top_p=option(lambda request: request.top_p),
        forced=None if forced is None else torch.tensor(forced, device=device),
    )
    return drawn, forced


def _ask(active: Sequence[ActiveRequest], log_probs: Tensor) -> None:
    """Ask each request's intervention, and queue what it forces."""
    vocabulary = log_probs.shape[-1]
    entropies = entropy(log_probs).tolist()
    rules = [one.request.intervention for one in active]
    width = min(max(0 if rule is None else rule.top_log_probs for rule in rules), vocabulary)
    top = log_probs.topk(width, dim=-1).values.cpu().numpy()
    for i, (one, rule) in enumerate(zip(active, rules, strict=True)):
        assert rule is not None
        forced = rule(NextToken(tuple(one.ids), entropies[i], top[i, : rule.top_log_probs]))
        if any(not 0 <= token < vocabulary for token in forced):
            raise PolicyError(f"an intervention forced {list(forced)}; ids lie in 0..{vocabulary - 1}")
        one.pending.extend(forced)


def distribution(logits: Tensor, temperature: Tensor | None = None) -> Tensor:
    """Log-probs of the next token at each row's temperature.

    Args:
        logits: float[B, V].
        temperature: float32[B]; a greedy row (0) and None mean 1.

    Returns:
        float32[B, V], nats.
    """
    scores = logits.float()
    if temperature is not None:
        scores = scores / torch.where(temperature > 0, temperature, 1.0).unsqueeze(-1)
    return torch.log_softmax(scores, dim=-1)


def draw(
    log_probs: Tensor,
    uniforms: Tensor,
    *,
    greedy: Tensor | None = None,
    top_p: Tensor | None = None,
    forced: Tensor | None = None,
) -> Draw:
    """Choose one token per row; its log-prob is that of the whole distribution, not of the top-p set.

    Args:
        log_probs: float32[B, V] from `distribution`.
        uniforms: float64[B] in [0, 1).
        greedy: bool[B], rows that take the most likely token.
        top_p: float32[B]; rows below 1 keep the smallest set of likely tokens with at least this mass.
        forced: int64[B], the token of a row, or -1 to sample it.
    """
    tokens = _inverse_cdf(log_probs.exp(), uniforms)
    if top_p is not None:
        rows = (top_p < 1).nonzero().squeeze(-1)
        likely, order = log_probs[rows].exp().sort(dim=-1, descending=True, stable=True)
        before = likely.cumsum(dim=-1) - likely
        kept = torch.where(before < top_p[rows].unsqueeze(-1), likely, 0.0)
        tokens[rows] = order.gather(-1, _inverse_cdf(kept, uniforms[rows]).unsqueeze(-1)).squeeze(-1)
    if greedy is not None:
        tokens = torch.where(greedy, log_probs.argmax(dim=-1), tokens)
    if forced is not None:
        tokens = torch.where(forced >= 0, forced, tokens)
    return Draw(tokens, log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1))


def entropy(log_probs: Tensor) -> Tensor:
    """Shannon entropy of each row in nats: -sum p log p."""
    return -(log_probs.exp() * log_probs).nan_to_num(0.0).sum(dim=-1)


def _inverse_cdf(probs: Tensor, uniforms: Tensor) -> Tensor:
    """The first index whose running sum exceeds uniform * total: never one of probability 0.

    Large vocabularies are searched by block first: sums stay short, so float32 does not lose the tail.
    """
    size = probs.shape[-1]
    uniforms = uniforms.clamp(max=_LARGEST_UNIFORM).float().unsqueeze(-1)
    if size <= _BLOCK:
        return _search(probs.cumsum(dim=-1), uniforms).squeeze(-1)
    blocks = F.pad(probs, (0, -size % _BLOCK)).view(len(probs), -1, _BLOCK)
    sums = blocks.sum(dim=-1)
    ends = sums.cumsum(dim=-1)
    block = _search(ends, uniforms)
    mass = sums.gather(-1, block)
    rest = (uniforms * ends[:, -1:] - (ends.gather(-1, block) - mass)) / mass
    inner = blocks.gather(1, block.unsqueeze(-1).expand(-1, 1, _BLOCK)).squeeze(1)
    return (block * _BLOCK + _search(inner.cumsum(dim=-1), rest.clamp(0.0, _LARGEST_UNIFORM))).squeeze(-1)


def _search(cdf: Tensor, uniforms: Tensor) -> Tensor:
    found = torch.searchsorted(cdf, uniforms * cdf[:, -1:], right=True)
    return found.clamp(max=cdf.shape[-1] - 1)  # only a row of NaN exceeds it
