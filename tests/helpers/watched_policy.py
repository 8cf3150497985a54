"""A policy of plain Python that honours interventions: what each token's distribution is, is written down."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from at2po_agent.policies.base import NextToken, Request
from at2po_agent.types import Generation
from helpers.guess_env import CharTokenizer


class CountedTokenizer(CharTokenizer):
    """Knows the size of its vocabulary."""

    def __len__(self) -> int:
        return 100


def guess(text: str, request: Request) -> str:
    """A uniform digit from the request's seed, then the stop mark."""
    return "!" if text else str(int(np.random.default_rng(request.seed).integers(10)))


def seeded_entropy(text: str, request: Request) -> float:
    """Between 0 and 2 nats, another one for each token of each request."""
    return float(np.random.default_rng([request.seed, len(text)]).uniform(0, 2))


class WatchedPolicy:
    """Writes what `script(text of the turn so far, request)` says, one character at a time.

    Args:
        script: The next character.
        entropy: Entropy of its distribution in nats; the highest log-probs are made from it.
    """

    def __init__(
        self,
        script: Callable[[str, Request], str] = guess,
        entropy: Callable[[str, Request], float] = seeded_entropy,
    ) -> None:
        self.tokenizer = CountedTokenizer()
        self.requests: list[Request] = []
        self._script, self._entropy = script, entropy

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Generation:
        self.requests.append(request)
        ids: list[int] = []
        sampled: list[bool] = []
        pending: list[int] = []
        log_probs: list[float] = []
        while len(ids) < request.max_tokens:
            text = self.tokenizer.decode(ids)
            if any(text.endswith(mark) for mark in request.stop):
                break
            if not pending and request.intervention is not None:
                pending = list(request.intervention(self._step(ids, text, request)))
            sampled.append(not pending)
            log_probs.append(-self._entropy(text, request))
            ids.append(pending.pop(0) if pending else ord(self._script(text, request)))
        done = any(self.tokenizer.decode(ids).endswith(mark) for mark in request.stop)
        scores = np.array(log_probs, dtype=np.float32)
        return Generation(tuple(ids), scores, "stop" if done else "length", np.array(sampled))

    def _step(self, ids: list[int], text: str, request: Request) -> NextToken:
        entropy = self._entropy(text, request)
        first = -entropy / 2
        rest = math.log((1 - math.exp(first) + 1e-9) / 20)
        return NextToken(tuple(ids), entropy, np.array([first] + [rest] * 9, dtype=np.float32))
