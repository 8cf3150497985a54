"""The pages of the shop: what each one shows, what can be clicked on it, and where a click leads.

The original renders HTML pages and reads their texts back. Here a page is the sequence of those texts, each
with what it is on the page; `as_text` and `as_rich_text` write the observation modes "text" and "text_rich"
exactly as the original does, oddities included. A test compares both with pages that the original itself has
written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

from at2po_envs.webshop.products import Product

PER_PAGE = 10
BACK, NEXT, PREVIOUS, BUY = "back to search", "next >", "< prev", "buy now"
PageName = Literal["search", "results", "item", "description", "features", "reviews", "done"]
SUB_PAGES: Mapping[str, PageName] = {
    "description": "description",
    "features": "features",
    "reviews": "reviews",
}
PAGES: tuple[PageName, ...] = ("search", "results", "item", "description", "features", "reviews", "done")


class Session(NamedTuple):
    """Where a customer stands; this is the whole state of the world.

    Attributes:
        goal: Id of the goal.
        page: The page that is shown.
        query: The last search, in lower case.
        number: The page of its results, from 1.
        asin: The product that is looked at, "" on other pages.
        options: (name, value) of the options chosen, in the order of choice.
        seen: Products looked at since the search page was shown last, sorted.
        reward: What the purchase was worth, on the last page.
    """

    goal: str
    page: PageName = "search"
    query: str = ""
    number: int = 0
    asin: str = ""
    options: tuple[tuple[str, str], ...] = ()
    seen: tuple[str, ...] = ()
    reward: float = 0.0


class Element(NamedTuple):
    """One text on a page: plain text, a button, the link to a product, or the value of the option `name`."""

    text: str
    kind: Literal["plain", "button", "link", "option"] = "plain"
    name: str = ""


def elements(
    session: Session, instruction: str, found: Sequence[Product], total: int, product: Product | None
) -> list[Element]:
    """Return the texts of a page in order.

    Args:
        session: Where the customer stands.
        instruction: What the customer was asked to buy.
        found: The products on this page of results.
        total: Number of all results.
        product: The product that is looked at.
    """
    if session.page == "search":
        return [
            Element("WebShop"),
            Element("Instruction: "),
            *_plain(instruction),
            Element("Search", "button"),
        ]
    if session.page == "done":
        return _receipt(session)
    page = [Element("Instruction:"), *_plain(instruction), Element("Back to Search", "button")]
    if session.page == "results":
        page.append(Element(f"Page {session.number} (Total results: {total})"))
        if session.number > 1:
            page.append(Element("< Prev", "button"))
        page.append(Element("Next >", "button"))
        for one in found:
            page += [Element(one.asin, "link"), *_plain(one.title), Element(one.price_tag)]
        return page
    assert product is not None, "all other pages are about a product"
    page.append(Element("< Prev", "button"))
    if session.page == "item":
        for name, values in product.options:
            page += _plain(name)
            page += [Element(value, "option", name) for value in values if value]
        page += [*_plain(product.title), Element(f"Price: {product.price_tag}"), Element("Rating: N.A.")]
        buttons = ("Description", "Features", "Reviews", "Buy Now")
        return page + [Element(button, "button") for button in buttons]
    if session.page == "description":
        return page + _plain(product.description)
    if session.page == "features":
        return page + [element for bullet in product.bullets for element in _plain(f" {bullet}")]
    return page  # of reviews, which the published data do not have


def _plain(text: str) -> list[Element]:
    """Return a text as the original's HTML parser sees it: blank ones are one space, or not there at all."""
    if text.strip(" \t\n\r\f"):
        return [Element(text)]
    return [] if not text or "\n" in text else [Element(" ")]


def _receipt(session: Session) -> list[Element]:
    """Return the last page, of which the original hides most; its text modes show everything."""
    chosen = json.dumps(dict(session.options), sort_keys=True)
    for character in "<>&'":
        chosen = chosen.replace(character, f"\\u{ord(character):04x}")
    texts = ["Thank you for shopping with us!", "Your code: ", "None", " (Paste it in your MTurk interface.)"]
    texts += ["Purchased", "asin", session.asin, "options", chosen, "attrs", "None", "category", "None"]
    texts += [
        "query",
        "None",
        "product category",
        "None",
        "Target",
        "asin",
        "options",
        "attrs",
        "price upper",
    ]
    texts += [
        "instuction text",
        "category",
        "product category",
        "query",
        "Goal ",
        "None",
        "Reward",
    ]
    texts += ["Your score (min 0.0, max 1.0)", str(session.reward), "Reward Details ", "None"]
    return [Element(text) for text in texts]


def clickables(page: Sequence[Element]) -> dict[str, Element]:
    """Return what `click[...]` can name, in the original's order; a later element of the same text wins.

    White space in names is collapsed, because it is in commands.
    """
    buttons = [element for element in page if element.kind == "button"]
    links = [element for element in page if element.kind == "link"]
    names = {element.text.lower(): element for element in buttons + links}
    names.update((element.text, element) for element in page if element.kind == "option")
    return {" ".join(name.split()): element for name, element in names.items()}


def as_text(page: Sequence[Element], session: Session) -> str:
    """Write a page in the mode "text": the texts with [SEP] between them."""
    del session
    return " [SEP] ".join(element.text.strip() for element in page)


def as_rich_text(page: Sequence[Element], session: Session) -> str:
    """Write a page in the mode "text_rich": one text a line, with marks around what can be clicked."""
    # The original looks for the quoted value in the page's address. The address holds the search and the
    # chosen options as JSON, so that a value with a quotation mark or an accent is never shown as clicked.
    address = f"{session.query.replace(' ', '+')}/{json.dumps(dict(session.options))}"
    lines, notice = [], ""
    for text, kind, _ in page:
        if kind == "button":
            lines.append(f"[button] {text} [button_]\n")
        elif kind == "link":
            mark = "clicked button" if text in session.seen else "button"
            lines.append(f"\n[{mark}] {text} [{mark}_]\n")
        elif kind == "option" and f'"{text}"' in address:
            lines.append(f"  [clicked button] {text} [clicked button_]\n")
            notice = f"You have clicked {text}.\n{notice}"
        elif kind == "option":
            lines.append(f"  [button] {text} [button_]\n")
        else:
            lines.append(f"{text}\n")
    return notice + "".join(lines)


MODES: Mapping[str, Callable[[Sequence[Element], Session], str]] = {
    "text": as_text,
    "text_rich": as_rich_text,
}


def follow(session: Session, element: Element) -> Session:
    """Return where a click leads; `Buy Now` leads to the last page, whose reward is still to be set.

    Args:
        session: Where the customer stands.
        element: What is clicked.
    """
    target = element.text.lower()
    # The order is the original's: it matters for an option whose value is called like a button.
    if target == BUY:
        return session._replace(page="done")
    if target == BACK:
        return Session(session.goal)
    if target == NEXT and session.page == "results":
        return session._replace(number=session.number + 1)
    if target == PREVIOUS and session.page == "results":
        return session._replace(number=session.number - 1)
    if target == PREVIOUS and session.page == "item":
        return session._replace(page="results", asin="", options=())
    if target == PREVIOUS:
        return session._replace(page="item")
    if target in SUB_PAGES:
        return session._replace(page=SUB_PAGES[target])
    if element.kind == "link":
        seen = tuple(sorted({*session.seen, element.text}))
        return session._replace(page="item", asin=element.text, options=(), seen=seen)
    if element.kind == "option":
        return session._replace(options=tuple({**dict(session.options), element.name: element.text}.items()))
    return session
