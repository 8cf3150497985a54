"""Turns what an environment shows into token ids: the protocol, and episodes as one running text.

A transcript makes the pieces between the policy's actions. Only these are ever tokenised: sampled ids are
taken as they are, so that what the trainer scores is what the sampler saw (invariant 1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from at2po_agent.transcripts.tokenizer import HasControlTokens, OutsideText, Tokenizer


class TurnInput(NamedTuple):
    """The ids that a turn puts before its action.

    Attributes:
        ids: The ids.
        fresh: Whether they are all that the policy sees, or follow what it saw before.
        memory: What the transcript wants to know when it writes the next turn's.
    """

    ids: tuple[int, ...]
    fresh: bool = False
    memory: Any = None


@runtime_checkable
class Transcript(Protocol):
    """Turns texts of the environment into token ids, turn by turn, in the order of an episode."""

    def first(self, prompt: str, info: Mapping[str, Any]) -> TurnInput:
        """Ids before the first action.

        Args:
            prompt: The first observation.
            info: The environment's info with it.
        """
        ...

    def next(
        self, before: TurnInput, action: str, observation: str, info: Mapping[str, Any], *, closed: bool
    ) -> TurnInput:
        """Ids before the next action.

        Args:
            before: What this method or `first` returned for the turn before.
            action: What the policy wrote in that turn.
            observation: What the environment newly showed.
            info: The environment's info with it.
            closed: Whether the action ended with the end-of-sequence id itself.
        """
        ...


class GrowingTranscript(ABC):
    """A transcript that writes an episode as one growing sequence: a prompt, and pieces between actions."""

    @abstractmethod
    def open(self, prompt: str) -> list[int]:
        """Ids before the first action."""

    @abstractmethod
    def observe(self, observation: str, *, closed: bool) -> list[int]:
        """Ids between two actions; `closed`: the first ended with the end-of-sequence id itself."""

    def first(self, prompt: str, info: Mapping[str, Any]) -> TurnInput:
        """Ids before the first action."""
        del info
        return TurnInput(tuple(self.open(prompt)), fresh=True)

    def next(
        self, before: TurnInput, action: str, observation: str, info: Mapping[str, Any], *, closed: bool
    ) -> TurnInput:
        """Ids between two actions."""
        del before, action, info
        return TurnInput(tuple(self.observe(observation, closed=closed)))


class InlineTranscript(GrowingTranscript):
    """Writes prompt, actions and observations as one running text, as AT2PO and Search-R1 do.

    Control tokens in a prompt or an observation are text from outside; they are broken up (`OutsideText`).

    Args:
        tokenizer: Encodes each piece by itself.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._as_text = OutsideText(
            tokenizer.control_tokens if isinstance(tokenizer, HasControlTokens) else ()
        )

    def open(self, prompt: str) -> list[int]:
        """Ids of the prompt."""
        return self._tokenizer.encode(self._as_text(prompt))

    def observe(self, observation: str, *, closed: bool) -> list[int]:
        """Ids of the observation, whatever the action ended with."""
        del closed
        return self._tokenizer.encode(self._as_text(observation))
