"""A rollout in which every learner grows the trees of some questions, and gets the trees of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from at2po_agent.cluster.learners import Learners
from at2po_agent.environments import Env, EnvCounters
from at2po_agent.policies.base import Policy
from at2po_agent.rollout import GrownTrees, Options, RolloutConfig, RolloutStats, rollout
from at2po_agent.rollout.uncertainty import Thresholds
from at2po_agent.tree import Tree
from at2po_env.retrieval.counters import count


class Rollout(Protocol):
    """What `rollout` is to its callers: one tree for each task."""

    def __call__(
        self,
        tasks: Sequence[Options],
        env: Env,
        policy: Policy,
        config: RolloutConfig,
        *,
        seed: int,
        thresholds: Thresholds | None = None,
        on_leaf: Callable[[], None] | None = None,
    ) -> GrownTrees:
        """Arguments and results are those of `rollout`."""


def shared_rollout(learners: Learners) -> Rollout:
    """`rollout`, with the tasks shared out among the learners, one after the other.

    The draws of a tree depend on its place among all tasks, so the trees are those of one process. Its stats
    are sums over the learners, but for the seconds in and outside the policy; what the environments of the
    others counted is added to the counts of this process.
    """
    if learners.count == 1:
        return rollout

    def grow(
        tasks: Sequence[Options],
        env: Env,
        policy: Policy,
        config: RolloutConfig,
        *,
        seed: int,
        thresholds: Thresholds | None = None,
        on_leaf: Callable[[], None] | None = None,
    ) -> GrownTrees:
        mine = range(learners.rank, len(tasks), learners.count)

        def grow_mine() -> tuple[list[Tree], RolloutStats, dict[str, int]]:
            counters = EnvCounters()
            grown = rollout(
                [tasks[place] for place in mine],
                env,
                policy,
                config,
                seed=seed,
                thresholds=thresholds,
                on_leaf=on_leaf,
                places=mine,
            )
            return list(grown), grown.stats, counters.counts()

        parts = learners.together(grow_mine)
        trees = [parts[place % learners.count][0][place // learners.count] for place in range(len(tasks))]
        for rank, (theirs, _, counts) in enumerate(parts):
            if rank == learners.rank:
                continue
            count(**counts)
            for _ in range(sum(len(tree.leaves()) for tree in theirs)):
                if on_leaf is not None:
                    on_leaf()
        own, stats = parts[learners.rank][1], [part[1] for part in parts]
        return GrownTrees(
            trees,
            own._replace(
                sampled_tokens=sum(one.sampled_tokens for one in stats),
                turns=sum(one.turns for one in stats),
                tool_seconds=sum(one.tool_seconds for one in stats),
                tool_calls=sum(one.tool_calls for one in stats),
                changes=tuple(change for one in stats for change in one.changes),
                differences=tuple(difference for one in stats for difference in one.differences),
            ),
        )

    return grow
