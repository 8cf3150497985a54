"""An expert that knows the goal: it searches, opens the product, chooses its options and buys it."""

from __future__ import annotations

from at2po_envs.webshop.env import WebShopEnv
from at2po_envs.webshop.goals import Goal
from at2po_envs.webshop.pages import PER_PAGE
from at2po_envs.webshop.reward import ALIKE, color_or_text, token_set_ratio


def expert_commands(env: WebShopEnv, task_id: str) -> list[str]:
    """Return the commands that buy the product of a goal, from any page.

    The expert searches for the instruction without its clause about the price, then for what the title says,
    and takes the first search that finds the product.

    Args:
        env: The environment.
        task_id: The goal.
    """
    goal = env.goals.goal(task_id)
    asin = goal.product.asin
    row = env.shop.find_row(asin)
    words = goal.text.partition(", and price lower than")[0]
    best, pages = words, 0
    for query in (words, goal.product.title, f"{goal.product.title} {words}"):
        query = " ".join(query.translate(_NO_BRACKETS).split())[:900]
        found = env.searcher.find(query.lower())
        if row in found:
            best, pages = query, found.index(row) // PER_PAGE
            break
    return [
        f"search[{best}]",
        *["click[next >]"] * pages,
        f"click[{asin.lower()}]",
        *(f"click[{value}]" for value in chosen_options(goal)),
        "click[buy now]",
    ]


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
