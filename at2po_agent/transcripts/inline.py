"""Turns what an environment shows into token ids: the protocol, and episodes as one running text.

A transcript makes the pieces between the policy's actions. Only these are ever tokenised: sampled ids are
taken as they are, so that what the trainer scores is what the sampler saw (invariant 1).
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from at2po_agent.transcripts.tokenizer import HasControlTokens, OutsideText, Tokenizer


@runtime_checkable
class Transcript(Protocol):
    """Turns texts of the environment into token ids, piece by piece, in the order of an episode."""

    def open(self, prompt: str) -> list[int]:
        """Ids before the first action."""
        ...

    def observe(self, observation: str, *, closed: bool) -> list[int]:
        """Ids between two actions.

        Args:
            observation: What the environment newly showed.
            closed: Whether the action before it ended with the end-of-sequence id itself.
        """
        ...


class InlineTranscript:
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
