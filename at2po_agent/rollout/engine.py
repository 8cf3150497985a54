"""Grows the trees of a whole batch together: every branch goes on as soon as its own generation is there."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium

from at2po_agent.policies.base import Policy, Request, Tokenizer
from at2po_agent.rollout.branch import Branch
from at2po_agent.rollout.expansions import Expansion, expansion_rules
from at2po_agent.rollout.question import EnvPool, Question, open_question
from at2po_agent.rollout.sampler import Sampler
from at2po_agent.rollout.seeds import Purpose, derive_seed
from at2po_agent.rollout.settings import RolloutConfig
from at2po_agent.rollout.watch import Watch, vocabulary_size, watch_needed
from at2po_agent.tree import Tree
from at2po_agent.types import Generation
from at2po_env.errors import ConfigError

Options = Mapping[str, Any] | None
"""What `reset` gets for one question, such as `{"index": 3}`; None lets the seed draw it."""


class RolloutStats(NamedTuple):
    """What a rollout cost: sampled tokens, seconds inside the policy, seconds in all the rest."""

    sampled_tokens: int
    policy_seconds: float
    env_seconds: float


def rollout(
    tasks: Sequence[Options],
    env: gymnasium.Env[str, str],
    policy: Policy,
    config: RolloutConfig,
    *,
    seed: int,
    expansion: Expansion | None = None,
    on_leaf: Callable[[], None] | None = None,
) -> list[Tree]:
    """Grow one tree for each task.

    M chains start at the prompt; then, L times, K nodes are chosen by the expansion rule and forked. A round
    of a tree starts as soon as that tree is ready, and results depend only on the arguments, never on timing.

    Args:
        tasks: Reset options of each question.
        env: Any forkable environment, wrappers included; it is reset, and forked for every branch.
        policy: Samples the actions.
        config: Shape and limits.
        seed: Decides every draw of environment, policy and expansion.
        expansion: The rule; None takes the registered rule that `config.expansion` names.
        on_leaf: Called whenever a branch has ended.

    Returns:
        One tree per task, in order; a tree without leaves where the prompt was too long.

    Raises:
        ConfigError: No such expansion rule.
        PolicyError: The policy broke its contract.
    """
    return rollout_with_stats(tasks, env, policy, config, seed=seed, expansion=expansion, on_leaf=on_leaf)[0]


def rollout_with_stats(
    tasks: Sequence[Options],
    env: gymnasium.Env[str, str],
    policy: Policy,
    config: RolloutConfig,
    *,
    seed: int,
    expansion: Expansion | None = None,
    on_leaf: Callable[[], None] | None = None,
) -> tuple[list[Tree], RolloutStats]:
    """As `rollout`, with what it cost."""
    start = time.perf_counter()
    pool, tokenizer = EnvPool(env), _Remembering(policy.tokenizer)
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
                tokenizer=tokenizer,
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
    _run(questions, sampler, tokenizer, config, on_leaf=on_leaf or _ignore, watch=watch)
    seconds = time.perf_counter() - start
    stats = RolloutStats(sampler.tokens, sampler.seconds, seconds - sampler.seconds)
    return [question.tree for question in questions], stats


def _run(
    questions: Sequence[Question],
    sampler: Sampler,
    tokenizer: Tokenizer,
    config: RolloutConfig,
    *,
    on_leaf: Callable[[], None],
    watch: Callable[[], Watch | None],
) -> None:
    running: dict[int, tuple[Branch, Watch | None]] = {}

    def ask(branch: Branch) -> None:
        question, watching = questions[branch.question], watch()
        request = Request(
            prefix_ids=branch.request_ids,
            max_tokens=branch.room(config),
            temperature=config.temperature,
            top_p=config.top_p,
            stop=question.stop,
            seed=question.sampling_seed(branch),
            intervention=watching,
        )
        running[sampler.submit(request)] = branch, watching

    try:
        for question in questions:
            for branch in question.first_round():
                ask(branch)
        while running:
            for ticket, generation in sampler.collect():
                branch, watching = running.pop(ticket)
                _hand_over(branch, generation, tokenizer, config, watching)
                if branch.outcome is None:
                    ask(branch)
                    continue
                on_leaf()
                for fresh in questions[branch.question].next_round():
                    ask(fresh)
    finally:
        sampler.cancel_all()


def _hand_over(
    branch: Branch,
    generation: Generation,
    tokenizer: Tokenizer,
    config: RolloutConfig,
    watching: Watch | None,
) -> None:
    """Give a branch its turn, or note that the turn is to be sampled again."""
    if watching is None:
        branch.receive(generation, tokenizer, config)
        return
    watching.check(generation)
    uncertainty = watching.uncertainty
    if watching.wants_another(generation, previous=branch.place.uncertainty, attempts=branch.attempt):
        branch.discard(generation, tokenizer, uncertainty=uncertainty)
        return
    first = watching.first_entropy
    branch.receive(generation, tokenizer, config, first_entropy=first, uncertainty=uncertainty)


class _Remembering:
    """A tokenizer that encodes a text once: branches of a question are often shown the same passages."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_id = tokenizer.eos_id
        self.decode = tokenizer.decode
        self._encode = tokenizer.encode
        self._known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        if text not in self._known:
            self._known[text] = self._encode(text)
        return self._known[text]


def _registered(name: str) -> Expansion:
    rules = expansion_rules()
    if name not in rules:
        raise ConfigError(f"rollout.expansion: no rule named {name!r}; known: {', '.join(sorted(rules))}")
    return rules[name]


def _ignore() -> None:
    pass
