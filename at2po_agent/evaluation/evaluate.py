"""Evaluates a policy in an environment: one chain per question, no tree; greedy, or sampled."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import gymnasium

from at2po_agent.cluster.learners import Learners
from at2po_agent.cluster.sampling import Rollout, shared_rollout
from at2po_agent.config.sections import Config
from at2po_agent.environments import Env, EnvCounters, TaskSplit, first_tasks
from at2po_agent.evaluation.metrics import (
    METRIC_PREFIX,
    OUTCOME_PREFIX,
    sampled_tokens,
    tree_metrics,
    wilson_interval,
)
from at2po_agent.health import (
    LOST,
    PROBES,
    HealthWatch,
    Tallies,
    Tally,
    add_failures,
    failed_share,
    failures,
    tally,
)
from at2po_agent.policies.base import Policy
from at2po_agent.rollout import Options, RolloutConfig, rollout
from at2po_agent.rollout.config import ResamplingConfig, ThinkingConfig
from at2po_agent.runs.progress import Progress
from at2po_agent.runs.seeding import RunPurpose, run_seed
from at2po_agent.tree import Tree

MODES = {"greedy": 0.0, "sampled": 1.0}
"""Temperatures at which a run evaluates."""


class Evaluation(NamedTuple):
    """Means over the questions.

    Attributes:
        questions: How many were asked.
        em: Exact match; like its interval and F1 it is None where the environment scores none.
        em_low: Lower end of its 95% interval (Wilson).
        em_high: Upper end.
        f1: Token F1.
        reward: Reward of the environment.
        turns: Turns of an episode.
        tokens: Sampled tokens of an episode.
        outcomes: How many episodes ended in which way.
        metrics: Means of the numbers that the environment reports, such as success; 0 for a skipped question.
        seen: How many of the questions are trained on, too; None where that is not known, as with questions
            that are drawn by seed.
        failures: Episodes and calls that failed (`health.failures`).
        failed_share: The largest share that failed (`health.failed_share`).
    """

    questions: int
    em: float | None
    em_low: float | None
    em_high: float | None
    f1: float | None
    reward: float
    turns: float
    tokens: float
    outcomes: dict[str, int]
    metrics: dict[str, float]
    seen: int | None = None
    failures: Mapping[str, int] = MappingProxyType({})
    failed_share: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """All figures as JSON values."""
        return {**self._asdict(), "failures": dict(self.failures)}


def evaluate(  # noqa: PLR0913  what `rollout` takes, and what only an evaluation needs
    tasks: Sequence[Options],
    env: gymnasium.Env[str, str],
    policy: Policy,
    config: RolloutConfig,
    *,
    seed: int,
    temperature: float = 0.0,
    batch: int = 256,
    progress: Progress | None = None,
    phase: str = "evaluate",
    health: HealthWatch | None = None,
    grow: Rollout = rollout,
) -> tuple[Evaluation, list[Tree]]:
    """Ask every question once.

    Args:
        tasks: Reset options of each question.
        env: The environment.
        policy: The policy.
        config: Limits; shape, temperature, reward shaping and interventions in it are not used.
        seed: Decides every draw.
        temperature: 0 is greedy.
        batch: Questions under way at the same time.
        progress: Listener, told of every question and about every second of a pause; what it raises ends the
            evaluation.
        phase: The name of the phase that it is told.
        health: Asks a batch again in which a service failed too often, once the service is back.
        grow: Asks the questions; `rollout`, or a share of it on each learner.

    Returns:
        The figures, and one tree of a single chain per question.

    Raises:
        ServiceError: A service was still down after `health.give_up_after_s`.
    """
    one_chain = {"chains": 1, "forks": 0, "rounds": 0, "expansion": "chains"}
    unshaped = {"overlong_share": 0.0, "thinking": ThinkingConfig(), "resampling": ResamplingConfig()}
    chain = config.model_copy(update={**one_chain, **unshaped, "temperature": temperature})
    trees: list[Tree] = []
    failed: dict[str, Tally] = {}
    listener = progress or Progress()

    def begin() -> None:
        """Say how many questions are answered for good."""
        listener.start(phase, len(tasks))
        listener.advance(phase, len(trees))

    def ask(count: int, on_leaf: Callable[[], None] | None) -> list[Tree]:
        """Ask the next questions; the same ones again until their trees are kept."""
        start = len(trees)
        return grow(tasks[start : start + count], env, policy, chain, seed=seed + start, on_leaf=on_leaf)

    def ask_batch() -> list[Tree]:
        return ask(batch, lambda: listener.advance(phase))

    begin()
    while len(trees) < len(tasks):
        if health is None:
            counters = EnvCounters()
            answered = ask_batch()
            tallies: Tallies = tally(answered, counters.counts())
        else:
            answered, _ = health.sound(
                ask_batch,
                lambda grown: grown,
                probe=lambda: ask(PROBES, None),
                pausing=begin,
                tick=lambda: listener.advance(phase, 0),
            )
            tallies = health.history[-1]
        trees += answered
        failed = add_failures(failed, failures(answered, tallies))
    listener.finish(phase)
    counts = {name: one.failed for name, one in failed.items()}
    return summarise(trees)._replace(failures=counts, failed_share=failed_share(failed)), trees


def evaluate_mode(  # noqa: PLR0913  what only some callers have: a name of the phase, a split, learners
    config: Config,
    mode: str,
    env: Env,
    policy: Policy,
    progress: Progress,
    *,
    split: TaskSplit | None = None,
    phase: str = "",
    temperature: float | None = None,
    go_on: str = "then run the same command again",
    on_error: Callable[[str], None] | None = None,
    learners: Learners | None = None,
) -> Evaluation:
    """Ask a policy the questions of an evaluation.

    Args:
        config: Its limits and seed, and how many questions there are and run at once.
        mode: `greedy` or `sampled`; any other name needs a temperature.
        env: The environment that asks.
        policy: The policy that answers.
        progress: Listener.
        split: The questions; None asks the first `eval.questions` of the environment.
        phase: The name of the phase that the listener is told; "" means `evaluate (MODE)`.
        temperature: Sampling temperature; None takes the mode's.
        go_on: What to do after the fix where a service has died; the end of the error's message.
        on_error: Takes the first traceback of a batch in which the environment raised.
        learners: Processes that ask a share of the questions each; None for this process alone.

    Raises:
        ServiceError: A service died and was still down after `health.give_up_after_s`.
    """
    learners = learners or Learners()
    result, _ = evaluate(
        first_tasks(env, config.eval.questions) if split is None else split.evaluation,
        env,
        policy,
        config.rollout,
        seed=run_seed(config.run.seed, RunPurpose.EVALUATION),
        temperature=MODES[mode] if temperature is None else temperature,
        batch=config.eval.batch,
        progress=progress,
        phase=phase or f"evaluate ({mode})",
        health=HealthWatch(config.health, progress.message, go_on, on_error, learners.together),
        grow=shared_rollout(learners),
    )
    return result if split is None else result._replace(seen=split.seen)


def summarise(trees: Sequence[Tree]) -> Evaluation:
    """Average the figures of chains; a question that was skipped counts as answered wrongly."""
    figures = tree_metrics(trees)
    count = len(trees)
    answered = figures["leaves"] / count if count else 0.0
    em: float | None = figures.get("em", 0.0) * answered
    f1: float | None = figures.get("f1", 0.0) * answered
    low: float | None
    high: float | None
    low, high = wilson_interval(em or 0.0, count)
    kinds = {
        key.removeprefix(OUTCOME_PREFIX): int(figures[key])
        for key in figures
        if key.startswith(OUTCOME_PREFIX)
    }
    if "em" not in figures and set(kinds) - set(LOST):  # episodes that ended by themselves were not scored
        em = low = high = f1 = None
    return Evaluation(
        questions=count,
        em=em,
        em_low=low,
        em_high=high,
        f1=f1,
        reward=figures.get("reward", 0.0),
        turns=figures.get("turns", 0.0),
        tokens=sampled_tokens(trees) / count if count else 0.0,
        outcomes=kinds,
        metrics={
            key.removeprefix(METRIC_PREFIX): value * answered
            for key, value in figures.items()
            if key.startswith(METRIC_PREFIX)
        },
    )
