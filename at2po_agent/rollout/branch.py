"""One branch under way: an environment, the ids so far, and the turns that are not in the tree yet.

A turn has two halves: `write` takes what the policy wrote, `arrive` what the environment answered. Between
them the environment belongs to whoever steps it.
"""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from at2po_agent.credit.groups import overlong_penalty
from at2po_agent.rollout.config import RolloutConfig
from at2po_agent.rollout.steps import Env, Stepped
from at2po_agent.transcripts.tokenizer import Tokenizer
from at2po_agent.transcripts.transcripts import Transcript
from at2po_agent.types import Generation, Turn
from at2po_env import Snapshot


class Place(NamedTuple):
    """Where branches can go on: a state of the environment and what it showed last.

    Attributes:
        state: The environment after the node's action.
        observation: What it newly showed then; empty at the root, whose prompt belongs to the tree.
        observation_ids: Its tokens, made once and shared by all branches.
        reward: Sum of the rewards up to here.
        tool_calls: Turns up to here that reached a tool.
        tool_errors: Those whose tool failed.
        uncertainty: Phi of the turn that led here; None at the root, or where nobody measures.
    """

    state: Snapshot
    observation: str
    observation_ids: tuple[int, ...]
    reward: float = 0.0
    tool_calls: int = 0
    tool_errors: int = 0
    uncertainty: float | None = None


class PendingTurn(NamedTuple):
    """A turn that waits for its branch: what the policy saw, the turn, where it led (None: it ended)."""

    prefix_ids: tuple[int, ...]
    turn: Turn
    place: Place | None
    first_entropy: float


