"""One way to ask any policy: submit requests, collect generations as they finish."""

import time
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from at2po_agent.policies.base import Policy, Request, StreamingPolicy
from at2po_agent.types import Generation
from at2po_env.errors import PolicyError

_COMPANY = 0.5  # the share of the branches under way that makes a wave worth its time


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
        self._queued_since = self._wave_seconds = 0.0
        self._first_ticket = 0
        self._open: set[int] = set()
        self.seconds = 0.0
        self.tokens = 0

    @property
    def open(self) -> int:
        """Requests handed in and not answered."""
        return len(self._open)

    def submit(self, request: Request) -> int:
        """Hand in a request; its ticket comes back from `collect` with the generation."""
        if self._streaming is not None:
            start = time.perf_counter()
            ticket = self._streaming.submit(request)
            self.seconds += time.perf_counter() - start
        else:
            if not self._queue:
                self._queued_since = time.perf_counter()
            ticket = self._first_ticket + len(self._queue)
            self._queue.append(request)
        self._open.add(ticket)
        return ticket

    def patience(self, elsewhere: int) -> float:
        """Seconds to wait for branches whose tools are at work before `collect` is worth calling.

        A streaming policy with open requests never waits. A wave waits until half of the branches are in it,
        but at most as long as the last wave took: waiting then costs no more than the wave that it saves.

        Args:
            elsewhere: Branches whose environment is being stepped.
        """
        if not self._open:
            return float("inf")
        if self._streaming is not None or self.open >= _COMPANY * (self.open + elsewhere):
            return 0.0
        return max(0.0, self._queued_since + self._wave_seconds - time.perf_counter())

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
                with suppress(PolicyError):  # of a policy that has died; the first error says so
                    self._streaming.cancel(ticket)
        self._queue.clear()
        self._open.clear()

    def _wave(self) -> list[tuple[int, Generation]]:
        requests, first = self._queue, self._first_ticket
        self._queue, self._first_ticket = [], first + len(requests)
        start = time.perf_counter()
        generations: Sequence[Generation] = self._policy.generate(requests) if requests else ()
        self._wave_seconds = time.perf_counter() - start
        if len(generations) != len(requests):
            raise PolicyError(
                f"the policy returned {len(generations)} generations for {len(requests)} requests; "
                "return one for each, in order"
            )
        return list(enumerate(generations, start=first))


def _check(generation: Generation) -> None:
    log_probs = generation.log_probs
    if not len(log_probs):
        return
    low, high = log_probs.min(), log_probs.max()  # nan where there is one
    if not (low > -np.inf and high <= 1e-3):
        raise PolicyError(
            "log-probs of sampled tokens must be finite and at most 0 (nats); "
            f"got a range of {low} to {high}; check the policy's weights for nan"
        )
