"""Defines policies: token ids in; sampled ids, their log-probs and the stop reason out.

A custom agent implements `Policy` and goes into the tree trainer unchanged. Two classes declare what a
policy may do besides. `StreamingPolicy`: requests come and go while it decodes. `TrainablePolicy`: it samples
with weights that a learner changes, or holds resources. `SteppingPolicy` is a base class for both.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from at2po_agent.transcripts.inline import InlineTranscript, Transcript
from at2po_agent.transcripts.tokenizer import Tokenizer
from at2po_agent.types import Float32Array, Generation
from at2po_env.errors import PolicyError


@dataclass(frozen=True)
class NextToken:
    """Shows an intervention the distribution of the token that is about to be chosen.

    Attributes:
        ids: The ids generated so far, forced ones included.
        entropy: Shannon entropy in nats of the distribution the next token is about to be drawn from, at the
            request's temperature and before top-p.
        top_log_probs: float32[`Intervention.top_log_probs`], the largest log-probs of that distribution,
            sorted.
    """

    ids: Sequence[int]
    entropy: float
    top_log_probs: Float32Array


@runtime_checkable
class Intervention(Protocol):
    """A rule inside sampling that may force tokens; it belongs to one request and may keep state.

    Forced ids are reported in `Generation.sampled` as False and are never trained. A forced id that completes
    a stop string or ends the sequence stops the generation as a sampled one does.
    """

    @property
    def top_log_probs(self) -> int:
        """Number of the largest log-probs that `NextToken` must carry; 0 for none."""
        ...

    def __call__(self, coming: NextToken, /) -> Sequence[int]:
        """Ids to force from this position on; empty lets the token be sampled."""
        ...


@dataclass(frozen=True)
class Request:
    """One generation to make.

    Attributes:
        prefix_ids: What the policy sees; at least one id.
        max_tokens: Most tokens to generate.
        temperature: Divides the logits; 0 is greedy.
        top_p: Smallest mass of the most likely tokens that is kept.
        stop: Generation ends with the token that completes one of these strings (in the generated text).
        seed: Decides the draws: token t uses uniform t of Philox(seed), whatever else is in the batch.
        intervention: Rule that may force tokens.

    Raises:
        PolicyError: A field is out of range.
    """

    prefix_ids: tuple[int, ...]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    intervention: Intervention | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefix_ids", tuple(self.prefix_ids))
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise PolicyError(f"stop must be a tuple of non-empty strings, got {self.stop!r}")
        object.__setattr__(self, "stop", tuple(self.stop))
        if not self.prefix_ids:
            raise PolicyError(
                "prefix_ids is empty: a policy needs at least one id to continue; send the prompt"
            )
        if self.max_tokens < 0:
            raise PolicyError(f"max_tokens must be at least 0, got {self.max_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise PolicyError(f"temperature must be finite and at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise PolicyError(f"top_p must lie in (0, 1], got {self.top_p}")
        if not 0 <= self.seed < 2**128:
            raise PolicyError(f"seed must lie in [0, 2^128), got {self.seed}")


def check_fits(request: Request, vocab_size: int, limits: Sequence[tuple[int, str]]) -> None:
    """Make sure that a model can answer a request.

    Args:
        request: The request.
        vocab_size: The model knows the ids below it.
        limits: (most tokens of prefix and answer together, words for this limit).

    Raises:
        PolicyError: It cannot.
    """
    length = len(request.prefix_ids) + request.max_tokens
    what = f"a request of {len(request.prefix_ids)} prefix ids and max_tokens {request.max_tokens}"
    for most, limit in limits:
        if length > most:
            raise PolicyError(f"{what} exceeds {limit}")
    largest, smallest = max(request.prefix_ids), min(request.prefix_ids)
    if smallest < 0 or largest >= vocab_size:
        wrong = smallest if smallest < 0 else largest
        raise PolicyError(f"{what} holds id {wrong}; the model's ids lie in 0..{vocab_size - 1}")


@dataclass
class PolicyStats:
    """Counts what a policy computed since it was made.

    Attributes:
        prefill_tokens: Prefix tokens that went through the model.
        cached_tokens: Prefix tokens whose KV were found or shared instead.
        decoded_tokens: Tokens generated.
        steps: Forward passes.
    """

    prefill_tokens: int = 0
    cached_tokens: int = 0
    decoded_tokens: int = 0
    steps: int = 0


@runtime_checkable
class Policy(Protocol):
    """Anything that can write a turn."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer whose ids the policy speaks."""
        ...

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """Answer each request, in order."""
        ...


