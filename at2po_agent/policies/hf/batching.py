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
order, never on the clock. This module knows seats and the tree; no text, no model class.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from at2po_agent.policies.hf.attention import ExtraWrite, PackedAttention, PromptRun, rows_for
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

    def rewind(self) -> None:
        """Forget seat and node; what was generated becomes context."""
        self.seat = self.node = None
        self.context = self.request.prefix_ids + tuple(self.ids)


@dataclass
class PolicyStats:
    """Counts what a policy computed since it was made.

    Attributes:
        prefill_tokens: Prefix tokens that went through the model.
        cached_tokens: Prefix tokens whose KV were found or shared instead.
        decoded_tokens: Tokens generated.
        steps: Forward passes.
    """

    prefill_tokens: int = 0
    cached_tokens: int = 0
    decoded_tokens: int = 0
    steps: int = 0


class Decoder(Protocol):
    """Runs a packed batch."""

    def forward(self, tokens: Tensor, positions: Tensor, attention: PackedAttention, slots: Slots) -> Tensor:
        """Logits [n, V] after each seat's newest token."""
        ...


@dataclass
class _Packing:
    """The prompt part of a packed batch while it is put together.

    Attributes:
        tokens: Prompt ids but the last of each prefix, which is fed as the newest token of its request.
        prompts: Whose they are.
        shared: (packed index, seat, position): KV that the tokens of another request bring too; an index
            -1 - i is the newest token of admitted request i.
        admitted: Rows that get their prefix computed.
        known: Rows whose whole prefix is, or after this step will be, known.
    """

    tokens: list[int] = field(default_factory=list)
    prompts: list[PromptRun] = field(default_factory=list)
    shared: list[ExtraWrite] = field(default_factory=list)
    admitted: list[SeatedRequest] = field(default_factory=list)
    known: list[SeatedRequest] = field(default_factory=list)


