"""BM25 search in this process with numpy alone.

`retriever` (what users open), `index` (a folder of it), `build`, `store`, `rank`.
"""

from at2po_env.retrieval.bm25.retriever import Bm25Retriever

__all__ = ["Bm25Retriever"]
