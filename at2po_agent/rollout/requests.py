"""The requests of a rollout: submitted to any policy, and collected as they finish."""

import time
from contextlib import suppress

import numpy as np

from at2po_agent.policies.base import Policy, Request, StreamingPolicy
from at2po_agent.types import Generation
from at2po_env.errors import PolicyError

_COMPANY = 0.5  # the share of the branches under way that makes a wave worth its time


class PolicyRequests:
    """Hides whether a policy streams; a policy that does not is asked in waves.

    Attributes:
        seconds: Time spent inside the policy.
        tokens: Tokens that it sampled.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._streaming = policy if isinstance(policy, StreamingPolicy) else None
        self._wave: list[Request] = []  # requests that wait for the next call of `generate`
        self._wave_ticket = 0  # the ticket of its first request
        self._wave_since = self._wave_seconds = 0.0  # when it began to fill; how long the last one took
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
            if not self._wave:
                self._wave_since = time.perf_counter()
            ticket = self._wave_ticket + len(self._wave)
            self._wave.append(request)
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
        return max(0.0, self._wave_since + self._wave_seconds - time.perf_counter())

    def collect(self) -> list[tuple[int, Generation]]:
        """Let the policy work and return what finished, perhaps nothing yet.

        Raises:
            PolicyError: The policy's answer does not fit its requests.
        """
        start = time.perf_counter()
        finished = self._ask_wave() if self._streaming is None else self._streaming.poll()
        self.seconds += time.perf_counter() - start
        for ticket, generation in finished:
            if ticket not in self._open:
                raise PolicyError(f"the policy answered ticket {ticket}, which is not open")
            self._open.remove(ticket)
            self.tokens += len(generation.ids)
            if len(generation.log_probs):
                low, high = generation.log_probs.min(), generation.log_probs.max()  # nan where there is one
                if not (low > -np.inf and high <= 1e-3):
                    raise PolicyError(
                        "log-probs of sampled tokens must be finite and at most 0 (nats); "
                        f"got a range of {low} to {high}; check the policy's weights for nan"
                    )
        return finished

    def cancel_all(self) -> None:
        """Give up whatever is still open, so that the policy keeps no request of this rollout."""
        if self._streaming is not None:
            for ticket in sorted(self._open):
                with suppress(PolicyError):  # of a policy that has died; the first error says so
                    self._streaming.cancel(ticket)
        self._wave.clear()
        self._open.clear()

    def _ask_wave(self) -> list[tuple[int, Generation]]:
        requests, first = self._wave, self._wave_ticket
        self._wave, self._wave_ticket = [], first + len(requests)
        start = time.perf_counter()
        generations = self._policy.generate(requests) if requests else []
        self._wave_seconds = time.perf_counter() - start
        if len(generations) != len(requests):
            raise PolicyError(
                f"the policy returned {len(generations)} generations for {len(requests)} requests; "
                "return one for each, in order"
            )
        return list(enumerate(generations, start=first))
