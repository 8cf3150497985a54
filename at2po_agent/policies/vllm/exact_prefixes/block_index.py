"""Finds blocks of keys and values that begin as a prefix goes on: prefix caching to the token, not the block.

An engine's own prefix cache knows full blocks by the hash of all tokens up to their end. Where a prefix ends
inside a block, or leaves another one there, the tokens that the two share in that block are computed already
and are found here.

Knows block numbers, tokens and the hash of what comes before; no engine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

from at2po_agent.policies.hf.prefix_cache import common_length


class Found(NamedTuple):
    """The block that agrees longest, and in how many tokens; (None, 0) where no token does."""

    block: int | None
    tokens: int


class BlockIndex:
    """Blocks by what comes before them. A block has one place; its next one replaces it."""

    def __init__(self) -> None:
        self._parents: dict[int, Hashable] = {}
        self._children: defaultdict[Hashable, dict[int, tuple[int, ...]]] = defaultdict(dict)

    def __len__(self) -> int:
        return len(self._parents)

    def put(self, block: int, parent: Hashable, tokens: Iterable[int]) -> None:
        """Say that a block holds `tokens`, from its first position on, after the prefix `parent`."""
        self.drop(block)
        self._parents[block] = parent
        self._children[parent][block] = tuple(tokens)

    def drop(self, block: int) -> None:
        """Say that a block holds something else now."""
        if block in self._parents:
            parent = self._parents.pop(block)
            del self._children[parent][block]
            if not self._children[parent]:
                del self._children[parent]

    def clear(self) -> None:
        """Forget all blocks."""
        self._parents.clear()
        self._children.clear()

    def take(self, other: BlockIndex) -> None:
        """Move all entries of another index into this one."""
        for parent, blocks in other._children.items():
            for block, tokens in blocks.items():
                self.put(block, parent, tokens)
        other.clear()

    def find(self, parent: Hashable, tokens: Sequence[int]) -> Found:
        """The block after `parent` that begins with most of `tokens`; the first such one."""
        best = Found(None, 0)
        for block, held in self._children.get(parent, {}).items():
            shared = common_length(held, tokens)
            if shared > best.tokens:
                best = Found(block, shared)
        return best
