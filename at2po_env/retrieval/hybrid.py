"""Fuses two or more rankings of one corpus into one, by reciprocal rank fusion.

    score(d) = sum over the rankings r that hold d of 1 / (k + rank_r(d)),   rank from 1

References:
    Cormack, Clarke and Buettcher, "Reciprocal Rank Fusion outperforms Condorcet and individual Rank
    Learning Methods", SIGIR 2009; k = 60 is theirs.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from at2po_env.data.corpus import Passage
from at2po_env.errors import ConfigError
from at2po_env.forking.frozen import Shared
from at2po_env.retrieval.base import Retriever
from at2po_env.retrieval.opening import open_retriever


class HybridRetriever(Shared):
    """Fuses what two (or more) retrievers find.

    A passage is known by its id and title. Equal scores rank by the better single rank, then by the order of
    the retrievers.

    Args:
        corpus: JSON lines in wiki-18 form, searched by every part that is given by name.
        parts: Kinds by name (or `{"kind": ..., options of that kind}`), or retrievers.
        k: Dampens the advantage of the first ranks.
        depth: Passages asked of each part; at least `topk` are.
    """

    def __init__(
        self,
        corpus: str | Path | None,
        *,
        parts: Sequence[str | Mapping[str, Any] | Retriever] = ("bm25", "dense"),
        k: float = 60.0,
        depth: int = 50,
    ) -> None:
        if len(parts) < 2 or k < 0 or depth < 1:
            raise ConfigError(
                f"a hybrid needs two parts, k >= 0 and depth >= 1; got {len(parts)}, {k}, {depth}."
            )
        self.parts = list[Retriever]()
        for part in parts:
            options = dict(part) if isinstance(part, Mapping) else {"kind": part}
            self.parts.append(open_retriever(options.pop("kind", "bm25"), corpus, **options))
        self._k, self._depth = k, depth
        text = f"hybrid {k} {depth} {' '.join(part.digest for part in self.parts)}"
        self.digest = hashlib.sha256(text.encode()).hexdigest()

    def __repr__(self) -> str:
        return f"HybridRetriever({', '.join(map(repr, self.parts))})"

    def search(self, queries: Sequence[str], topk: int) -> list[list[Passage]]:
        """Return for each query at most `topk` passages, best first; `score` is the fused one."""
        rankings = [part.search(queries, max(topk, self._depth)) for part in self.parts]
        return [fuse(ranked, topk, k=self._k) for ranked in zip(*rankings, strict=True)]


def fuse(rankings: Sequence[Sequence[Passage]], topk: int, *, k: float = 60.0) -> list[Passage]:
    """Fuse rankings of one query into the best `topk`."""
    scores: dict[tuple[str, str], float] = {}
    best: dict[tuple[str, str], tuple[int, int]] = {}
    passages: dict[tuple[str, str], Passage] = {}
    for part, ranking in enumerate(rankings):
        for rank, passage in enumerate(ranking, 1):
            key = (passage.id, passage.title)
            scores[key] = scores.get(key, 0.0) + 1.0 / (k + rank)
            best[key] = min(best.get(key, (rank, part)), (rank, part))
            passages.setdefault(key, passage)
    ranked = sorted(scores, key=lambda key: (-scores[key], best[key]))[:topk]
    return [passages[key]._replace(score=scores[key]) for key in ranked]
