"""Grows the trees of a whole batch together: what the rest of the package calls."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium

from at2po_agent.expansion.registry import Expansion, expansion_rules
from at2po_agent.policies.base import Policy
from at2po_agent.rollout.config import RolloutConfig
from at2po_agent.rollout.question import EnvPool, Question, open_question
from at2po_agent.rollout.requests import Sampler
from at2po_agent.rollout.scheduler import Scheduler
from at2po_agent.rollout.seeds import Purpose, derive_seed
from at2po_agent.rollout.watch import Watch, vocabulary_size, watch_needed
from at2po_agent.transcripts.transcripts import InlineTranscript, Transcript
from at2po_agent.tree import Tree
from at2po_env.errors import ConfigError

Options = Mapping[str, Any] | None
"""What `reset` gets for one question, such as `{"index": 3}`; None lets the seed draw it."""


class RolloutStats(NamedTuple):
    """What a rollout cost.

    Attributes:
        sampled_tokens: Tokens that the policy sampled.
        policy_seconds: Seconds inside the policy.
        env_seconds: Seconds in all the rest: steps in line, waiting for tools, and the scheduler itself.
        turns: Actions that were taken.
        tool_seconds: Seconds that steps of environments took, added up over all threads.
    """

    sampled_tokens: int
    policy_seconds: float
    env_seconds: float
    turns: int = 0
    tool_seconds: float = 0.0


def rollout(
    tasks: Sequence[Options],
    env: gymnasium.Env[str, str],
    policy: Policy,
    config: RolloutConfig,
    *,
    seed: int,
    expansion: Expansion | None = None,
    on_leaf: Callable[[], None] | None = None,
    transcript: Transcript | None = None,
) -> list[Tree]:
    """Grow one tree for each task.

    M chains start at the prompt; then, L times, K nodes are chosen by the expansion rule and forked. Slow
    steps of environments are taken in threads while the policy goes on. A round of a tree starts as soon as
    that tree is ready, and results depend only on the arguments, never on timing (`docs/rollout.md`).

    Args:
        tasks: Reset options of each question.
        env: Any forkable environment, wrappers included; it is reset, and forked for every branch.
        policy: Samples the actions.
        config: Shape and limits.
        seed: Decides every draw of environment, policy and expansion.
        expansion: The rule; None takes the registered rule that `config.expansion` names.
        on_leaf: Called whenever a branch has ended; what it raises stops the rollout.
        transcript: Turns what the environment shows into ids; None encodes it as it is.

    Returns:
        One tree per task, in order; a tree without leaves where the prompt was too long.

    Raises:
        ConfigError: No such expansion rule.
        PolicyError: The policy broke its contract.
    """
    trees, _ = rollout_with_stats(
        tasks,
        env,
        policy,
        config,
        seed=seed,
        expansion=expansion,
        on_leaf=on_leaf,
        transcript=transcript,
    )
    return trees


def rollout_with_stats(
    tasks: Sequence[Options],
    env: gymnasium.Env[str, str],
    policy: Policy,
    config: RolloutConfig,
    *,
    seed: int,
    expansion: Expansion | None = None,
    on_leaf: Callable[[], None] | None = None,
    transcript: Transcript | None = None,
) -> tuple[list[Tree], RolloutStats]:
    """As `rollout`, with what it cost."""
    start = time.perf_counter()
    pool, remembering = EnvPool(env), _Remembering(transcript or InlineTranscript(policy.tokenizer))
    rule = expansion or _registered(config.expansion)
    watching = watch_needed(config, probe=rule.adaptive)
    normalised = rule.adaptive or (watching and config.signal.kind == "released")
    vocab_size = vocabulary_size(policy) if normalised else 2
    questions = []
    for index, options in enumerate(tasks):
        opening = open_question(env, options, derive_seed(seed, Purpose.ENVIRONMENT, index))
        questions.append(
            Question(
                index,
                opening,
                transcript=remembering,
                pool=pool,
                config=config,
                expansion=rule,
                seed=seed,
                vocab_size=vocab_size,
            )
        )

    def watch() -> Watch | None:
        if not watching:
            return None
        return Watch(config, policy.tokenizer, probe=rule.adaptive, vocab_size=vocab_size)

    sampler = Sampler(policy)
    scheduler = Scheduler(
        questions,
        sampler,
        tokenizer=policy.tokenizer,
        transcript=remembering,
        config=config,
        watch=watch,
        on_leaf=on_leaf or _ignore,
    )
    scheduler.run()
    rest = time.perf_counter() - start - sampler.seconds
    stats = RolloutStats(sampler.tokens, sampler.seconds, rest, scheduler.turns, scheduler.steps.seconds)
    return [question.tree for question in questions], stats


class _Remembering:
    """A transcript that tokenises a text once: branches of a question are often shown the same passages."""

    def __init__(self, transcript: Transcript) -> None:
        self.open = transcript.open
        self._observe = transcript.observe
        self._known: dict[tuple[str, bool], list[int]] = {}

    def observe(self, observation: str, *, closed: bool) -> list[int]:
        """Ids of an observation."""
        key = observation, closed
        if key not in self._known:
            self._known[key] = self._observe(observation, closed=closed)
        return self._known[key]


def _registered(name: str) -> Expansion:
    rules = expansion_rules()
    if name not in rules:
        raise ConfigError(f"rollout.expansion: no rule named {name!r}; known: {', '.join(sorted(rules))}")
    return rules[name]


def _ignore() -> None:
    pass
