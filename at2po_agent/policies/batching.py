"""Continuous batching: rows come and go, every step is one forward pass over a packed batch.

A step feeds the last token of every live row and the uncached part of every admitted prefix. Prefixes are looked
up in the radix tree; where requests of the same step share an uncached prefix, its tokens are fed once and their
KV written to each slot. A request whose whole prefix is known takes its slot after the forward pass and is sampled
from the stored logits. Knows slots and the tree; no text, no model class.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from at2po_agent.policies.base import Request, Step
from at2po_agent.policies.prefix_cache import Node, PrefixCache
from at2po_agent.policies.sampling import distribution, draw, entropy
from at2po_agent.policies.slots import Plan, Slots, plan_groups
from at2po_agent.policies.stops import StopTable
from at2po_agent.types import FloatArray, Generation, IntArray, StopReason
from at2po_env.errors import PolicyError

_ROUND_POSITIONS = 64


@dataclass
class PolicyStats:
    """What a policy computed since it was made.

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


@dataclass(slots=True, eq=False)
class Row:
    """A request under way.

    Attributes:
        ticket: Its name outside.
        request: What was asked.
        stop: Its number in the stop table.
        uniforms: Its draws, one per token.
        version: Of the weights that sampled its first token.
        context: Ids whose KV it needs before it goes on: the prefix, and what was generated before a restart.
        node: Where `context` ends in the tree, while seated.
        ids: Generated ids.
        log_probs: Theirs.
        sampled: Whether each was sampled.
        forced: Ids that an intervention has still to force.
    """

    ticket: int
    request: Request
    stop: int
    uniforms: list[float]
    version: int
    context: tuple[int, ...]
    node: Node | None = None
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    forced: deque[int] = field(default_factory=deque)

    def generation(self, reason: StopReason) -> Generation:
        """What was generated so far, as the answer to the request."""
        sampled = None if all(self.sampled) else np.array(self.sampled, dtype=np.bool_)
        return Generation(
            tuple(self.ids), np.array(self.log_probs, dtype=np.float32), reason, sampled, self.version
        )


@dataclass
class _Packing:
    """The packed batch while it is put together: tokens of prompts first, then one token per slot."""

    tokens: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    shared: list[tuple[int, int, int]] = field(default_factory=list)
    pieces: list[tuple[int, int, list[int]]] = field(default_factory=list)

    def add(self, slot: int, start: int, tokens: tuple[int, ...]) -> list[int]:
        """Add a prompt piece; returns the packed index of each token, -1 - slot for the last one (a live token)."""
        first = len(self.tokens)
        inner = list(range(first, first + len(tokens) - 1))
        self.tokens += tokens[:-1]
        self.slots += [slot] * len(inner)
        self.positions += range(start, start + len(inner))
        if inner:
            self.pieces.append((slot, start, inner))
        return [*inner, -1 - slot]


