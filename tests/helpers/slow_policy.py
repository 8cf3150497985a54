"""A policy that finishes its requests one by one, in a drawn order; tasks for it, and trees as text."""

from collections.abc import Sequence

import numpy as np

from at2po_agent.policies.base import Request
from at2po_agent.tree import Tree
from at2po_agent.types import Generation
from helpers.guess_env import GuessingPolicy


class SlowPolicy(GuessingPolicy):
    """Streams: finishes one request per poll, in an order drawn from `order`."""

    def __init__(self, order: int) -> None:
        super().__init__()
        self._rng = np.random.default_rng(order)
        self._open: dict[int, Request] = {}
        self.log: list[tuple[str, int]] = []

    def submit(self, request: Request) -> int:
        ticket = len(self.log)
        self.log.append(("submit", ticket))
        self._open[ticket] = request
        return ticket

    def pick(self) -> int:
        return int(self._rng.choice(list(self._open)))

    def poll(self) -> list[tuple[int, Generation]]:
        ticket = self.pick()
        return [(ticket, self.answer(self._open.pop(ticket)))]

    def cancel(self, ticket: int) -> None:
        self._open.pop(ticket, None)


def dumps(trees: Sequence[Tree]) -> list[str]:
    return [tree.to_json() for tree in trees]


def tasks(count: int) -> list[dict[str, int]]:
    return [{"index": index} for index in range(count)]
