"""One way to ask any policy: submit requests, collect generations as they finish."""

import time
from collections.abc import Sequence

import numpy as np

from at2po_agent.policies.base import Policy, Request, StreamingPolicy
from at2po_agent.types import Generation
from at2po_env.errors import PolicyError


class Sampler:
    """Hides whether a policy streams; a policy that does not is asked in waves.

    Attributes:
        seconds: Time spent inside the policy.
        tokens: Tokens that it sampled.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._streaming = policy if isinstance(policy, StreamingPolicy) else None
        self._queue: list[Request] = []
        self._first_ticket = 0
        self._open: set[int] = set()
        self.seconds = 0.0
        self.tokens = 0

    def submit(self, request: Request) -> int:
        """Hand in a request; its ticket comes back from `collect` with the generation."""
        if self._streaming is not None:
            ticket = self._streaming.submit(request)
        else:
            ticket = self._first_ticket + len(self._queue)
            self._queue.append(request)
        self._open.add(ticket)
        return ticket

    def collect(self) -> list[tuple[int, Generation]]:
        """Let the policy work and return what finished, perhaps nothing yet.

        Raises:
            PolicyError: The policy answered something else than it was asked.
        """
        start = time.perf_counter()
        finished = self._wave() if self._streaming is None else self._streaming.poll()
        self.seconds += time.perf_counter() - start
        for ticket, generation in finished:
            if ticket not in self._open:
                raise PolicyError(f"the policy answered ticket {ticket}, which is not open")
            self._open.remove(ticket)
            _check(generation)
            self.tokens += len(generation.ids)
        return finished

    def cancel_all(self) -> None:
        """Give up whatever is still open, so that the policy keeps no request of this rollout."""
        if self._streaming is not None:
            for ticket in sorted(self._open):
                self._streaming.cancel(ticket)
        self._queue.clear()
        self._open.clear()

    def _wave(self) -> list[tuple[int, Generation]]:
        requests, first = self._queue, self._first_ticket
        self._queue, self._first_ticket = [], first + len(requests)
        generations: Sequence[Generation] = self._policy.generate(requests) if requests else ()
        if len(generations) != len(requests):
            raise PolicyError(
                f"the policy returned {len(generations)} generations for {len(requests)} requests; "
                "return one for each, in order"
            )
        return list(enumerate(generations, start=first))


def _check(generation: Generation) -> None:
    log_probs = np.asarray(generation.log_probs)
    if not np.all(np.isfinite(log_probs)) or np.any(log_probs > 1e-3):
        raise PolicyError(
            "log-probs of sampled tokens must be finite and at most 0 (nats); "
            f"got a range of {log_probs.min()} to {log_probs.max()}; check the policy's weights for nan"
        )