class Batcher:
    """Rows, their slots, the queue and the tree.

    Args:
        slots: KV buffers of the model.
        stops: When generations end.
        max_rows: Rows that are live at the same time.
        kv_tokens: Most slots x positions.
        cache_tokens: Tokens that the tree keeps.
        max_prefill: Prefix tokens of one step, beyond which requests wait (one request always goes in).
    """

    def __init__(
        self,
        slots: Slots,
        stops: StopTable,
        *,
        max_rows: int,
        kv_tokens: int,
        cache_tokens: int,
        max_prefill: int,
    ) -> None:
        self.stats = PolicyStats()
        self.stops = stops
        self.cache = PrefixCache(cache_tokens)
        self._slots = slots
        self._max_rows = max_rows
        self._kv_tokens = kv_tokens
        self._max_prefill = max_prefill
        self._queue: deque[Row] = deque()
        self._rows: list[Row | None] = []
        self._lengths: IntArray = np.zeros(max_rows, dtype=np.int64)
        self._next: IntArray = np.zeros(max_rows, dtype=np.int64)

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing is live."""
        return not self._queue and not any(self._rows)

    def submit(self, row: Row) -> None:
        """Queue a row."""
        self._queue.append(row)

    def remove(self, ticket: int) -> Row | None:
        """Take a row out, wherever it is; None when it is not here."""
        for row in self._queue:
            if row.ticket == ticket:
                self._queue.remove(row)
                return row
        for slot, row in enumerate(self._rows):
            if row is not None and row.ticket == ticket:
                self._leave(slot)
                return row
        return None

    def restart(self) -> None:
        """The weights have changed: forget all KV; live rows go on after their ids are computed afresh."""
        self.cache.clear()
        live = [row for row in self._rows if row is not None]
        for row in live:
            row.node = None
            row.context = row.request.prefix_ids + tuple(row.ids)
        self._queue.extendleft(reversed(live))
        self._rows.clear()

    def step(self) -> list[tuple[Row, StopReason]]:
        """Advance every live row by one token; returns the rows that ended.

        An exception leaves the rows where they were; the step can be repeated.
        """
        self._close_holes()
        self._make_room()
        packing, admitted, known = self._admit()
        try:
            logits = self._forward(packing) if any(self._rows) else None
        except BaseException:
            self._undo(admitted, known)
            raise
        parts = [] if logits is None else [logits]
        for slot in admitted:
            assert logits is not None
            self._record(slot, logits[slot])
        order = [] if logits is None else [(slot, row) for slot, row in enumerate(self._rows)]
        for row in known:
            order.append((self._seat_known(row), row))
            assert row.node is not None
            assert row.node.logits is not None
            parts.append(row.node.logits[None])
        ended = self._sample(torch.cat(parts) if len(parts) > 1 else parts[0], order) if parts else []
        self.cache.evict()
        return ended

    def _close_holes(self) -> None:
        """Move rows from the end into the holes that no waiting request will take."""
        holes = [slot for slot, row in enumerate(self._rows) if row is None]
        while len(holes) > len(self._queue):
            source = len(self._rows) - 1
            row = self._rows.pop()
            if row is None:
                holes.pop()
                continue
            target = holes.pop(0)
            self._slots.move(source, target, int(self._lengths[source]))
            self._rows[target] = row
            self._lengths[target], self._next[target] = self._lengths[source], self._next[source]

    def _make_room(self) -> None:
        """Let every live row grow by a token; where the buffers may not, the youngest rows wait again."""
        while self._rows:
            longest = int(self._lengths[: len(self._rows)].max()) + 1
            live = [(row.ticket, slot) for slot, row in enumerate(self._rows) if row is not None]
            if len(live) <= 1 or len(self._rows) * longest <= self._kv_tokens:
                self._reserve(len(self._rows), longest)
                return
            row = self._leave(max(live)[1])
            row.context = row.request.prefix_ids + tuple(row.ids)
            waiting, self._queue = self._queue, deque()
            self._close_holes()
            self._queue = waiting
            self._queue.appendleft(row)

    def _reserve(self, count: int, positions: int) -> None:
        """Grow the buffers, by half at least where the limit allows, so that growing stays rare."""
        if count <= self._slots.count and positions <= self._slots.positions:
            return
        wide = (
            max(positions, self._slots.positions * 3 // 2) if positions > self._slots.positions else positions
        )
        wide = max(-(-wide // _ROUND_POSITIONS) * _ROUND_POSITIONS, self._slots.positions)
        many = max(count, min(self._max_rows, 2 * self._slots.count)) if count > self._slots.count else count
        many = max(many, self._slots.count)
        if many * wide <= self._kv_tokens:
            self._slots.resize(many, wide)
        else:
            self._slots.resize(count, positions)

    def _fits(self, row: Row, seated: int) -> bool:
        longest = max(int(self._lengths[: len(self._rows)].max(initial=0)), len(row.context)) + 1
        return seated == 0 or (seated < self._max_rows and (seated + 1) * longest <= self._kv_tokens)

    def _admit(self) -> tuple[_Packing, list[int], list[Row]]:
        """Seat waiting requests; returns what to feed, the slots it fills, and rows whose whole prefix is known."""
        packing = _Packing()
        admitted: list[int] = []
        known: list[Row] = []
        ends: set[Node] = set()
        seated = sum(row is not None for row in self._rows)
        while self._queue and self._fits(self._queue[0], seated):
            row = self._queue[0]
            path = self.cache.match(row.context)
            matched = sum(length for _, length in path)
            if matched == len(row.context):
                node, length = path[-1]
                if length == len(node.tokens) and (node.logits is not None or node in ends):
                    known.append(self._queue.popleft())
                    seated += 1
                    continue
            uncached = max(len(row.context) - matched, 1)
            if packing.tokens and len(packing.tokens) + uncached > self._max_prefill:
                break
            slot = self._seat(self._queue.popleft())
            self._load(slot, path, packing)
            ends.add(self._plan_prefill(slot, path, packing))
            admitted.append(slot)
            seated += 1
        return packing, admitted, known

    def _seat(self, row: Row) -> int:
        slot = next((slot for slot, other in enumerate(self._rows) if other is None), len(self._rows))
        if slot == len(self._rows):
            self._rows.append(row)
        self._rows[slot] = row
        self._reserve(len(self._rows), len(row.context) + 1)
        return slot

    def _load(self, slot: int, path: list[tuple[Node, int]], packing: _Packing) -> None:
        """Copy the known KV of a prefix into a slot; what this step computes elsewhere will be written here too."""
        for node, length in path:
            if node.segment is not None:
                self._slots.write(slot, node.start, node.segment, length)
                continue
            assert node.packed is not None
            packing.shared += [(node.packed[i], slot, node.start + i) for i in range(length)]

    def _plan_prefill(self, slot: int, path: list[tuple[Node, int]], packing: _Packing) -> Node:
        """Feed what is not known of a row's context, at least its last id; returns the node where it ends."""
        row = self._rows[slot]
        assert row is not None
        matched = sum(length for _, length in path)
        known = min(matched, len(row.context) - 1)
        packed = packing.add(slot, known, row.context[known:])
        row.node = self.cache.extend(path, row.context[matched:])
        if matched == known:
            row.node.packed = packed
        row.node.pins += 1
        self._lengths[slot] = len(row.context) - 1
        self._next[slot] = row.context[-1]
        self.stats.cached_tokens += known
        self.stats.prefill_tokens += len(packed)
        return row.node

    def _seat_known(self, row: Row) -> int:
        """Seat a row whose whole prefix, and what follows it, the tree holds."""
        slot = self._seat(row)
        path = self.cache.match(row.context)
        self._load(slot, path, _Packing())
        row.node = path[-1][0]
        row.node.pins += 1
        self._lengths[slot] = len(row.context)
        self.stats.cached_tokens += len(row.context)
        return slot

    def _forward(self, packing: _Packing) -> Tensor:
        """Logits [n, V] that follow the last token of each slot; holes are fed a token that nobody reads."""
        live, others = len(self._rows), len(packing.tokens)
        for slot, row in enumerate(self._rows):
            if row is None:
                self._lengths[slot] = self._next[slot] = 0
        tokens = np.concatenate([np.array(packing.tokens, dtype=np.int64), self._next[:live]])
        positions = np.concatenate([np.array(packing.positions, dtype=np.int64), self._lengths[:live]])
        slots = np.concatenate([np.array(packing.slots, dtype=np.int64), np.arange(live)])
        source, write_slots, write_positions = None, slots, positions
        if packing.shared:
            shared = np.array(packing.shared, dtype=np.int64)
            origin = np.where(shared[:, 0] < 0, others - 1 - shared[:, 0], shared[:, 0])
            source = self._tensor(np.concatenate([np.arange(others + live), origin]))
            write_slots = np.concatenate([slots, shared[:, 1]])
            write_positions = np.concatenate([positions, shared[:, 2]])
        last = self._tensor(self._lengths[:live])
        plan = Plan(
            source=source,
            slots=self._tensor(write_slots),
            positions=self._tensor(write_positions),
            live=live,
            last=last,
            reach=int(self._lengths[:live].max()) + 1,
            groups=plan_groups(packing.pieces, device=self._slots.device),
        )
        logits = self._slots.forward(self._tensor(tokens), self._tensor(positions), plan)
        self._lengths[:live] += 1
        self.stats.steps += 1
        return logits

    def _tensor(self, values: IntArray) -> Tensor:
        return torch.from_numpy(values.copy()).to(self._slots.device)

    def _record(self, slot: int, logits: Tensor) -> None:
        """Give the tree what the forward pass computed for an admitted row."""
        row = self._rows[slot]
        assert row is not None
        assert row.node is not None
        row.node.logits = logits.clone()
        node: Node | None = row.node
        while node is not None and node.packed is not None:
            self.cache.fill(node, self._slots.read(slot, node.start, node.end))
            node = node.parent

    def _undo(self, admitted: list[int], known: list[Row]) -> None:
        """Put the rows of a failed step back into the queue and drop their pending nodes."""
        back = list(known)
        for slot in admitted:
            row = self._rows[slot]
            assert row is not None
            assert row.node is not None
            row.node.pins -= 1
            node: Node | None = row.node
            while node is not None and node.packed is not None and not node.children and not node.pins:
                self.cache.drop(node)
                node = node.parent
            row.node = None
            self._rows[slot] = None
            back.append(row)
        self._queue.extendleft(sorted(back, key=lambda row: row.ticket, reverse=True))

    def _leave(self, slot: int) -> Row:
        """Free a slot; the tree keeps the KV of what was generated."""
        row = self._rows[slot]
        assert row is not None
        assert row.node is not None
        first = len(row.context) - len(row.request.prefix_ids)
        fed = row.ids[first : first + int(self._lengths[slot]) - len(row.context)]
        path = self.cache.match(fed, below=row.node)
        known = sum(length for _, length in path)
        node = self.cache.extend(path, fed[known:], below=row.node)
        if known < len(fed):
            self.cache.fill(node, self._slots.read(slot, node.start, node.end))
        row.node.pins -= 1
        row.node = None
        self._rows[slot] = None
        self._lengths[slot] = 0
        return row

    def _sample(self, logits: Tensor, order: list[tuple[int, Row | None]]) -> list[tuple[Row, StopReason]]:
        """Choose the next token of each row; returns those that ended."""
        rows = [row for _, row in order]
        log_probs = distribution(logits, _per_row(rows, lambda request: request.temperature, logits.device))
        uniforms = torch.tensor([0.0 if row is None else row.uniforms[len(row.ids)] for row in rows])
        top_p = _per_row(rows, lambda request: request.top_p, logits.device)
        greedy = [row is not None and row.request.temperature == 0 for row in rows]
        forced = self._intervene(rows, log_probs)
        drawn = draw(
            log_probs,
            uniforms.to(logits.device),
            greedy=torch.tensor(greedy, device=logits.device) if any(greedy) else None,
            top_p=top_p,
            forced=None if forced is None else torch.tensor(forced, device=logits.device),
        )
        # One transfer for both: float64 holds every id exactly.
        tokens, chosen = torch.stack([drawn.tokens.double(), drawn.log_probs.double()]).cpu().numpy()
        return self._append(order, tokens.astype(np.int64), chosen, forced)

    def _intervene(self, rows: list[Row | None], log_probs: Tensor) -> list[int] | None:
        """The id that each row is forced to take, or -1; None when there is none."""
        asking = [
            i
            for i, row in enumerate(rows)
            if row is not None and row.request.intervention is not None and not row.forced
        ]
        if asking:
            self._ask(asking, rows, log_probs[asking])
        if not any(row is not None and row.forced for row in rows):
            return None
        return [row.forced.popleft() if row is not None and row.forced else -1 for row in rows]

    def _ask(self, asking: list[int], rows: list[Row | None], log_probs: Tensor) -> None:
        entropies = entropy(log_probs).tolist()
        widths = []
        for i in asking:
            row = rows[i]
            assert row is not None
            assert row.request.intervention is not None
            widths.append(min(row.request.intervention.top_log_probs, log_probs.shape[-1]))
        top = log_probs.topk(max(widths), dim=-1).values.cpu().numpy() if any(widths) else None
        for number, (i, width) in enumerate(zip(asking, widths, strict=True)):
            row = rows[i]
            assert row is not None
            assert row.request.intervention is not None
            largest = np.zeros(0, dtype=np.float32) if top is None else top[number, :width]
            forced = row.request.intervention(Step(tuple(row.ids), entropies[number], largest))
            vocabulary = log_probs.shape[-1]
            if any(not 0 <= token < vocabulary for token in forced):
                raise PolicyError(f"an intervention forced {list(forced)}; ids lie in 0..{vocabulary - 1}")
            row.forced.extend(forced)

    def _append(
        self,
        order: list[tuple[int, Row | None]],
        tokens: IntArray,
        chosen: FloatArray,
        forced: list[int] | None,
    ) -> list[tuple[Row, StopReason]]:
        """Commit one token per row; returns the rows that ended, their slots freed."""
        ended: list[tuple[Row, StopReason]] = []
        for i, (token, log_prob) in enumerate(zip(tokens.tolist(), chosen.tolist(), strict=True)):
            slot, row = order[i]
            if row is None:
                continue
            if not math.isfinite(log_prob):
                self.reset()
                raise PolicyError("the model's log-probs are not finite; its weights or its inputs hold nan")
            row.ids.append(token)
            row.log_probs.append(log_prob)
            row.sampled.append(forced is None or forced[i] < 0)
            self._next[slot] = token
            self.stats.decoded_tokens += 1
            reason: StopReason | None = None
            if self.stops.candidates[row.stop, token]:
                reason = self.stops.ends(row.stop, row.ids)
            if reason is None and len(row.ids) >= row.request.max_tokens:
                reason = "length"
            if reason is not None:
                self._leave(slot)
                ended.append((row, reason))
        return ended

    def reset(self) -> None:
        """Forget every row, every KV and the tree."""
        self._queue.clear()
        self._rows.clear()
        self._lengths[:] = 0
        self.cache.clear()
        self._slots.wipe()


def _per_row(
    rows: list[Row | None], field_of: Callable[[Request], float], device: torch.device
) -> Tensor | None:
    """float32[B] of a request's setting; None when all are 1."""
    values = [1.0 if row is None else field_of(row.request) for row in rows]
    return None if all(value == 1.0 for value in values) else torch.tensor(values, device=device)
