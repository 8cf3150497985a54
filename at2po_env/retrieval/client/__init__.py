"""Search on a server: `retriever` (`HttpRetriever`) and what it needs."""

from at2po_env.retrieval.client.retriever import HttpRetriever

__all__ = ["HttpRetriever"]
