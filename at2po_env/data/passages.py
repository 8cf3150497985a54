"""A passage: what corpora hold and retrievers rank."""

from typing import NamedTuple


class Passage(NamedTuple):
    """One passage of a corpus; `score` is the retriever's, 0.0 where nobody ranked it."""

    id: str
    title: str
    text: str
    score: float = 0.0
