"""Makes tool episodes for any policy, even a random one, over a tool whose latency has a heavy tail.

The episode is `ToolEnv`'s own; only the protocol is one that takes any text. Whether an action calls the tool
or answers, what the tool says and how long it sleeps are digests of the action and of where it was taken: two
rollouts with the same actions wait for the same tools.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

from pydantic import BaseModel

from at2po_agent.agents.model import train_tokenizer
from at2po_agent.transcripts.tokenizer import HFTokenizer
from at2po_env import FinalAnswer, Task, Tool, ToolCall, ToolContext, ToolEnv

MEDIAN_S, TAIL_S, TAIL_SHARE = 0.05, 2.0, 0.02
STOPS = tuple("!?;:%&*@#+=~")  # 12 of 318 tokens
_TEXT = "the a film person city company was directed born founded in by who wrote river country year of"
WORDS = _TEXT.split(" ")


def share(*parts: object) -> float:
    """A number in (0, 1), uniform over texts."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode("utf-8", "replace"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") + 0.5) / 2**64


def latency(*parts: object, scale: float = 1.0) -> float:
    """Seconds: log-normal around the median (quartiles 41 and 61 ms), and 2% of two seconds."""
    if share("tail", *parts) < TAIL_SHARE:
        return TAIL_S * scale
    return MEDIAN_S * math.exp(0.3 * NormalDist().inv_cdf(share("body", *parts))) * scale


class AnyText:
    """A protocol (`ActionProtocol`) in which every text is a call, or now and then the answer."""

    stop = STOPS
    call_tags: Mapping[str, str] = {}

    def parse(self, action: str) -> ToolCall | FinalAnswer:
        """One text in eight answers."""
        if share("answer", action) < 1 / 8:
            return FinalAnswer(action)
        return ToolCall("lookup", {"query": action})

    def format_call(self, call: ToolCall) -> str:
        """The query alone."""
        return str(call.arguments["query"])

    def format_result(self, text: str) -> str:
        """On a line of its own."""
        return f"\n{text}\n"

    def describe(self, tools: Sequence[Any]) -> str:
        """Return a line; the prompts leave it out."""
        return f"{len(tools)} tool"


class Query(BaseModel):
    """Arguments of the tool."""

    query: str


class Lookup(Tool):
    """Answers with words that follow from the query, after a while.

    Args:
        words: Length of an answer.
        scale: Of the latency; 0 answers at once.
    """

    name = "lookup"
    description = "looks something up"
    Arguments = Query

    def __init__(self, words: int, scale: float) -> None:
        self._words, self._scale = words, scale

    def run(self, arguments: Query, context: ToolContext) -> str:
        """Sleep, and answer."""
        place = (context.task.id, context.turn, arguments.query)
        if self._scale:
            time.sleep(latency(*place, scale=self._scale))
        start = int(share("words", *place) * 1000)
        return " ".join(WORDS[(start + 7 * number) % len(WORDS)] for number in range(self._words))


def make_env(questions: int, *, words: int = 20, scale: float = 1.0) -> ToolEnv:
    """Episodes of at most seven turns."""
    prompts = [
        Task(f"q{number}", " ".join(WORDS[(number + 5 * i) % len(WORDS)] for i in range(30)), ("x",), {})
        for number in range(questions)
    ]
    return ToolEnv(
        tasks=prompts,
        tools=[Lookup(words, scale)],
        protocol=AnyText(),
        prompt="Answer.\n{question}\n",
        reward=lambda ending: share("reward", ending.response),
    )


def make_tokenizer() -> HFTokenizer:
    """318 tokens, the quickstart's vocabulary: bytes, and the words of the world."""
    return train_tokenizer([" ".join(WORDS)] * 4, vocab_size=318)
