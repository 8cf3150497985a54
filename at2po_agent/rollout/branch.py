"""One branch under way: its environment, its ids so far, and the turns that are not in the tree yet.

A turn has two halves. `write` takes the action that the policy wrote, and `arrive` takes the environment's
answer to it. Between the two, only the thread that steps the environment may touch it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from at2po_agent.credit.groups import overlong_penalty
from at2po_agent.rollout.config import RolloutConfig
from at2po_agent.rollout.steps import Env, Stepped
from at2po_agent.transcripts.inline import Transcript, TurnInput
from at2po_agent.transcripts.tokenizer import Tokenizer
from at2po_agent.types import Generation, Turn
from at2po_env import Snapshot


class BranchOrigin(NamedTuple):
    """A state of the environment from which branches can go on, with the observation that it showed last.

    Attributes:
        state: The environment after the node's action.
        observation: The text that it newly showed then; empty at the root, whose prompt belongs to the tree.
        shown: The ids that the next turn begins with, made once and shared by all branches; none at the root.
        reward: Sum of the rewards up to here.
        tool_calls: Turns up to here that reached a tool.
        tool_errors: Those whose tool failed.
        uncertainty: Phi of the turn that led here; None at the root, or where it is not measured.
    """

    state: Snapshot
    observation: str = ""
    shown: TurnInput = TurnInput(())
    reward: float = 0.0
    tool_calls: int = 0
    tool_errors: int = 0
    uncertainty: float | None = None


class PendingTurn(NamedTuple):
    """A turn that is not in the tree yet: the ids that the policy saw, the turn, and where it led.

    `origin` is None while the environment has not answered, and where the turn ended its branch.
    """

    prefix_ids: tuple[int, ...]
    turn: Turn
    origin: BranchOrigin | None
    first_entropy: float


@dataclass(eq=False)
class Branch:
    """One branch from the node it was forked at to its end.

    Attributes:
        config: Shape and limits.
        question: Index of the question.
        number: Index of the branch within the question; with the turn it decides every seed.
        node: The tree node below which the branch hangs.
        depth: Turns on the path to that node.
        env: An environment in the state of `origin`.
        origin: Where the next turn starts.
        prefix: Ids that the policy saw and sampled up to here, without the open observation.
        used: Tokens of all observations and actions so far, of which the response may have so many.
        chain: Number of the chain of the first round that the branch belongs to.
        turns: The turns to add to the tree when the round ends.
        outcome: How the branch ended; None while it runs.
        reward: Its terminal reward.
        env_failed: Whether the environment raised or hangs, and so must not be used again.
        attempt: How many attempts at the next turn were discarded.
        discarded: Those of all turns of the branch.
        uncertainty: Phi of the action that was written last, where it is measured.
        closed: Whether that action ended with the end-of-sequence id itself.
    """

    config: RolloutConfig
    question: int
    number: int
    node: int
    depth: int
    env: Env
    origin: BranchOrigin
    prefix: tuple[int, ...]
    used: int
    chain: int
    turns: list[PendingTurn] = field(default_factory=list)
    outcome: dict[str, Any] | None = None
    reward: float = 0.0
    env_failed: bool = False
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
        """The ids that the policy sees before its next action."""
        shown = self.origin.shown
        return shown.ids if shown.fresh else self.prefix + shown.ids

    @property
    def room(self) -> int:
        """Tokens that the next action may have; below 1 when the response is full."""
        shown = self.origin.shown
        used = self.used + (0 if shown.fresh else len(shown.ids))
        return min(self.config.max_turn_tokens, self.config.max_response_tokens - used)

    def discard(self, generation: Generation, tokenizer: Tokenizer, *, uncertainty: float) -> None:
        """Note an attempt at the next turn that is sampled again; nothing else changes."""
        self.attempt += 1
        text, _ = _read_action(generation, tokenizer)
        entry = {"turn": self.turn_number, "action": text, "tokens": len(generation.ids)}
        self.discarded.append({**entry, "uncertainty": uncertainty})

    def write(
        self,
        generation: Generation,
        tokenizer: Tokenizer,
        *,
        first_entropy: float = 0.0,
        uncertainty: float | None = None,
    ) -> str | None:
        """Take the action that the policy wrote.

        Args:
            generation: The action.
            tokenizer: The policy's tokenizer.
            first_entropy: Entropy over its first tokens in nats, where it is measured.
            uncertainty: Its Phi, where it is measured.

        Returns:
            The action's text for the environment; None where the policy gave up and the branch ended.
        """
        self.attempt, self.uncertainty = 0, uncertainty
        action, self.closed = _read_action(generation, tokenizer)
        request_ids, shown = self.request_ids, self.origin.shown
        turn = Turn.from_generation(
            generation,
            observation_ids=() if shown.fresh else shown.ids,
            observation=self.origin.observation,
            action=action,
            prompt_ids=shown.ids if shown.fresh else None,
        )
        self.prefix = request_ids + generation.ids
        self.used += turn.response_tokens
        self.turns.append(PendingTurn(request_ids, turn, None, first_entropy))
        if generation.stop_reason != "abort":
            return action
        self._fail("abort", "the policy gave up")
        return None

    def arrive(self, stepped: Stepped, transcript: Transcript) -> None:
        """Take the environment's answer: the branch goes on to its next turn, or ends.

        Args:
            stepped: The answer.
            transcript: Makes the observation's ids.
        """
        config, info = self.config, stepped.info
        if stepped.fault:
            self.env_failed = True
            self._fail("env_timeout" if stepped.late else "env_error", stepped.fault)
            if stepped.traceback and self.outcome is not None:
                self.outcome["traceback"] = stepped.traceback
            return
        reward = self.origin.reward + stepped.reward
        if not math.isfinite(reward):
            self._fail("env_error", f"the reward is {stepped.reward}")
            return
        kind = str(info.get("outcome") or "")
        calls = self.origin.tool_calls + (kind in ("tool", "tool_error"))
        errors = self.origin.tool_errors + (kind == "tool_error")
        if stepped.state is None:  # the episode is over
            self.origin = self.origin._replace(reward=reward, tool_calls=calls, tool_errors=errors)
            cut = stepped.truncated and not stepped.terminated
            if cut and kind in ("tool", "tool_error", "", "terminated"):
                kind = "limit"  # a wrapper's limit over a turn that would have gone on
            scores = {key: info[key] for key in ("em", "f1", "answer") if key in info}
            if "metrics" in info:
                scores["metrics"] = _numbers(info["metrics"])
            self._end(
                kind or "terminated",
                str(info.get("reason", "")),
                reward,
                terminated=stepped.terminated,
                truncated=stepped.truncated,
                scores=scores,
            )
            return
        action = self.turns[-1].turn.action
        shown = transcript.next(self.origin.shown, action, stepped.observation, info, closed=self.closed)
        self.origin = BranchOrigin(
            stepped.state, stepped.observation, shown, reward, calls, errors, self.uncertainty
        )
        self.turns[-1] = self.turns[-1]._replace(origin=self.origin)
        if shown.fresh and len(shown.ids) > config.max_prompt_tokens:
            reason = f"a prompt of {len(shown.ids)} tokens is longer than {config.max_prompt_tokens}"
            self._end("length", reason, config.cut_reward, truncated=True)
        elif self.room < 1:
            reason = f"no room for another action in {config.max_response_tokens} response tokens"
            self._end("length", reason, config.cut_reward, truncated=True)

    def _fail(self, kind: str, reason: str) -> None:
        self._end(kind, reason, self.config.error_reward, truncated=True)

    def _end(
        self,
        kind: str,
        reason: str,
        reward: float,
        *,
        terminated: bool = False,
        truncated: bool = False,
        scores: dict[str, Any] | None = None,
    ) -> None:
        config = self.config
        self.reward = reward
        if config.overlong_share:  # DAPO: the reward falls over the last share of the response
            self.reward += float(
                overlong_penalty(
                    self.used,
                    max_length=config.max_response_tokens,
                    buffer=max(1, round(config.overlong_share * config.max_response_tokens)),
                    factor=config.overlong_factor,
                )
            )
        self.outcome = {
            "outcome": kind,
            "reason": reason,
            "terminated": terminated,
            "truncated": truncated,
            "tool_calls": self.origin.tool_calls,
            "tool_errors": self.origin.tool_errors,
        }
        if self.discarded:
            self.outcome["discarded"] = self.discarded
        self.outcome.update(scores or {})


def _numbers(metrics: Any) -> dict[str, float]:
    """The finite numbers among what an environment reports; texts and arrays have no mean."""
    given = metrics.items() if isinstance(metrics, Mapping) else ()
    scalars = (int, float, np.number, np.bool_)
    found = {str(name): float(value) for name, value in given if isinstance(value, scalars)}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _read_action(generation: Generation, tokenizer: Tokenizer) -> tuple[str, bool]:
    """The action's text, verbatim but for an end-of-sequence id at its end; and whether there was one."""
    ids = generation.ids
    closed = generation.stop_reason == "eos" and bool(ids) and ids[-1] == tokenizer.eos_id
    return tokenizer.decode(ids[:-1] if closed else ids), closed
