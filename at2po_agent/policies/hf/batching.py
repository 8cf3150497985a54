"""Continuous batching: requests come and go, and every step is one forward pass over a packed batch.

A step works in this order:

1. Make room: drop old KV from the prefix tree, and move sequences that outgrow their seat to a larger one.
2. Admit waiting requests while there are seats. The prefix tree says how much of a prefix is known: known KV
   are copied into the seat, the rest is fed. Where requests of one step share an unknown prefix, its tokens
   are fed once and their KV are written to every seat.
3. Run the model over [unknown prompt tokens | padding | newest token of every seat].
4. Give the tree the KV of the new prefixes, and the logits after them.
5. Seat the requests whose whole prefix was known (or became known in 4); the stored logits serve them.

The policy then draws one token for each live request. What a step does depends on the requests and their
order, never on the clock. This module knows seats, the tree and who runs the model; no text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from at2po_agent.policies.base import PolicyStats
from at2po_agent.policies.hf.attention import ExtraWrite, PackedAttention, PromptRun
from at2po_agent.policies.hf.decoder import ModelDecoder
from at2po_agent.policies.hf.fused import FusedDecoder
from at2po_agent.policies.hf.prefix_cache import Node, PrefixCache
from at2po_agent.policies.hf.slots import Seat, Slots
from at2po_agent.policies.sampling import ActiveRequest
from at2po_env.errors import PolicyError

_PATIENCE = 4  # steps that a request waits for company: one forward pass for several prefixes costs less
_COMPANY = 8  # ... unless so many wait: one eighth of the live requests


@dataclass(kw_only=True, eq=False, slots=True)
class SeatedRequest(ActiveRequest):
    """An active request and where its keys and values are.

    Attributes:
        ticket: Its name outside.
        context: Ids whose KV it needs before it goes on: the prefix, and what was generated before a restart.
        seat: Where its KV are, while live.
        node: Where `context` ends in the prefix tree, while live.
        waited: Steps that it has waited.
    """

    ticket: int
    context: tuple[int, ...] = ()
    seat: Seat | None = None
    node: Node | None = None
    waited: int = 0


@dataclass
class _Packing:
    """The prompt part of a packed batch while it is put together.

    Attributes:
        tokens: Prompt ids but the last of each prefix, which is fed as the newest token of its request.
        prompts: Whose they are.
        shared: KV of these tokens that other requests need too.
        admitted: Requests that get their prefix computed.
        known: Requests whose whole prefix is, or after this step will be, known.
    """

    tokens: list[int] = field(default_factory=list)
    prompts: list[PromptRun] = field(default_factory=list)
    shared: list[ExtraWrite] = field(default_factory=list)
    admitted: list[SeatedRequest] = field(default_factory=list)
    known: list[SeatedRequest] = field(default_factory=list)


class Batcher:
    """Requests, their seats, the queue and the prefix tree.

    Args:
        decoder: Runs the model.
        slots: Seats and their storage.
        cache: The prefix tree.
        max_rows: Requests that are live at the same time.
        max_prefill: Prefix tokens of one step, beyond which requests wait (one request always goes in).
    """

    def __init__(
        self,
        decoder: ModelDecoder | FusedDecoder,
        slots: Slots,
        cache: PrefixCache,
        *,
        max_rows: int,
        max_prefill: int,
    ) -> None:
        self.stats = PolicyStats()
        self.version = 0
        self._decoder = decoder
        self._slots = slots
        self._cache = cache
        self._max_rows = max_rows
        self._max_prefill = max_prefill
        self._queue: deque[SeatedRequest] = deque()
        self._live: dict[int, SeatedRequest] = {}

    @property
    def idle(self) -> bool:
        """True if nothing waits and nothing is live."""
        return not self._queue and not self._live

    def submit(self, one: SeatedRequest) -> None:
        """Queue a request."""
        self._queue.append(one)

    def remove(self, ticket: int) -> SeatedRequest | None:
        """Take a request out, wherever it is; None when it is not here."""
        one = self._live.get(ticket)
        if one is not None:
            self.leave(one)
            return one
        one = next((one for one in self._queue if one.ticket == ticket), None)
        if one is not None:
            self._queue.remove(one)
        return one

    def restart(self) -> None:
        """The weights have changed: forget all KV; live requests wait until theirs is computed afresh."""
        self._cache.clear()
        for one in self._live.values():
            assert one.seat is not None
            self._slots.leave(one.seat)
        self._requeue(self._live.values())
        self._live.clear()

    def rewind(self) -> None:
        """Let all live requests wait where a step could not choose its tokens; the tree keeps their KV."""
        requests = list(self._live.values())
        for one in requests:
            self.leave(one)
        self._requeue(requests)

    def reset(self) -> None:
        """Forget every request and all KV."""
        self._queue.clear()
        self._live.clear()
        self._cache.clear()
        self._slots.clear()

    def step(self) -> tuple[list[SeatedRequest], Tensor | None]:
        """One forward pass.

        Returns:
            The requests that now need a token appended, and the logits [n, V] to draw it from. An exception
            leaves the requests as they were, and the step can be repeated.
        """
        # 1. Make room for one more position of every live request; where there is none, the youngest waits.
        self._cache.evict()
        while not self._slots.grow():
            youngest = self._live[max(self._live)]
            self.leave(youngest)
            self._requeue([youngest])
        # 2. Admit.
        packing = self._admit()
        if self._queue and not self._live and not packing.known:
            raise PolicyError("the KV buffers hold no request; raise kv_tokens")
        # 3. Run the model. Arenas without holes put the seats in the order of the batch.
        self._slots.compact()
        order = self._slots.order()
        requests = [self._live[seat.ticket] for seat in order]
        parts: list[Tensor] = []
        try:
            if order:
                batch = PackedAttention(self._slots, order, packing.prompts, packing.shared)
                padding = [0] * (batch.before - len(packing.tokens))
                newest = [one.ids[-1] if one.ids else one.context[-1] for one in requests]
                tokens = torch.tensor(packing.tokens + padding + newest, device=self._slots.device)
                positions = torch.from_numpy(batch.positions).to(self._slots.device)
                parts.append(self._decoder.forward(tokens, positions, batch))
                self.stats.steps += 1
        except BaseException:
            self._undo(packing)
            raise
        for seat in order:
            seat.length += 1
        # 4. Record what was computed: the logits after a new prefix, and the KV of all nodes that it filled.
        for one in packing.admitted:
            assert one.seat is not None
            assert one.node is not None
            one.node.logits = parts[0][one.seat.number].clone()
            above: Node | None = one.node
            while above is not None and above.packed is not None:
                self._cache.fill(above, self._slots.read(one.seat, above.start, above.end))
                above = above.parent
        # 5. Seat those whose prefix is known by now; one that finds no place waits for the next step.
        for number, one in enumerate(packing.known):
            free = self._slots.seat(one.ticket, len(one.context))
            if free is None:
                self._requeue(packing.known[number:])
                break
            path = self._cache.match(one.context)
            self._enter(one, free, path)
            one.node = path[-1][0]
            one.node.pins += 1
            free.length = len(one.context)
            self.stats.cached_tokens += free.length
            assert one.node.logits is not None
            requests.append(one)
            parts.append(one.node.logits[None])
        return requests, torch.cat(parts) if parts else None

    def leave(self, one: SeatedRequest) -> None:
        """End a live request; the tree keeps the KV of what it generated."""
        seat, node = one.seat, one.node
        assert seat is not None
        assert node is not None
        # Ids of the generation whose KV the seat holds: all that were fed, so not the last one.
        first = len(one.context) - len(one.request.prefix_ids)
        fed = one.ids[first : first + seat.length - len(one.context)]
        path = self._cache.match(fed, below=node)
        known = sum(length for _, length in path)
        if known < len(fed):
            end = self._cache.extend(path, fed[known:], below=node)
            self._cache.fill(end, self._slots.read(seat, end.start, end.end))
        node.pins -= 1
        self._slots.leave(seat)
        del self._live[one.ticket]
        one.seat = one.node = None

    def _requeue(self, requests: Iterable[SeatedRequest]) -> None:
        """Let requests wait, in the order they came; what they have generated becomes context."""
        for one in sorted(requests, key=lambda one: one.ticket, reverse=True):
            one.seat = one.node = None
            one.context = one.request.prefix_ids + tuple(one.ids)
            self._queue.appendleft(one)

    def _admit(self) -> _Packing:
        """Seat waiting requests, and list what has to be fed for them."""
        packing = _Packing()
        if not self._queue:
            return packing
        self._queue[0].waited += 1
        if self._queue[0].waited <= _PATIENCE and _COMPANY * len(self._queue) < len(self._live):
            return packing
        ends: set[Node] = set()
        while self._queue and len(self._live) + len(packing.known) < self._max_rows:
            # Look the prefix up. Nodes that this step fills count too: they are pending, and `ends` are those
            # where an admitted request's prefix ends, after which this step computes the logits.
            one = self._queue[0]
            path = self._cache.match(one.context)
            matched = sum(length for _, length in path)
            if matched == len(one.context):
                node, length = path[-1]
                if length == len(node.tokens) and (node.logits is not None or node in ends):
                    packing.known.append(self._queue.popleft())
                    continue
            uncached = max(len(one.context) - matched, 1)
            if packing.admitted and len(packing.tokens) + uncached > self._max_prefill:
                break
            seat = self._slots.seat(one.ticket, len(one.context))
            if seat is None:
                break
            self._queue.popleft()
            packing.shared += self._enter(one, seat, path)
            # Feed what is not known, at least the last id: as the newest token of its seat, for the logits
            # after it.
            known = min(matched, len(one.context) - 1)
            first, inner = len(packing.tokens), len(one.context) - 1 - known
            packing.tokens += one.context[known:-1]
            if inner:
                packing.prompts.append(PromptRun(seat, known, first, inner))
            node = self._cache.extend(path, one.context[matched:])
            if matched == known:
                node.packed = [*range(first, first + inner), seat]
            node.pins += 1
            ends.add(node)
            one.node = node
            seat.length = len(one.context) - 1
            packing.admitted.append(one)
            self.stats.cached_tokens += known
            self.stats.prefill_tokens += inner + 1
        return packing

    def _enter(self, one: SeatedRequest, seat: Seat, path: list[tuple[Node, int]]) -> list[ExtraWrite]:
        """Make a request live and copy the known KV of its prefix; returns the places of those to come."""
        one.seat = seat
        self._live[one.ticket] = one
        if not one.ids:
            one.version = self.version
        coming: list[ExtraWrite] = []
        for node, length in path:
            if node.segment is not None:
                self._slots.write(seat, node.start, node.segment, length)
            else:
                assert node.packed is not None
                coming += [ExtraWrite(node.packed[i], seat, node.start + i) for i in range(length)]
        return coming

    def _undo(self, packing: _Packing) -> None:
        """Put the requests of a failed step back into the queue and drop their pending nodes."""
        for one in packing.admitted:
            assert one.seat is not None
            assert one.node is not None
            self._slots.leave(one.seat)
            one.node.pins -= 1
        for one in packing.admitted:
            node = one.node
            while node is not None and node.packed is not None and not node.children:
                self._cache.drop(node)
                node = node.parent
            del self._live[one.ticket]
        self._requeue([*packing.admitted, *packing.known])
