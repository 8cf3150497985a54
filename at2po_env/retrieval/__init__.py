"""Retrievers: ranked passages for text queries, shared by all environments of a process."""

from at2po_env.retrieval.base import Passage, Retriever
from at2po_env.retrieval.bm25.retriever import Bm25Retriever
from at2po_env.retrieval.opening import open_retriever

__all__ = ["Bm25Retriever", "Passage", "Retriever", "open_retriever"]
