"""Interventions in a module of their own: they travel to the engine's process."""

from collections.abc import Sequence

from at2po_agent.policies.base import NextToken


class Hurry:
    """Forces ids after so many tokens, and notes what it saw."""

    top_log_probs = 3

    def __init__(self, limit: int, forced: Sequence[int]) -> None:
        self.limit, self.forced = limit, list(forced)
        self.seen: list[tuple[int, float, float]] = []

    def __call__(self, step: NextToken) -> Sequence[int]:
        self.seen.append((len(step.ids), step.entropy, float(step.top_log_probs[0])))
        return self.forced if len(step.ids) == self.limit else ()


class Broken:
    """Raises at the third token."""

    top_log_probs = 0

    def __call__(self, step: NextToken) -> Sequence[int]:
        if len(step.ids) == 2:
            raise RuntimeError("this rule is broken")
        return ()


class OutOfRange:
    """Forces an id that does not exist."""

    top_log_probs = 0

    def __call__(self, step: NextToken) -> Sequence[int]:
        return [10_000 + len(step.ids)]
