"""Question answering over a searched corpus: the seven QA ids (`making`) and MiniWiki (`miniwiki`)."""

from at2po_envs.search_qa.making import make, make_vector

__all__ = ["make", "make_vector"]
