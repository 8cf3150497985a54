"""WebShop as a world of commands: `search[...]` and `click[...]`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from at2po_env import CommandEnv, CommandResult, Task
from at2po_env.episodes.command_env import FORMAT
from at2po_env.errors import ConfigError, DataError, EnvError
from at2po_envs.webshop.expert import plan
from at2po_envs.webshop.goals import Goals
from at2po_envs.webshop.pages import MODES, PAGES, PER_PAGE, Element, Session, clickables, elements, follow
from at2po_envs.webshop.products import Product
from at2po_envs.webshop.reward import find_nouns, score_purchase
from at2po_envs.webshop.shop import Searcher, Shop

INSTRUCTIONS = (
    "You shop in a web store for a customer. Find a product that is what the customer asks for, in every "
    "respect: its kind, its attributes, its options and its price. Choose the options on its page before you "
    "buy it; a purchase ends the task.\nThe commands are search[words], which finds products, and "
    "click[name], which follows a button, opens a product or chooses an option.\n"
    + FORMAT
    + "\nTask: {question}\n"
)
_COMMAND = re.compile(r"(.+)\[(.+)\]")


class WebShopEnv(CommandEnv):
    """One purchase in a shop of text pages.

    Args:
        shop: The products.
        goals: The tasks.
        searcher: Searches the products.
        observation_mode: "text" or "text_rich".
        nouns: How the type reward finds the nouns of titles: "auto", "spacy" or "rule"; see
            `reward.find_nouns`.
        max_turns: Turns of an episode.
        instructions: A template with `{question}`.
        show_commands: Whether observations list the commands that are possible.
        render_mode: "ansi" makes `render` return the transcript.
    """

    def __init__(
        self,
        *,
        shop: Shop,
        goals: Goals,
        searcher: Searcher,
        observation_mode: str = "text",
        nouns: str = "auto",
        max_turns: int = 15,
        instructions: str = INSTRUCTIONS,
        show_commands: bool = True,
        render_mode: str | None = None,
    ) -> None:
        super().__init__(
            tasks=goals,
            instructions=instructions,
            max_turns=max_turns,
            show_commands=show_commands,
            render_mode=render_mode,
        )
        if observation_mode not in MODES:
            raise ConfigError(f"observation_mode={observation_mode!r}: expected one of {', '.join(MODES)}")
        self.shop, self.goals, self.searcher = shop, goals, searcher
        self.nouns, self._nouns = find_nouns(nouns)
        self._write = MODES[observation_mode]
        self._page = lru_cache(maxsize=128)(self._make_page)

    def begin(self, task: Task) -> tuple[Session, str]:
        """Show the search page."""
        session = Session(task.id)
        return session, self._page(session)[0]

    def obey(self, state: Session, command: str) -> CommandResult:
        """Search or click; anything else, and a click on what is not there, changes nothing."""
        found = _COMMAND.match(command)
        name, target = (found[1], found[2].lower()) if found else ("", "")
        text, names = self._page(state)
        if name == "search":
            state = state._replace(page="results", query=target, number=1, asin="", options=())
        elif name == "click" and target in names and target != "search":
            state = follow(state, names[target])
        else:
            return CommandResult(state, text, valid=False)
        if state.page == "done":
            return self._buy(state)
        return CommandResult(state, self._page(state)[0])

    def _buy(self, session: Session) -> CommandResult:
        """End the episode with the reward of the purchase."""
        product = self.shop.find(session.asin)
        assert product is not None, "what is looked at is a product of the shop"
        goal = self.goals.goal(session.goal)
        score = score_purchase(product, dict(session.options), goal, self._nouns)
        session = session._replace(reward=score.reward)
        parts = score._asdict()
        numbers = {
            name: float(value) for name, value in parts.items() if value is not None and name != "reward"
        }
        metrics = {"success": float(score.reward == 1.0), "score": score.reward, **numbers}
        info = {"asin": session.asin, "options": dict(session.options), "nouns": self.nouns}
        return CommandResult(session, self._page(session)[0], score.reward, True, metrics=metrics, info=info)

    def commands(self, state: Session) -> Sequence[str]:
        """Return what can be clicked; on the search page, the search."""
        if state.page == "search":
            return ("search[...]",)
        return [f"click[{name}]" for name in self._page(state)[1]]

    def expert_commands(self) -> list[str]:
        """Return the expert's commands from here to the purchase; see `expert.plan`."""
        state = self.get_state()
        if state is None:
            raise EnvError("no episode is running. Fix: call reset first")
        return plan(state.world, self.goals.goal(state.world.goal), self.shop, self.searcher)

    def page(self, session: Session) -> list[Element]:
        """Return the texts of a page with what each one is."""
        product = None if session.page in ("search", "results", "done") else self.shop.find(session.asin)
        rows: tuple[int, ...] = ()
        if session.page == "results":
            rows = self.searcher.find(session.query)
        start = (session.number - 1) * PER_PAGE
        found: list[Product] = [self.shop.product(row) for row in rows[start : start + PER_PAGE]]
        return elements(session, self.goals.goal(session.goal).text, found, len(rows), product)

    def _make_page(self, session: Session) -> tuple[str, dict[str, Element]]:
        page = self.page(session)
        return self._write(page, session), clickables(page)

    def dump_world(self, state: Session) -> Any:
        """Return the session as a list."""
        return [*state[:5], [list(option) for option in state.options], list(state.seen), state.reward]

    def load_world(self, data: Any) -> Session:
        """Read a session; goal, products and page must be of this shop."""
        goal, page, query, number, asin, options, seen, reward = data
        if type(goal) is not str:
            raise TypeError(f"the id of a goal is a text, got {goal!r:.80}")
        try:
            self.goals.goal(goal)
        except DataError as error:
            raise ValueError(str(error)) from error
        texts = [query, asin, *seen, *(part for option in options for part in option)]
        if page not in PAGES or not all(type(text) is str for text in texts):
            raise ValueError(f"no session: {data!r:.200}")
        if type(number) is not int or number < 0 or type(reward) not in (int, float):
            raise ValueError(f"no session: {data!r:.200}")
        if page not in ("search", "results") and self.shop.find(asin) is None:
            raise ValueError(f"there is no product {asin!r:.20}")
        pairs = tuple((name, value) for name, value in options)
        return Session(goal, page, query, number, asin, pairs, tuple(seen), float(reward))

    def example_actions(self) -> Sequence[str]:
        """Return a search, a slip of the tongue, and a purchase."""
        return [f"<action>{command}</action>" for command in self.example_commands()]

    def example_commands(self) -> list[str]:
        """Return the commands behind `example_actions`, for the first task."""
        goal = self.goals.goal(self.goals[0].id)
        asin = goal.product.asin.lower()
        return [
            f"search[{goal.product.title[:200]}]",
            "click[no such thing]",
            f"click[{asin}]",
            "click[buy now]",
        ]
