"""Retrievers rank the passages of a corpus for text queries; all environments of a process share them.

`base` has the protocol, `opening` opens any kind by name, `building` builds its index, and `manifest`
describes the folder of an index. The kinds are `bm25/`, `lucene/`, `dense/`, `hybrid`, which fuses others,
and `client`, which asks a server such as `server/` runs (both use `messages`). `cache` keeps results on
disk; `counters` counts.
"""

from at2po_env.retrieval.base import Passage, Retriever
from at2po_env.retrieval.bm25.retriever import Bm25Retriever
from at2po_env.retrieval.opening import open_retriever

__all__ = ["Bm25Retriever", "Passage", "Retriever", "open_retriever"]
