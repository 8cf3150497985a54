"""The published reward of a purchase: type, attributes, options and price.

    reward = r_type * (attributes found + options found + price is kept) / (attributes + options + 1)

`r_type` is 1 for a product of the same search, of two common categories, or with enough nouns of the goal's
title in its own; with few or none of them it falls to 0.5, 0.1 or 0.

References:
    Yao et al., "WebShop", https://arxiv.org/abs/2207.01206, and its released code, which decides where they
    differ. The original compares words with thefuzz 0.19 (which falls back on `difflib`); `token_set_ratio`
    gives its numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Any, NamedTuple

from at2po_env.errors import ConfigError, MissingExtraError
from at2po_env.retrieval.tokens import STOP_WORDS
from at2po_envs.webshop.goals import Goal, price_of
from at2po_envs.webshop.products import Product

ALIKE = 85
"""Words are taken for the same above this ratio."""

_COLORS = """
alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown burgundy camel
camo caramel champagne charcoal cheetah chestnut chocolate christmas coffee cognac copper coral cranberry
cream crystal dark denim eggplant elephant espresso fuchsia gold granite grape graphite grass gray green grey
heather indigo ivory ivy khaki lavender lemon leopard light lilac lime magenta maroon mauve merlot midnight
mint mocha multicolor mushroom mustard natural navy nude olive orange peach pewter pink plum purple rainbow
red rose royal rust sand sapphire seashell silver skull slate steel stone stonewash sunflower tan taupe teal
tiger turquoise violet walnut wheat white wine yellow
"""
COLORS = tuple(_COLORS.split())
"""The published colours, in the published order: the first one found in a value stands for it."""

_LATIN_1 = dict.fromkeys(range(0x80, 0x100))
_NO_WORD = re.compile(r"\W")
_WORD = re.compile(r"[^\W_]+(?:[.'’&-][^\W_]+)*")
_NUMBER = re.compile(r"[\d.\-]+")

Nouns = Callable[[str], tuple[str, ...]]
"""Returns the nouns of a title in lower case, repeated as in the title."""


class Score(NamedTuple):
    """The reward of a purchase and its parts; `r_option` is None for goals without options."""

    reward: float
    r_type: float
    r_att: float
    r_option: float | None
    r_price: bool
    query_match: bool
    category_match: bool
    title_score: float


def score_purchase(product: Product, options: dict[str, str], goal: Goal, nouns: Nouns) -> Score:
    """Score the purchase of a product with the options that were chosen.

    Args:
        product: What was bought.
        options: Name of the option -> value.
        goal: What was asked for.
        nouns: Finds the nouns of titles; see `find_nouns`.
    """
    query_match = product.query == goal.product.query
    common = _categories(product) & _categories(goal.product)
    category_match = len(common) >= 2
    wanted = nouns(goal.product.title)
    title_score = len({*nouns(product.title)} & {*wanted}) / len(wanted) if wanted else 0.2
    r_type = 1.0 if query_match or category_match or title_score > 0.2 else 0.5
    if title_score < 0.1:
        r_type = 0.1 if title_score else 0.0
    attributes = sum(_has_attribute(product, attribute) for attribute in goal.attributes)
    chosen = [color_or_text(value) for value in options.values()]
    found = sum(any(_alike(value, color_or_text(option)) for value in chosen) for option in goal.options)
    r_price = price_of(product) <= goal.price_upper
    reward = (attributes + found + r_price) / (len(goal.attributes) + len(goal.options) + 1) * r_type
    return Score(
        reward=reward,
        r_type=r_type,
        r_att=attributes / len(goal.attributes),
        r_option=found / len(goal.options) if goal.options else None,
        r_price=r_price,
        query_match=query_match,
        category_match=category_match,
        title_score=title_score,
    )


def _categories(product: Product) -> set[str]:
    return {part.strip() for part in product.product_category.split("›")}


def _has_attribute(product: Product, wanted: str) -> bool:
    """Whether an attribute is among the product's, nearly, or literally in its text."""
    texts = (product.title, " ".join(product.bullets), product.description)
    return any(_alike(attribute, wanted) for attribute in product.attributes) or any(
        wanted in text.lower() for text in texts
    )


