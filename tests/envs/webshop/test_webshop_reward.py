"""The reward of a purchase, part by part, with numbers derived by hand."""

from __future__ import annotations

from typing import Any

import pytest
from at2po_envs.webshop import reward
from at2po_envs.webshop.goals import Goal
from at2po_envs.webshop.products import Product
from at2po_envs.webshop.reward import (
    color_or_text,
    find_nouns,
    nouns_by_rule,
    score_purchase,
    token_set_ratio,
)

from at2po_env.errors import MissingExtraError

LAMP = Product(
    asin="LAMP",
    title="Brass Desk Lamp",
    description="A lamp for the desk.",
    bullets=("Dimmable", "Energy saving"),
    price_tag="$40.0",
    prices=(40.0,),
    options=(("color", ("gold", "black")),),
    category="garden",
    query="desk lamps",
    product_category="Home › Lighting › Desk Lamps",
    attributes=("easy clean", "brass finish"),
)


def goal(**changes: Any) -> Goal:
    fields = {"attributes": ("easy clean", "dimmable"), "options": ("gold",), "price_upper": 50.0}
    return Goal(**{"id": "LAMP-h0", "product": LAMP, "text": "a lamp", **fields, **changes})


def test_everything_that_was_asked_for_is_worth_one() -> None:
    score = score_purchase(LAMP, {"color": "gold"}, goal(), nouns_by_rule)
    assert score.reward == 1.0
    assert (score.r_type, score.r_att, score.r_option, score.r_price) == (1.0, 1.0, 1.0, True)


@pytest.mark.parametrize(
    ("product", "options", "wanted", "expected"),
    [
        # 2 attributes + 0 options + 1 price, of 2 + 1 + 1.
        (LAMP, {"color": "black"}, {}, 3 / 4),
        # 2 + 1 + 0: too expensive.
        (LAMP, {"color": "gold"}, {"price_upper": 30.0}, 3 / 4),
        # 1 of 2 attributes; "energy saving" is found in the features, "oak" nowhere.
        (LAMP, {"color": "gold"}, {"attributes": ("energy saving", "oak")}, 3 / 4),
        # Without options: 2 + 1, of 2 + 1.
        (LAMP, {}, {"options": ()}, 1.0),
        # The same search term, but no noun of the title: r_type falls to 0.
        (LAMP._replace(title="Chair"), {"color": "gold"}, {}, 0.0),
        # One noun of three (0.33), another search, other categories: still the right type.
        (LAMP._replace(title="Lamp", query="q", product_category="x"), {"color": "gold"}, {}, 1.0),
    ],
)
def test_parts_that_are_missing_cost_their_share(
    product: Product, options: dict[str, str], wanted: dict[str, Any], expected: float
) -> None:
    assert score_purchase(product, options, goal(**wanted), nouns_by_rule).reward == pytest.approx(expected)


@pytest.mark.parametrize(
    ("shared", "r_type"),
    [(0, 0.0), (1, 0.1), (2, 0.5), (4, 0.5), (5, 1.0)],  # of 20 nouns: below 0.1, to 0.2, above
)
def test_the_type_falls_in_steps_with_the_nouns_that_are_missing(shared: int, r_type: float) -> None:
    title = " ".join(f"noun{letter}" for letter in "abcdefghijklmnopqrst")
    asked = goal(product=LAMP._replace(title=title))
    bought = LAMP._replace(title=" ".join(title.split()[:shared]), query="other", product_category="other")
    assert score_purchase(bought, {}, asked, nouns_by_rule).r_type == r_type


def test_two_common_categories_make_the_type_right_and_one_does_not() -> None:
    title = " ".join(f"noun{letter}" for letter in "abcdefghij")
    asked = goal(product=LAMP._replace(title=title))
    bought = LAMP._replace(title="nouna", query="other", product_category="Desk Lamps › Lighting › Sale")
    assert score_purchase(bought, {}, asked, nouns_by_rule).r_type == 1.0
    one = bought._replace(product_category="Lighting › Sale")
    assert score_purchase(one, {}, asked, nouns_by_rule).r_type == 0.5


def test_the_price_that_is_exactly_the_limit_is_kept() -> None:
    assert score_purchase(LAMP, {}, goal(price_upper=40.0), nouns_by_rule).r_price
    assert not score_purchase(LAMP, {}, goal(price_upper=39.99), nouns_by_rule).r_price


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("navy blue", "blue"),  # the first in the published order, not in the text
        ("7.5 wide", "7.5 wide"),
        ("standard", "tan"),  # the published rule looks for letters, not words
        (("color", "navy"), "navy"),
        (("color", "navy blue"), "('color', 'navy blue')"),
    ],
)
def test_a_colour_stands_for_the_values_that_contain_it(option: Any, expected: str) -> None:
    assert color_or_text(option) == expected


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("navy blue", "blue", 100),  # a set of words that holds the other
        ("Blue/Navy!", "navy blue", 100),
        ("red", "read", 86),  # 2 * 3 / 7
        ("easy to clean", "easy clean", 100),
        ("large", "small", 20),  # difflib finds one letter in a common order: 2 * 1 / 10
        ("", "blue", 0),
        ("9é", "9", 100),  # Latin-1 letters are dropped, as by the original
    ],
)
def test_ratio_of_word_sets(one: str, other: str, expected: int) -> None:
    assert token_set_ratio(one, other) == expected


def test_nouns_by_rule_come_near_the_published_title_scores() -> None:
    # Pairs and scores (by spaCy's model) are those of the original's own tests.
    cord = "Saireed UL Listed 2 Prong Power Cord for JBL Bar 3.1 Bar 2.1 Channel 4K Ultra HD Soundbar"
    lead = (
        "BRST AC Power Cord Outlet Socket Cable Plug Lead for Panasonic SC-HT830V DVD/VCR Combo Home Theater "
        "System"
    )
    shoes = (
        "PEAK High Top Mens Basketball Shoes Lou Williams Streetball Master Breathable Non Slip Outdoor "
        "Sneakers"
    )
    pairs = [
        ("Mens D.O.N. Issue 2 Gca Basketball Sneakers Shoes Casual - Off White", shoes, 0.333),
        (f"{cord} Home Theater System Subwoofer", lead, 0.3),
        (cord, lead, 0.15),
        ("Rusticware 921ORB Kitchen and Bath Cabinet Knob", "Minkissy 2pcs Stainless Steel Tweezers", 0.0),
    ]
    for wanted, bought, published in pairs:
        asked = goal(product=LAMP._replace(title=wanted))
        score = score_purchase(LAMP._replace(title=bought), {}, asked, nouns_by_rule)
        assert score.title_score == pytest.approx(published, abs=0.07)


def test_the_model_is_taken_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def model(title: str) -> tuple[str, ...]:
        return (title.lower(),)

    monkeypatch.setattr(reward, "_spacy_model", lambda: model)
    assert find_nouns("auto") == find_nouns("spacy") == ("spacy", model)
    assert find_nouns("rule") == ("rule", nouns_by_rule)
    monkeypatch.setattr(reward, "_spacy_model", lambda: None)
    assert find_nouns("auto") == ("rule", nouns_by_rule)
    with pytest.raises(MissingExtraError, match="en_core_web_sm"):
        find_nouns("spacy")
