"""Question answering over a searched corpus: the seven QA ids and MiniWiki."""

from at2po_envs.search_qa.making import make, make_vector

__all__ = ["make", "make_vector"]