def color_or_text(option: str | tuple[str, str]) -> str:
    """Return the first published colour in a value, else the value.

    A pair of a synthetic goal is treated as in the original: only a value that is a colour and nothing else
    counts as one, and otherwise the text of the pair is compared.
    """
    for color in COLORS:
        if color in option:
            return color
    return str(option)


def _alike(one: str, other: str) -> bool:
    return token_set_ratio(one, other) > ALIKE


@lru_cache(maxsize=1 << 15)
def token_set_ratio(one: str, other: str) -> int:
    """Return 0 to 100: how alike two texts are as sets of words, whatever else the longer one has.

    Example:
        >>> token_set_ratio("color: navy blue", "Blue"), token_set_ratio("red", "read")
        (100, 86)
    """
    first, second = _words(one), _words(other)
    if not first or not second:
        return 0
    common = " ".join(sorted(first & second))
    longer = f"{common} {' '.join(sorted(first - second))}".strip()
    others = f"{common} {' '.join(sorted(second - first))}".strip()
    return max(_ratio(common, longer), _ratio(common, others), _ratio(longer, others))


def _words(text: str) -> set[str]:
    return set(_NO_WORD.sub(" ", text.translate(_LATIN_1)).lower().split())


def _ratio(one: str, other: str) -> int:
    if one == other:
        return 100
    return round(100 * SequenceMatcher(None, one, other).ratio()) if one and other else 0


def find_nouns(kind: str) -> tuple[str, Nouns]:
    """Return what finds the nouns of titles, and its name.

    "spacy" is spaCy's small English model, as in the original. "rule" needs no model: titles are mostly
    names and nouns, so every word counts that has a letter and is no function word. On the four pairs of
    titles in the original's tests the title scores are within 0.07 of spaCy's.

    Args:
        kind: "spacy", "rule", or "auto": spaCy where the model is installed.

    Raises:
        ConfigError: Unknown kind.
        MissingExtraError: "spacy", and the model is not installed.
    """
    if kind not in ("auto", "spacy", "rule"):
        raise ConfigError(f"nouns={kind!r}: expected 'auto', 'spacy' or 'rule'")
    if kind != "rule":
        model = _spacy_model()
        if model is not None:
            return "spacy", model
        if kind == "spacy":
            raise MissingExtraError(
                "nouns='spacy' needs spaCy's model en_core_web_sm, which is not installed. Fix: pip install "
                "spacy, python -m spacy download en_core_web_sm; or nouns='rule'"
            )
    return "rule", nouns_by_rule


@lru_cache(maxsize=1)
def _spacy_model() -> Nouns | None:
    try:
        import spacy

        parse: Any = spacy.load("en_core_web_sm")
    except (ImportError, OSError):  # spaCy's own error for a missing model is an OSError
        return None

    @lru_cache(maxsize=1 << 15)
    def nouns(title: str) -> tuple[str, ...]:
        return tuple(word.text.lower() for word in parse(title) if word.pos_ in ("NOUN", "PROPN"))

    return nouns


@lru_cache(maxsize=1 << 15)
def nouns_by_rule(title: str) -> tuple[str, ...]:
    """Return the words of a title that have a letter and are no function words.

    Example:
        >>> nouns_by_rule("Power Cord for JBL Bar 3.1, Bar 2.1")
        ('power', 'cord', 'jbl', 'bar', 'bar')
    """
    words = _WORD.findall(title.lower())
    return tuple(word for word in words if word not in _FUNCTION_WORDS and not _NUMBER.fullmatch(word))


_MORE_WORDS = """
from your you our my his her its all any each every more most than over under per w via so can
has have do does who which what when where how only also very between before after during without within
"""
_FUNCTION_WORDS = STOP_WORDS | frozenset(_MORE_WORDS.split())
