"""Counts the costs of served generations: requests, tokens, money."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from at2po_agent.policies.openai.messages import Usage
from at2po_env.errors import ConfigError


@dataclass(frozen=True)
class Prices:
    """Prices of a million tokens, None where unknown. Cached input costs as other input by default."""

    input: float | None = None
    output: float | None = None
    cached: float | None = None

    def __post_init__(self) -> None:
        for name in ("input", "output", "cached"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ConfigError(f"price of {name} tokens: got {value}, expected at least 0")
        if self.cached is not None and self.input is None:
            raise ConfigError("a price of cached tokens needs the price of the other input tokens")

    def cost(self, usage: Usage) -> float | None:
        """Price of some tokens, in the currency of the prices; None without prices."""
        if self.input is None and self.output is None:
            return None
        cached = min(usage.cached_tokens, usage.prompt_tokens)
        input_price = self.input or 0.0
        cached_price = input_price if self.cached is None else self.cached
        paid = (usage.prompt_tokens - cached) * input_price + cached * cached_price
        return (paid + usage.completion_tokens * (self.output or 0.0)) / 1e6


@dataclass
class ServedStats:
    """Counters of a policy since it was made.

    Attributes:
        requests: Generations that were asked for.
        tries: HTTP requests that were made for them.
        retries: Tries after a failure that may pass.
        failures: Generations that were given up, and so are "abort".
        reasons: Why, by kind.
        last_failure: Message of the last one.
        unanswered: Requests cancelled before their answer.
        left_out: Members of a request that the server refused, and that it is no longer sent.
        shortened: Answers whose limit was lowered to what the context had room for.
        prompt_tokens: Input tokens as the server counted them, cached ones included.
        completion_tokens: Output tokens.
        cached_tokens: Input tokens that the server had cached.
        prices: Prices of a million tokens.
    """

    prices: Prices = field(default_factory=Prices)
    requests: int = 0
    tries: int = 0
    retries: int = 0
    failures: int = 0
    unanswered: int = 0
    shortened: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    left_out: list[str] = field(default_factory=list)
    last_failure: str = ""

    def count_usage(self, usage: Usage) -> None:
        """Add the tokens of one answer."""
        self.prompt_tokens += usage.prompt_tokens
        self.completion_tokens += usage.completion_tokens
        self.cached_tokens += usage.cached_tokens

    def count_failure(self, kind: str, message: str) -> None:
        """Add a generation that was given up."""
        self.failures += 1
        self.reasons[kind] += 1
        self.last_failure = message

    @property
    def cost(self) -> float | None:
        """Price of all tokens; None without prices."""
        return self.prices.cost(Usage(self.prompt_tokens, self.completion_tokens, self.cached_tokens))

    def to_json(self) -> dict[str, Any]:
        """All figures as JSON values."""
        figures = {name: value for name, value in vars(self).items() if name != "prices"}
        return {**figures, "cost": self.cost, "reasons": dict(self.reasons), "left_out": list(self.left_out)}
