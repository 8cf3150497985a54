"""A policy that says what it is told to: for tests, baselines and custom agents written as functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import numpy as np

from at2po_agent.policies.base import Request
from at2po_agent.transcripts.inline import InlineTranscript, Transcript
from at2po_agent.transcripts.tokenizer import Tokenizer
from at2po_agent.types import Generation, StopReason
from at2po_env.errors import PolicyError

Script: TypeAlias = Callable[[str], str]
LogProbs: TypeAlias = float | Callable[[Sequence[int]], Sequence[float]]


class ScriptedPolicy:
    """Answers with the text of a function, or with the next text of a list.

    Args:
        script: From the text seen so far to the text of one turn, or the turns themselves, in order.
        tokenizer: Tokenises the turn.
        log_probs: Log-prob of every token (nats), or a function from a turn's ids to theirs.
        end: Whether a turn that completes no stop string ends with the end-of-sequence id.
        transcript: Turns what the environment shows into ids in rollouts; None encodes it as it is.

    Raises:
        PolicyError: A list ran out of turns, or log-probs do not fit.
    """

    def __init__(
        self,
        script: Script | Iterable[str],
        tokenizer: Tokenizer,
        *,
        log_probs: LogProbs = -1.0,
        end: bool = False,
        transcript: Transcript | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.transcript = transcript or InlineTranscript(tokenizer)
        self._script = script if callable(script) else _from_list(tuple(script))
        self._log_probs = log_probs
        self._end = end

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """Answer each request, in order."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Generation:
        text = self._script(self.tokenizer.decode(request.prefix_ids))
        ids, reason = _cut(self.tokenizer, text, request.stop)
        if reason != "stop" and self._end:
            ids, reason = [*ids, self.tokenizer.eos_id], "eos"
        if len(ids) > request.max_tokens:
            ids, reason = ids[: request.max_tokens], "length"
        given = self._log_probs
        log_probs = np.asarray(given(ids) if callable(given) else [given] * len(ids), dtype=np.float32)
        if log_probs.shape != (len(ids),):
            raise PolicyError(f"log_probs returned shape {log_probs.shape} for {len(ids)} ids")
        return Generation(tuple(ids), log_probs, reason)


def _from_list(turns: tuple[str, ...]) -> Script:
    rest = iter(turns)

    def say(seen: str) -> str:
        for text in rest:
            return text
        raise PolicyError(
            f"the script has {len(turns)} turns and was asked for one more, after {seen[-80:]!r}"
        )

    return say


def _cut(tokenizer: Tokenizer, text: str, stop: tuple[str, ...]) -> tuple[list[int], StopReason]:
    """Ids up to the token that completes a stop string, as a sampler would have stopped."""
    ids = tokenizer.encode(text)
    if any(mark in text for mark in stop):
        for end in range(1, len(ids) + 1):
            written = tokenizer.decode(ids[:end])
            if any(mark in written for mark in stop):
                return ids[:end], "stop"
    return ids, "eos"
