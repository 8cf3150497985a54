"""BM25 search in this process with numpy alone.

Read `retriever` (opens an index and searches), `build` (passages to postings) and `rank` (the best rows).
"""

from at2po_env.retrieval.bm25.retriever import Bm25Retriever

__all__ = ["Bm25Retriever"]
