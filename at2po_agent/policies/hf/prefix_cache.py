"""Radix tree of token ids with the keys and values that a model computed for them.

A node holds a run of ids, their KV segment and, where a request's prefix ended, the logits that follow. A
node may be *pending*: its KV are being computed by the forward pass under way, at known positions of the
packed batch. The least recently used leaves are evicted beyond a budget of tokens. Knows no model.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import count

from torch import Tensor

from at2po_agent.policies.hf.slots import Seat, Segment


class Node:
    """A run of ids below a parent.

    Attributes:
        tokens: The ids.
        start: Depth of the first one, in ids from the root.
        segment: Their KV; None while pending.
        packed: While pending, where the packed batch holds each id (`attention.ExtraWrite.source`).
        logits: Logits after the last id, where known.
        pins: Rows under way that extend this node; a pinned node is not evicted.
    """

    __slots__ = ("children", "logits", "packed", "parent", "pins", "segment", "start", "tokens", "used")

    def __init__(self, tokens: tuple[int, ...], start: int, parent: Node | None) -> None:
        self.tokens = tokens
        self.start = start
        self.parent = parent
        self.children: dict[int, Node] = {}
        self.segment: Segment | None = None
        self.packed: list[int | Seat] | None = None
        self.logits: Tensor | None = None
        self.pins = 0
        self.used = 0

    @property
    def end(self) -> int:
        """Depth after the last id."""
        return self.start + len(self.tokens)

    @property
    def evictable(self) -> bool:
        """True if nothing needs the node: a leaf whose KV are known and that no row extends."""
        return not self.children and not self.pins and self.segment is not None


class PrefixCache:
    """The tree and its budget.

    Args:
        max_tokens: Ids whose KV are kept beyond those in use.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.tokens = 0
        self._clock = count(1)
        self.root = Node((), 0, None)

    def clear(self) -> None:
        """Forget everything: the weights have changed."""
        self.root = Node((), 0, None)
        self.tokens = 0

    def match(self, ids: Sequence[int], below: Node | None = None) -> list[tuple[Node, int]]:
        """The longest known beginning of `ids`, from the root or `below` a node: (node, how many of its ids).

        Only the last entry can be partial.
        """
        node, position = below or self.root, 0
        path: list[tuple[Node, int]] = []
        now = next(self._clock)
        while position < len(ids):
            child = node.children.get(ids[position])
            if child is None:
                break
            shared = common_length(child.tokens, ids, position)
            child.used = now
            path.append((child, shared))
            position += shared
            if shared < len(child.tokens):
                break
            node = child
        return path

    def extend(self, path: list[tuple[Node, int]], tokens: Sequence[int], below: Node | None = None) -> Node:
        """Add a node with `tokens` after a matched path (split where the path ends inside a node).

        Returns the new node, or the last of the path when there are no tokens. The caller sets its segment
        (with `fill`) or marks it pending.
        """
        parent = below or self.root
        if path:
            parent = self.split(*path[-1])
        if not tokens:
            return parent
        node = Node(tuple(tokens), parent.end, parent)
        node.used = next(self._clock)
        parent.children[node.tokens[0]] = node
        return node

    def fill(self, node: Node, segment: Segment) -> None:
        """Give a node its KV."""
        node.segment, node.packed = segment, None
        self.tokens += len(node.tokens)

    def split(self, node: Node, length: int) -> Node:
        """Make a node end after `length` of its ids; returns the upper part, which may be the node itself."""
        if length == len(node.tokens):
            return node
        assert node.parent is not None
        upper = Node(node.tokens[:length], node.start, node.parent)
        upper.used = node.used
        upper.parent, upper.children = node.parent, {node.tokens[length]: node}
        if node.segment is not None:
            upper.segment = tuple(part[:, :, :length].clone() for part in node.segment)
            node.segment = tuple(part[:, :, length:].clone() for part in node.segment)
        if node.packed is not None:
            upper.packed, node.packed = node.packed[:length], node.packed[length:]
        node.parent.children[node.tokens[0]] = upper
        node.tokens, node.start, node.parent = node.tokens[length:], node.start + length, upper
        return upper

    def drop(self, node: Node) -> None:
        """Remove a node that has no children."""
        assert node.parent is not None
        del node.parent.children[node.tokens[0]]
        if node.segment is not None:
            self.tokens -= len(node.tokens)

    def evict(self) -> None:
        """Drop least recently used leaves, but no pinned ones, beyond the budget: down to 9/10 of it."""
        if self.tokens <= self.max_tokens:
            return
        enough = self.max_tokens * 9 // 10  # not each step again
        order, heap = count(), []
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            if node.evictable:
                heap.append((node.used, next(order), node))
        heapq.heapify(heap)
        while heap and self.tokens > enough:
            node = heapq.heappop(heap)[2]
            self.drop(node)
            parent = node.parent
            if parent is not None and parent.evictable:  # the root has no KV of its own
                heapq.heappush(heap, (parent.used, next(order), parent))


def common_length(tokens: tuple[int, ...], ids: Sequence[int], position: int = 0) -> int:
    """Count the leading `tokens` that equal `ids` from `position` on."""
    limit = min(len(tokens), len(ids) - position)
    if tokens[:limit] == tuple(ids[position : position + limit]):
        return limit
    low, high = 0, limit - 1  # tokens[:low] are equal, tokens[:high + 1] are not
    while low < high:
        middle = (low + high + 1) // 2
        if tokens[:middle] == tuple(ids[position : position + middle]):
            low = middle
        else:
            high = middle - 1
    return low
