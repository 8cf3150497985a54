"""Search on a server over HTTP: `HttpRetriever`, in `retriever`."""

from at2po_env.retrieval.client.retriever import HttpRetriever

__all__ = ["HttpRetriever"]
