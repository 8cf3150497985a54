"""Text to search terms: lower-case runs of letters and digits, without the words that carry no topic."""

import re

# The stop words of Lucene's EnglishAnalyzer, so that a Lucene index of the same corpus drops the same words.
_WORDS = """
a an and are as at be but by for if in into is it no not of on or such that the their then there these they
this to was will with
"""
STOP_WORDS = frozenset(_WORDS.split())

_terms = re.compile(r"[^\W_]+").findall


def tokenize(text: str, stop_words: frozenset[str] = STOP_WORDS) -> list[str]:
    """Return the terms of `text` in order, duplicates included; any text is fine."""
    return [term for term in _terms(text.lower()) if term not in stop_words]
