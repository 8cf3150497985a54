"""Declares what every retriever offers: it takes text queries and gives ranked passages."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from at2po_env.data.corpus import Corpus
from at2po_env.data.corpus import Passage as Passage
from at2po_env.errors import RetrievalError
from at2po_env.forking.frozen import Shared


@runtime_checkable
class Retriever(Protocol):
    """Ranks the passages of one corpus; immutable and thread safe, so that every environment may share it."""

    @property
    def digest(self) -> str:
        """Hex digest of what the results depend on: kind, corpus and settings."""
        ...

    def search(self, queries: Sequence[str], topk: int) -> list[list[Passage]]:
        """Return for each query at most `topk` passages, best first.

        A query that matches nothing gives an empty list. No text makes this raise; a retriever that cannot
        answer (a damaged index, an unreachable server) raises `RetrievalError`.
        """
        ...


class CorpusRetriever(Shared):
    """A retriever that ranks the passages of a corpus in this process; `len` is their number."""

    _corpus: Corpus | Sequence[Passage]

    def __len__(self) -> int:
        return len(self._corpus)

    def __repr__(self) -> str:
        held = self._corpus.path if isinstance(self._corpus, Corpus) else f"{len(self)} passages in memory"
        return f"{type(self).__name__}({str(held)!r})"


def check_search(queries: Sequence[str], topk: int) -> None:
    """Raise a `RetrievalError` unless these can be the arguments of a search."""
    if isinstance(queries, str) or topk < 1:
        raise RetrievalError(
            f"search needs a list of queries and topk >= 1, got {queries!r:.80} and {topk!r}."
        )
