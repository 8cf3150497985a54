"""From the logits of a step to the tokens of its rows: interventions, draws, ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from at2po_agent.policies.base import Request, Step
from at2po_agent.policies.hf.rows import Row
from at2po_agent.policies.sampling import Draw, distribution, draw, entropy
from at2po_agent.policies.stops import StopTable
from at2po_agent.types import StopReason
from at2po_env.errors import PolicyError


def choose(rows: Sequence[Row], logits: Tensor, stops: StopTable) -> list[tuple[Row, StopReason]]:
    """Append one token to each row; returns the rows that it ends.

    Args:
        rows: The rows, in the order of `logits`.
        logits: float[rows, V].
        stops: When generations end.

    Raises:
        FloatingPointError: The logits are not finite; no row has changed.
        PolicyError: An intervention forced an id outside the vocabulary.
    """
    drawn, forced = draw_tokens(rows, logits)
    # One transfer for both: float64 holds every id exactly.
    both = torch.stack([drawn.tokens.double(), drawn.log_probs.double()]).cpu().numpy()
    if not np.isfinite(both[1]).all():
        raise FloatingPointError("the model's log-probs are not finite; its weights hold nan")
    tokens = both[0].astype(np.int64)
    may_end = stops.candidates[[row.stop for row in rows], tokens].tolist()
    ended: list[tuple[Row, StopReason]] = []
    for row, token, log_prob, candidate in zip(rows, tokens.tolist(), both[1].tolist(), may_end, strict=True):
        ids = row.ids
        ids.append(token)
        row.log_probs.append(log_prob)
        if len(ids) == len(row.draws):
            row.draws.more()
        reason = stops.ends(row.stop, ids) if candidate else None
        if reason is None and len(ids) >= row.request.max_tokens:
            reason = "length"
        if reason is not None:
            ended.append((row, reason))
    if forced is not None:
        for row, token in zip(rows, forced, strict=True):
            if token >= 0:
                row.forced.append(len(row.ids) - 1)
    return ended


def draw_tokens(rows: Sequence[Row], logits: Tensor) -> tuple[Draw, list[int] | None]:
    """Ask the interventions of the rows, then draw each row's next token; the rows' ids stay as they are.

    Args:
        rows: The rows, in the order of `logits`.
        logits: float[rows, V].

    Returns:
        The draws, and the id that each row was forced to take (-1: none); None where nothing was forced.

    Raises:
        PolicyError: An intervention forced an id outside the vocabulary.
    """
    device = logits.device
    uniforms = torch.tensor([row.draws[len(row.ids)] for row in rows], dtype=torch.float64, device=device)
    if all(row.plain for row in rows):
        return draw(distribution(logits), uniforms), None
    log_probs = distribution(logits, _setting(rows, lambda request: request.temperature, device))
    greedy = [row.request.temperature == 0 for row in rows]
    forced = _intervene(rows, log_probs)
    drawn = draw(
        log_probs,
        uniforms,
        greedy=torch.tensor(greedy, device=device) if any(greedy) else None,
        top_p=_setting(rows, lambda request: request.top_p, device),
        forced=None if forced is None else torch.tensor(forced, device=device),
    )
    return drawn, forced


def _setting(
    rows: Sequence[Row], of_request: Callable[[Request], float], device: torch.device
) -> Tensor | None:
    """float32[rows] of a request's setting; None when all are 1."""
    values = [of_request(row.request) for row in rows]
    return None if all(value == 1.0 for value in values) else torch.tensor(values, device=device)


def _intervene(rows: Sequence[Row], log_probs: Tensor) -> list[int] | None:
    """The id that each row is forced to take, or -1; None when there is none."""
    asking = [i for i, row in enumerate(rows) if row.request.intervention is not None and not row.pending]
    if asking:
        _ask([rows[i] for i in asking], log_probs[asking])
    if not any(row.pending for row in rows):
        return None
    return [row.pending.popleft() if row.pending else -1 for row in rows]


def _ask(rows: Sequence[Row], log_probs: Tensor) -> None:
    """Ask each row's intervention, and queue what it forces."""
    vocabulary = log_probs.shape[-1]
    entropies = entropy(log_probs).tolist()
    rules = [row.request.intervention for row in rows]
    width = min(max(0 if rule is None else rule.top_log_probs for rule in rules), vocabulary)
    top = log_probs.topk(width, dim=-1).values.cpu().numpy()
    for i, (row, rule) in enumerate(zip(rows, rules, strict=True)):
        assert rule is not None
        forced = rule(Step(tuple(row.ids), entropies[i], top[i, : rule.top_log_probs]))
        if any(not 0 <= token < vocabulary for token in forced):
            raise PolicyError(f"an intervention forced {list(forced)}; ids lie in 0..{vocabulary - 1}")
        row.pending.extend(forced)
