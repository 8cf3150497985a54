"""Which calls the attention of a packed tree consists of.

Every token attends to the tokens before it in its own chain, and to whole segments of the chains above: a
segment is a run of tokens with the same descendants, and these follow one another without a gap. So keys and
queries of every call are slices of the packed sequence, and only calls within a chain are causal; nothing is
gathered and no mask is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Self

import numpy as np

from at2po_agent.packing.prefixes import Layout
from at2po_agent.types import IntArray


class Call(NamedTuple):
    """Queries [begin, end) attend to keys [first, stop): causally if both are the same, else to all."""

    begin: int
    end: int
    first: int
    stop: int


@dataclass(frozen=True, eq=False)
class TreePlan:
    """The attention of one packed sequence of P tokens.

    Attributes:
        chains: One causal call for each chain.
        segments: One call for each segment with descendants outside its chain.
        last: int64[P], one past the last descendant of each token.
        positions: int64[P].
    """

    chains: tuple[Call, ...]
    segments: tuple[Call, ...]
    last: IntArray
    positions: IntArray

    @classmethod
    def of(cls, layout: Layout) -> Self:
        """Find the calls of a layout."""
        chains = [Call(begin, end, begin, end) for begin, end in layout.chains]
        segments = []
        for begin, end in layout.chains:
            lasts = layout.last[begin:end]
            bounds = [begin, *(np.flatnonzero(np.diff(lasts)) + begin + 1).tolist(), end]
            for first, stop in pairwise(bounds):
                below = int(layout.last[first])
                if below > end:
                    segments.append(Call(end, below, first, stop))
        return cls(tuple(chains), tuple(segments), layout.last, layout.positions)

    @property
    def longest(self) -> int:
        """Tokens of the longest branch."""
        return int(self.positions.max()) + 1 if len(self.positions) else 0