@runtime_checkable
class TranscribingPolicy(Policy, Protocol):
    """A policy that says how its episodes become token ids, for example as the messages of a chat."""

    @property
    def transcript(self) -> Transcript:
        """Makes the ids of everything that the environment shows."""
        ...


def transcript_of(policy: Policy) -> Transcript:
    """The transcript that a policy carries; one that carries none reads episodes as one running text."""
    return policy.transcript if isinstance(policy, TranscribingPolicy) else InlineTranscript(policy.tokenizer)


@runtime_checkable
class StreamingPolicy(Policy, Protocol):
    """A policy whose requests come and go while it decodes."""

    def submit(self, request: Request) -> int:
        """Hand in a request; returns its ticket."""
        ...

    def poll(self) -> list[tuple[int, Generation]]:
        """Advance decoding and return what finished since the last call, as (ticket, generation).

        Comes back soon, perhaps with nothing: between two calls a rollout takes in what tools have answered.
        A policy that decodes elsewhere sleeps here for some milliseconds, lest its caller spin.
        """
        ...

    def cancel(self, ticket: int) -> None:
        """Forget a request, finished or not; `poll` will not report it."""
        ...


class TrainablePolicy:
    """Declares what a learner calls of the policy that samples with its weights.

    A policy subclasses it beside implementing `Policy`, and overrides what applies: the defaults do nothing.
    """

    @property
    def version(self) -> int:
        """Counts updates of the weights; 0 where the policy does not count them."""
        return 0

    def weights_changed(self) -> None:
        """Take over the learner's new weights; called after every update."""

    def count_from(self, version: int) -> None:
        """Set the version of the present weights, for a resumed run; the next update counts on."""

    def rest(self) -> None:
        """Give back memory of a device that the learner shares, until the next request."""

    def close(self) -> None:
        """End whatever the policy has started."""


def as_trainable(policy: Policy) -> TrainablePolicy:
    """Return what a learner calls of any policy: the policy itself, or defaults where it only generates.

    Raises:
        PolicyError: The policy has a method of `TrainablePolicy` without being one: it would not be called.
    """
    if isinstance(policy, TrainablePolicy):
        return policy
    undeclared = [name for name in ("version", "weights_changed", "rest", "close") if hasattr(policy, name)]
    if undeclared:
        raise PolicyError(
            f"{type(policy).__name__} has {', '.join(undeclared)}, but only a subclass of "
            "at2po_agent.policies.base.TrainablePolicy is called. Fix: subclass it; its methods do nothing"
        )
    return TrainablePolicy()


class SteppingPolicy(TrainablePolicy, ABC):
    """Gives a streaming policy `submit`, `generate` and `poll`.

    A subclass decodes in `_advance`, and keeps what has finished in `_finished`, by ticket.
    """

    def __init__(self) -> None:
        self._finished: dict[int, Generation] = {}
        self._tickets = itertools.count()

    @abstractmethod
    def _check(self, request: Request) -> None:
        """Refuse a request that cannot be answered."""

    @abstractmethod
    def _begin(self, ticket: int, request: Request) -> None:
        """Take a request that asks for at least one token."""

    @abstractmethod
    def _advance(self) -> None:
        """Decode for a moment."""

    @abstractmethod
    def cancel(self, ticket: int) -> None:
        """Forget a request, finished or not; `poll` will not report it."""

    def submit(self, request: Request) -> int:
        """Hand in a request; returns its ticket.

        Raises:
            PolicyError: The request does not fit the model, or what decodes has died.
        """
        self._check(request)
        ticket = next(self._tickets)
        if request.max_tokens == 0:
            nothing = np.zeros(0, dtype=np.float32)
            self._finished[ticket] = Generation((), nothing, "length", None, self.version)
        else:
            self._begin(ticket, request)
        return ticket

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """Answer each request, in order; requests under way from `submit` advance too.

        Raises:
            PolicyError: A request does not fit the model, or what decodes has died.
        """
        tickets: list[int] = []
        try:
            for request in requests:
                tickets.append(self.submit(request))
            while any(ticket not in self._finished for ticket in tickets):
                self._advance()
            return [self._finished[ticket] for ticket in tickets]
        finally:
            for ticket in tickets:
                self.cancel(ticket)

    def poll(self) -> list[tuple[int, Generation]]:
        """Decode for a moment; returns what has finished since the last call, by ticket."""
        if not self._finished:
            self._advance()
        finished = sorted(self._finished.items())
        self._finished.clear()
        return finished
