"""Collects the trees of one training step: how many questions are asked, and which trees are trained on."""

from collections.abc import Callable
from dataclasses import dataclass, field

from at2po_agent.cluster.sampling import Rollout
from at2po_agent.config.sections import Config
from at2po_agent.credit.groups import is_informative
from at2po_agent.environments import Env, TaskOrder
from at2po_agent.learning.learner import TrainingError
from at2po_agent.policies.base import Policy
from at2po_agent.rollout import rollout
from at2po_agent.rollout.uncertainty import Thresholds
from at2po_agent.runs.seeding import RunPurpose, run_seed
from at2po_agent.tree import Tree


@dataclass
class Collected:
    """The trees of a step.

    Attributes:
        cursor: Position in the order of questions after it.
        sampled: All trees.
        trees: Those that are trained on: trees with leaves and, under `keep: informative`, with rewards that
            differ.
        tokens: Sampled tokens, those of trees that are not trained on included.
        tool_calls: Turns that reached a tool, likewise.
        policy_seconds: Time within the policy.
        changes: Of T2PO's thinking intervention (`RolloutStats.changes`).
        differences: Of its dynamical sampling (`RolloutStats.differences`).
    """

    cursor: int
    sampled: list[Tree] = field(default_factory=list)
    trees: list[Tree] = field(default_factory=list)
    tokens: int = 0
    tool_calls: int = 0
    policy_seconds: float = 0.0
    changes: list[float] = field(default_factory=list)
    differences: list[float] = field(default_factory=list)


def collect_trees(
    order: TaskOrder,
    cursor: int,
    env: Env,
    policy: Policy,
    config: Config,
    *,
    step: int,
    thresholds: Thresholds | None = None,
    on_leaf: Callable[[], None],
    grow: Rollout = rollout,
) -> Collected:
    """Sample the trees of a step.

    Under `keep: informative` (DAPO's dynamic sampling) questions whose leaves all earn the same are dropped,
    and more are asked until the step is full or `oversampling` times its questions were asked.

    Args:
        order: The questions.
        cursor: Position in the order from which to go on.
        env: The environment.
        policy: The policy.
        config: The run.
        step: Number of the step; with `run.seed` it decides every draw.
        thresholds: Of T2PO's interventions, where a share of the turns is configured.
        on_leaf: Called whenever a branch has ended.
        grow: Grows the trees; `rollout`, or a share of it on each learner.

    Raises:
        TrainingError: Every prompt was too long; or the environment failed in every branch, and
            `health.pause_at` is none, so that no pause can help.
    """
    count, algorithm = config.train.questions, config.algorithm
    dynamic = algorithm.keep == "informative"
    collected = Collected(cursor)
    for attempt in range(algorithm.oversampling if dynamic else 1):
        seed = run_seed(config.run.seed, RunPurpose.ROLLOUT, step, attempt)
        tasks = order.options(collected.cursor, count)
        trees = grow(tasks, env, policy, config.rollout, seed=seed, thresholds=thresholds, on_leaf=on_leaf)
        # Questions of which every branch failed teach nothing: say why instead of going on.
        outcomes = [tree.outcomes[leaf] or {} for tree in trees for leaf in tree.leaves()]
        if not outcomes:
            raise TrainingError(
                f"all {len(trees)} prompts are longer than rollout.max_prompt_tokens; raise it"
            )
        failed = all(outcome.get("outcome") in ("env_error", "env_timeout") for outcome in outcomes)
        if failed and config.health.pause_at is None:
            reason = outcomes[0].get("reason")
            raise TrainingError(f"the environment failed in every branch of a step: {reason}")
        collected.cursor += count
        collected.sampled += trees
        collected.tokens += trees.stats.sampled_tokens
        collected.tool_calls += trees.stats.tool_calls
        collected.policy_seconds += trees.stats.policy_seconds
        collected.changes += trees.stats.changes
        collected.differences += trees.stats.differences
        for tree in trees:
            rewards = tree.leaf_reward[tree.is_leaf]
            if len(rewards) and (not dynamic or is_informative(rewards)):
                collected.trees.append(tree)
        if failed or len(collected.trees) >= count:
            break
    del collected.trees[count:]
    return collected
