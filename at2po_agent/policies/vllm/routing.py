"""Chooses the engine of a request: one that has computed its beginning, else the one with the least to do.

An engine knows the keys and values of its own requests only. All branches of a question begin with its
prompt, so a request whose beginning is the whole prefix of an earlier one follows it. Questions that merely
share their instructions are spread.

Knows nothing of vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_END = -1


class Router:
    """Remembers where prompts went.

    Args:
        engines: Their number.
    """

    def __init__(self, engines: int) -> None:
        self.open = [0] * engines
        self._prompts = [0] * engines
        self._tree: dict[int, Any] = {}

    def route(self, prefix_ids: Sequence[int]) -> int:
        """The engine of a request, which counts as open from now on."""
        engine = 0 if len(self.open) == 1 else self._follow(prefix_ids)
        self.open[engine] += 1
        return engine

    def done(self, engine: int) -> None:
        """One of its requests has ended."""
        self.open[engine] -= 1

    def forget(self) -> None:
        """The engines have forgotten all keys and values."""
        self._tree.clear()
        self._prompts = [0] * len(self.open)

    def _follow(self, prefix_ids: Sequence[int]) -> int:
        node = self._tree
        for token in prefix_ids:
            if _END in node:
                break
            node = node.setdefault(token, {})
        if _END not in node:
            node[_END] = self._idlest()
            self._prompts[node[_END]] += 1
        return int(node[_END])

    def _idlest(self) -> int:
        return min(
            range(len(self.open)), key=lambda engine: (self.open[engine], self._prompts[engine], engine)
        )
