"""One branch under way: an environment, the ids so far, and the turns that are not in the tree yet.

The errors that live here: whatever an environment raises from `step` becomes a recorded outcome of its branch
(a bad rollout is data). Everything else that goes wrong is a bug, and stays an exception.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import gymnasium

from at2po_agent.group_credit import overlong_penalty
from at2po_agent.policies.base import Tokenizer
from at2po_agent.rollout.settings import RolloutConfig
from at2po_agent.types import Generation, Turn
from at2po_env import Snapshot, snapshot

Env = gymnasium.Env[str, str]


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
        env_failed: Whether the environment raised, and so must not be used again.
        chain: The chain of the first round that it belongs to.
        attempt: How many attempts at the next turn were discarded.
        discarded: What they were, over all turns of the branch.
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

    def receive(
        self,
        generation: Generation,
        tokenizer: Tokenizer,
        config: RolloutConfig,
        *,
        first_entropy: float = 0.0,
        uncertainty: float | None = None,
    ) -> None:
        """Take the action, step the environment, and either stand at the next turn or end.

        Args:
            generation: What the policy wrote.
            tokenizer: Its tokenizer.
            config: The limits.
            first_entropy: Entropy over its first tokens in nats, where it is measured.
            uncertainty: Its Phi, where it is measured.
        """
        self.attempt = 0
        request_ids = self.request_ids
        turn = Turn.from_generation(
            generation,
            observation_ids=self.place.observation_ids,
            observation=self.place.observation,
            action=decode_action(generation, tokenizer),
        )
        self.prefix = request_ids + generation.ids
        place = None
        if generation.stop_reason == "abort":
            self._end(config.error_reward, "abort", "the policy gave up", truncated=True)
        else:
            place = self._step(turn.action, tokenizer, config)
        self.turns.append(PendingTurn(request_ids, turn, place, first_entropy))
        if place is not None:
            self.place = place._replace(uncertainty=uncertainty)
            self.turns[-1] = self.turns[-1]._replace(place=self.place)
            if self.room(config) < 1:
                reason = f"no room for another action in {config.max_response_tokens} response tokens"
                self._end(config.cut_reward, "length", reason, truncated=True)
        if self.outcome is not None and self.discarded:
            self.outcome["discarded"] = self.discarded
        if self.outcome is not None and config.overlong_share:
            self.reward += self._overlong_penalty(config)

    def _overlong_penalty(self, config: RolloutConfig) -> float:
        length, limit = len(self.prefix) - self.prompt_length, config.max_response_tokens
        buffer = max(1, round(config.overlong_share * limit))
        return float(overlong_penalty(length, max_length=limit, buffer=buffer, factor=config.overlong_factor))

    def _step(self, action: str, tokenizer: Tokenizer, config: RolloutConfig) -> Place | None:
        try:
            observation, reward, terminated, truncated, info = self.env.step(action)
        except Exception as error:  # noqa: BLE001  the boundary to foreign environments: a failure is data
            self.env_failed = True
            self._end(config.error_reward, "env_error", f"{type(error).__name__}: {error}", truncated=True)
            return None
        kind = info.get("outcome", "")
        place = self.place
        total = place.reward + float(reward)
        if not math.isfinite(total):
            self._end(config.error_reward, "env_error", f"the reward is {reward}", truncated=True)
            return None
        calls = place.tool_calls + (kind in ("tool", "tool_error"))
        errors = place.tool_errors + (kind == "tool_error")
        if terminated or truncated:
            self.place = place._replace(reward=total, tool_calls=calls, tool_errors=errors)
            self._end_by_environment(info, terminated=bool(terminated), truncated=bool(truncated))
            return None
        ids = tuple(tokenizer.encode(observation))
        return Place(snapshot(self.env), observation, ids, total, calls, errors)

    def _end_by_environment(self, info: Mapping[str, Any], *, terminated: bool, truncated: bool) -> None:
        kind = str(info.get("outcome") or "terminated")
        if truncated and not terminated and kind in ("tool", "tool_error", "terminated"):
            kind = "limit"  # a wrapper's, over a turn that would have gone on
        self._end(
            self.place.reward, kind, str(info.get("reason", "")), terminated=terminated, truncated=truncated
        )
        assert self.outcome is not None
        self.outcome.update({key: info[key] for key in ("em", "f1", "answer") if key in info})

    def _end(
        self, reward: float, kind: str, reason: str, *, terminated: bool = False, truncated: bool = False
    ) -> None:
        self.reward = reward
        self.outcome = {
            "outcome": kind,
            "reason": reason,
            "terminated": terminated,
            "truncated": truncated,
            "tool_calls": self.place.tool_calls,
            "tool_errors": self.place.tool_errors,
        }


def decode_action(generation: Generation, tokenizer: Tokenizer) -> str:
    """The action's text: what was sampled, verbatim, without an end-of-sequence token at its end."""
    ids = generation.ids
    if generation.stop_reason == "eos" and ids and ids[-1] == tokenizer.eos_id:
        ids = ids[:-1]
    return tokenizer.decode(ids)
