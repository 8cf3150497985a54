"""A request under way."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from at2po_agent.policies.base import Draws, Request
from at2po_agent.policies.hf.prefix_cache import Node
from at2po_agent.policies.hf.slots import Seat
from at2po_agent.types import Generation, StopReason


@dataclass(slots=True, eq=False)
class Row:
    """A request, and how far it is.

    Attributes:
        ticket: Its name outside.
        request: What was asked.
        stop: Number of its stop strings in the stop table.
        draws: Its uniform draws, one per token; always one more than there are ids.
        plain: Whether it samples from the model itself: temperature 1, top-p 1, no intervention.
        version: Of the weights that sample its first token.
        context: Ids whose KV it needs before it goes on: the prefix, and what was generated before a restart.
        seat: Where its KV are, while live.
        node: Where `context` ends in the prefix tree, while live.
        waited: Steps that it has waited.
        ids: Generated ids.
        log_probs: Theirs.
        forced: Places in `ids` that were forced.
        pending: Ids that an intervention has still to force.
    """

    ticket: int
    request: Request
    stop: int
    draws: Draws
    plain: bool
    version: int
    context: tuple[int, ...]
    seat: Seat | None = None
    node: Node | None = None
    waited: int = 0
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    forced: list[int] = field(default_factory=list)
    pending: deque[int] = field(default_factory=deque)

    def generation(self, reason: StopReason) -> Generation:
        """What was generated so far, as the answer to the request."""
        sampled = None
        if self.forced:
            sampled = np.ones(len(self.ids), dtype=np.bool_)
            sampled[self.forced] = False
        log_probs = np.array(self.log_probs, dtype=np.float32)
        return Generation(tuple(self.ids), log_probs, reason, sampled, self.version)

    def rewind(self) -> None:
        """Forget seat and node; what was generated becomes context."""
        self.seat = self.node = None
        self.context = self.request.prefix_ids + tuple(self.ids)