class Batcher:
    """Rows, their seats, the queue and the prefix tree.

    Args:
        decoder: Runs the model.
        slots: Seats and their storage.
        cache: The prefix tree.
        max_rows: Rows that are live at the same time.
        max_prefill: Prefix tokens of one step, beyond which requests wait (one request always goes in).
    """

    def __init__(
        self, decoder: Decoder, slots: Slots, cache: PrefixCache, *, max_rows: int, max_prefill: int
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
            one.rewind()
        self._requeue(self._live.values())
        self._live.clear()

    def rewind(self) -> None:
        """Let all live requests wait where a step could not choose its tokens; the tree keeps their KV."""
        requests = list(self._live.values())
        for one in requests:
            self.leave(one)
            one.rewind()
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
        # 1. Make room.
        self._cache.evict()
        self._make_room()
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
                parts.append(self._forward(packing, order, requests))
        except BaseException:
            self._undo(packing)
            raise
        # 4. Record what was computed for the new prefixes.
        for one in packing.admitted:
            assert one.seat is not None
            self._record(one, one.seat, parts[0][one.seat.number])
        # 5. Seat those whose prefix is known by now; one that finds no place waits for the next step.
        for number, one in enumerate(packing.known):
            stored = self._seat_known(one)
            if stored is None:
                self._requeue(packing.known[number:])
                break
            requests.append(one)
            parts.append(stored[None])
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

    def _make_room(self) -> None:
        """Let every live request grow by a position; where the storage is full, the youngest wait again."""
        while not self._slots.grow():
            youngest = self._live[max(self._live)]
            self.leave(youngest)
            youngest.rewind()
            self._requeue([youngest])

    def _requeue(self, requests: Iterable[SeatedRequest]) -> None:
        for one in sorted(requests, key=lambda one: one.ticket, reverse=True):
            self._queue.appendleft(one)

    def _admit(self) -> _Packing:
        """Seat waiting requests, and list what has to be fed for them."""
        packing = _Packing()
        if not self._queue or not self._worth_admitting():
            return packing
        ends: set[Node] = set()
        while self._queue and len(self._live) + len(packing.known) < self._max_rows:
            # Look the prefix up. Nodes that this step fills count too: they are pending, and `ends` are those
            # where an admitted request's prefix ends, after which this step computes the logits.
            one = self._queue[0]
            path = self._cache.match(one.context)
            matched = sum(length for _, length in path)
            if matched == len(one.context) and _ends_here(path, ends):
                packing.known.append(self._queue.popleft())
                continue
            uncached = max(len(one.context) - matched, 1)
            if packing.admitted and len(packing.tokens) + uncached > self._max_prefill:
                break
            seat = self._slots.seat(one.ticket, len(one.context))
            if seat is None:
                break
            self._queue.popleft()
            self._enter(one, seat)
            self._load(seat, path, packing)
            ends.add(self._plan_prefill(one, seat, path, packing))
        return packing

    def _enter(self, one: SeatedRequest, seat: Seat) -> None:
        one.seat = seat
        self._live[one.ticket] = one
        if not one.ids:
            one.version = self.version

    def _worth_admitting(self) -> bool:
        waiting, first = len(self._queue), self._queue[0]
        first.waited += 1
        return (
            first.waited > _PATIENCE
            or _COMPANY * waiting >= len(self._live)
            or waiting + len(self._live) <= 1
        )

    def _load(self, seat: Seat, path: list[tuple[Node, int]], packing: _Packing) -> None:
        """Copy the known KV of a prefix; what this step computes for others will be written here too."""
        for node, length in path:
            if node.segment is not None:
                self._slots.write(seat, node.start, node.segment, length)
                continue
            assert node.packed is not None
            packing.shared += [ExtraWrite(node.packed[i], seat, node.start + i) for i in range(length)]

    def _plan_prefill(
        self, one: SeatedRequest, seat: Seat, path: list[tuple[Node, int]], packing: _Packing
    ) -> Node:
        """Feed what is not known of a context, at least its last id; returns the node where it ends."""
        # The last id of a context is always fed: as the newest token of its seat, for the logits after it.
        matched = sum(length for _, length in path)
        known = min(matched, len(one.context) - 1)
        first, inner = len(packing.tokens), len(one.context) - 1 - known
        packing.tokens += one.context[known:-1]
        if inner:
            packing.prompts.append(PromptRun(seat, known, first, inner))
        node = self._cache.extend(path, one.context[matched:])
        if matched == known:
            node.packed = [*range(first, first + inner), -1 - len(packing.admitted)]
        node.pins += 1
        one.node = node
        seat.length = len(one.context) - 1
        packing.admitted.append(one)
        self.stats.cached_tokens += known
        self.stats.prefill_tokens += inner + 1
        return node

    def _forward(self, packing: _Packing, order: list[Seat], requests: list[SeatedRequest]) -> Tensor:
        fed = len(packing.tokens)
        before = rows_for(fed + len(requests)) - len(requests)
        writes = []
        for write in packing.shared:
            source = write.source
            if source < 0:
                owner = packing.admitted[-1 - source].seat
                assert owner is not None
                source = before + owner.number
            writes.append(ExtraWrite(source, write.seat, write.position))
        attention = PackedAttention(self._slots, order, packing.prompts, writes)
        newest = [one.ids[-1] if one.ids else one.context[-1] for one in requests]
        padding = [0] * (before - fed)
        tokens = torch.tensor(packing.tokens + padding + newest, device=self._slots.device)
        positions = torch.from_numpy(attention.positions).to(self._slots.device)
        logits = self._decoder.forward(tokens, positions, attention, self._slots)
        for seat in order:
            seat.length += 1
        self.stats.steps += 1
        return logits

    def _record(self, one: SeatedRequest, seat: Seat, logits: Tensor) -> None:
        """Give the tree what the forward pass computed for an admitted request."""
        node = one.node
        assert node is not None
        node.logits = logits.clone()
        above: Node | None = node
        while above is not None and above.packed is not None:
            self._cache.fill(above, self._slots.read(seat, above.start, above.end))
            above = above.parent

    def _seat_known(self, one: SeatedRequest) -> Tensor | None:
        """Seat a request whose prefix the tree holds; returns the logits after it, None without room."""
        seat = self._slots.seat(one.ticket, len(one.context))
        if seat is None:
            return None
        path = self._cache.match(one.context)
        self._load(seat, path, _Packing())
        node = path[-1][0]
        node.pins += 1
        self._enter(one, seat)
        one.node = node
        seat.length = len(one.context)
        self.stats.cached_tokens += len(one.context)
        assert node.logits is not None
        return node.logits

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
            one.seat = one.node = None
            del self._live[one.ticket]
        self._requeue([*packing.admitted, *packing.known])


def _ends_here(path: list[tuple[Node, int]], ends: set[Node]) -> bool:
    """True if the logits after a fully matched path are known, or will be after this step."""
    if not path:
        return False
    node, length = path[-1]
    return length == len(node.tokens) and (node.logits is not None or node in ends)
