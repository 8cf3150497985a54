"""An expert that knows the goal: it searches, opens the product, chooses its options and buys it."""

from __future__ import annotations

from at2po_envs.webshop.goals import Goal
from at2po_envs.webshop.pages import PER_PAGE, Session
from at2po_envs.webshop.reward import ALIKE, color_or_text, token_set_ratio
from at2po_envs.webshop.shop import Searcher, Shop


def plan(session: Session, goal: Goal, shop: Shop, searcher: Searcher) -> list[str]:
    """Return the commands that buy the product of a goal, from any page.

    On the product's page, and where it is listed on this page or a later one, the expert goes on from there.
    Else it searches for the instruction without its clause about the price, then for what the title says,
    and takes the first search that finds the product. Some goals cannot be satisfied, because the published
    reward never accepts their options; the expert then buys the product all the same.

    Args:
        session: Where the customer stands.
        goal: What is to be bought.
        shop: The products.
        searcher: Their search.
    """
    asin = goal.product.asin
    row = shop.find_row(asin)
    values = [" ".join(value.split()) for value in chosen_options(goal)]
    if session.page == "item" and session.asin == asin:
        taken = {" ".join(value.split()) for _, value in session.options}
        return [*(f"click[{value}]" for value in values if value not in taken), "click[buy now]"]
    purchase = [f"click[{asin.lower()}]", *(f"click[{value}]" for value in values), "click[buy now]"]
    if session.page == "results":
        found = searcher.find(session.query)
        ahead = found.index(row) // PER_PAGE + 1 - session.number if row in found else -1
        if ahead >= 0:
            return [*["click[next >]"] * ahead, *purchase]
    words = goal.text.partition(", and price lower than")[0]
    best, pages = words, 0
    for query in (words, goal.product.title, f"{goal.product.title} {words}"):
        # Brackets would end the command early; a longer one would not be read.
        query = " ".join(query.translate(_NO_BRACKETS).split())[:900]
        found = searcher.find(query.lower())
        if row in found:
            best, pages = query, found.index(row) // PER_PAGE
            break
    return [f"search[{best}]", *["click[next >]"] * pages, *purchase]


_NO_BRACKETS = str.maketrans("[]<>", "    ")


def chosen_options(goal: Goal) -> list[str]:
    """Return the values to click: for each option of the goal, the most alike value that counts as found."""
    offered = [(name, value) for name, values in goal.product.options for value in values]
    chosen: dict[str, str] = {}
    for option in goal.options:
        if isinstance(option, tuple) and option in offered:
            chosen[option[0]] = option[1]
            continue
        wanted = color_or_text(option)
        scored = [
            (token_set_ratio(color_or_text(value), wanted), value == option, name, value)
            for name, value in offered
            if name not in chosen
        ]
        best = max(scored, default=None)
        if best is not None and best[0] > ALIKE:
            chosen[best[2]] = best[3]
    return list(chosen.values())