@dataclass(eq=False)
class Branch:
    """One branch from the node it was forked at to its end.

    Attributes:
        question: Index of the question.
        number: Index of the branch within the question; with the turn it decides every seed.
        node: The tree node below which the branch hangs.
        depth: Turns on the path to that node.
        env: An environment in the state of `place`.
        place: Where the next turn starts.
        prefix: Ids of the prompt and of all turns so far, without the open observation.
        prompt_length: How many of them are the prompt.
        turns: What is to be added to the tree when the round ends.
        outcome: How the branch ended; None while it runs.
        reward: Its terminal reward.
        env_failed: Whether the environment raised or hangs, and so must not be used again.
        chain: The chain of the first round that it belongs to.
        attempt: How many attempts at the next turn were discarded.
        discarded: What they were, over all turns of the branch.
        uncertainty: Phi of the action that was written last, where it is measured.
        closed: Whether that action ended with the end-of-sequence id itself.
    """

    question: int
    number: int
    node: int
    depth: int
    env: Env
    place: Place
    prefix: tuple[int, ...]
    prompt_length: int
    turns: list[PendingTurn] = field(default_factory=list)
    outcome: dict[str, Any] | None = None
    reward: float = 0.0
    env_failed: bool = False
    chain: int = 0
    attempt: int = 0
    discarded: list[dict[str, Any]] = field(default_factory=list)
    uncertainty: float | None = None
    closed: bool = False

    @property
    def turn_number(self) -> int:
        """How many turns precede the next one on this path."""
        return self.depth + len(self.turns)

    @property
    def request_ids(self) -> tuple[int, ...]:
        """What the policy sees before its next action."""
        return self.prefix + self.place.observation_ids

    def room(self, config: RolloutConfig) -> int:
        """Tokens that the next action may have, at most 0 when the response is full."""
        used = len(self.prefix) + len(self.place.observation_ids) - self.prompt_length
        return min(config.max_turn_tokens, config.max_response_tokens - used)

    def discard(self, generation: Generation, tokenizer: Tokenizer, *, uncertainty: float) -> None:
        """Note an attempt at the next turn that is sampled again; nothing else changes."""
        self.attempt += 1
        text = decode_action(generation, tokenizer)
        entry = {"turn": self.turn_number, "action": text, "tokens": len(generation.ids)}
        self.discarded.append({**entry, "uncertainty": uncertainty})

    def write(
        self,
        generation: Generation,
        tokenizer: Tokenizer,
        config: RolloutConfig,
        *,
        first_entropy: float = 0.0,
        uncertainty: float | None = None,
    ) -> str | None:
        """Take what the policy wrote; returns the action for the environment, None where the branch ended.

        Args:
            generation: What the policy wrote.
            tokenizer: Its tokenizer.
            config: The limits.
            first_entropy: Entropy over its first tokens in nats, where it is measured.
            uncertainty: Its Phi, where it is measured.
        """
        self.attempt, self.uncertainty, self.closed = 0, uncertainty, ends_closed(generation, tokenizer)
        request_ids = self.request_ids
        turn = Turn.from_generation(
            generation,
            observation_ids=self.place.observation_ids,
            observation=self.place.observation,
            action=decode_action(generation, tokenizer),
        )
        self.prefix = request_ids + generation.ids
        self.turns.append(PendingTurn(request_ids, turn, None, first_entropy))
        if generation.stop_reason != "abort":
            return turn.action
        self._end(config, config.error_reward, "abort", "the policy gave up", truncated=True)
        return None

    def arrive(self, stepped: Stepped, transcript: Transcript, config: RolloutConfig) -> None:
        """Take what the environment answered: stand at the next turn, or end.

        Args:
            stepped: The answer.
            transcript: Makes the observation's ids.
            config: The limits.
        """
        place = self._next_place(stepped, transcript, config)
        if place is None:
            return
        self.place = place
        self.turns[-1] = self.turns[-1]._replace(place=place)
        if self.room(config) < 1:
            reason = f"no room for another action in {config.max_response_tokens} response tokens"
            self._end(config, config.cut_reward, "length", reason, truncated=True)

    def _next_place(self, stepped: Stepped, transcript: Transcript, config: RolloutConfig) -> Place | None:
        """Where the next turn starts; None where there is none."""
        if stepped.fault:
            self.env_failed = True
            kind = "env_timeout" if stepped.late else "env_error"
            self._end(config, config.error_reward, kind, stepped.fault, truncated=True)
            return None
        kind, place = stepped.info.get("outcome", ""), self.place
        total = place.reward + stepped.reward
        if not math.isfinite(total):
            fault = f"the reward is {stepped.reward}"
            self._end(config, config.error_reward, "env_error", fault, truncated=True)
            return None
        calls = place.tool_calls + (kind in ("tool", "tool_error"))
        errors = place.tool_errors + (kind == "tool_error")
        if stepped.state is None:
            self.place = place._replace(reward=total, tool_calls=calls, tool_errors=errors)
            self._end_by_environment(stepped, config)
            return None
        ids = tuple(transcript.observe(stepped.observation, closed=self.closed))
        return Place(stepped.state, stepped.observation, ids, total, calls, errors, self.uncertainty)

    def _end_by_environment(self, stepped: Stepped, config: RolloutConfig) -> None:
        info, terminated, truncated = stepped.info, stepped.terminated, stepped.truncated
        kind = str(info.get("outcome") or "terminated")
        if truncated and not terminated and kind in ("tool", "tool_error", "terminated"):
            kind = "limit"  # a wrapper's, over a turn that would have gone on
        reason, reward = str(info.get("reason", "")), self.place.reward
        self._end(config, reward, kind, reason, terminated=terminated, truncated=truncated)
        assert self.outcome is not None
        self.outcome.update({key: info[key] for key in ("em", "f1", "answer") if key in info})

    def _end(
        self,
        config: RolloutConfig,
        reward: float,
        kind: str,
        reason: str,
        *,
        terminated: bool = False,
        truncated: bool = False,
    ) -> None:
        self.reward = reward
        if config.overlong_share:
            self.reward += self._overlong_penalty(config)
        self.outcome = {
            "outcome": kind,
            "reason": reason,
            "terminated": terminated,
            "truncated": truncated,
            "tool_calls": self.place.tool_calls,
            "tool_errors": self.place.tool_errors,
        }
        if self.discarded:
            self.outcome["discarded"] = self.discarded

    def _overlong_penalty(self, config: RolloutConfig) -> float:
        length, limit = len(self.prefix) - self.prompt_length, config.max_response_tokens
        buffer = max(1, round(config.overlong_share * limit))
        return float(overlong_penalty(length, max_length=limit, buffer=buffer, factor=config.overlong_factor))


def decode_action(generation: Generation, tokenizer: Tokenizer) -> str:
    """The action's text: what was sampled, verbatim, without an end-of-sequence token at its end."""
    ids = generation.ids
    return tokenizer.decode(ids[:-1] if ends_closed(generation, tokenizer) else ids)


def ends_closed(generation: Generation, tokenizer: Tokenizer) -> bool:
    """Whether an action ends with the end-of-sequence id itself."""
    ids = generation.ids
    return generation.stop_reason == "eos" and bool(ids) and ids[-1] == tokenizer.eos_id
