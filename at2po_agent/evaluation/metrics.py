"""Computes figures of trees: the worth of their leaves, how episodes ended, what they cost. All pure."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from at2po_agent.tree import Tree

OUTCOME_PREFIX = "outcome/"
METRIC_PREFIX = "metrics/"


def tree_metrics(trees: Sequence[Tree]) -> dict[str, float]:
    """Compute means and counts over all leaves of some trees.

    Returns:
        reward; em and f1, only where the environment scores them (means over leaves); `metrics/NAME`, the
        numbers that it reports, such as success (means over leaves; 0 for a leaf without one); turns and
        response tokens per branch; entropy (mean over turns, nats) and entropy_between_turns (its standard
        deviation within a branch, mean over branches); groups_without_signal (share of questions whose leaves
        have equal rewards); the counts questions, skipped_questions, leaves, nodes, tool_calls, tool_errors
        and `outcome/KIND`; where there are any, forced_tokens and discarded_turns.
    """
    grown = [tree for tree in trees if tree.leaves()]
    figures: dict[str, float] = {
        "questions": len(grown),
        "skipped_questions": len(trees) - len(grown),
        "nodes": sum(len(tree) - 1 for tree in grown),
    }
    leaves = [(tree, leaf, tree.outcomes[leaf] or {}) for tree in grown for leaf in tree.leaves()]
    figures["leaves"] = len(leaves)
    if not leaves:
        return figures
    rewards = [tree.leaf_reward[tree.is_leaf] for tree in grown]
    figures["reward"] = float(np.mean(np.concatenate(rewards)))
    figures["groups_without_signal"] = float(np.mean([np.ptp(reward) == 0 for reward in rewards]))
    figures.update(_scores([outcome for _, _, outcome in leaves]))
    figures["turns"] = float(np.mean([len(tree.path(leaf)) - 1 for tree, leaf, _ in leaves]))
    figures["response_tokens"] = float(np.mean([tree.response_tokens(leaf) for tree, leaf, _ in leaves]))
    figures["entropy"] = float(np.mean(np.concatenate([tree.entropy[1:] for tree in grown])))
    figures["entropy_between_turns"] = float(
        np.mean([np.std(tree.entropy[tree.path(leaf)[1:]]) for tree, leaf, _ in leaves])
    )
    figures["tool_calls"] = sum(int(outcome.get("tool_calls", 0)) for _, _, outcome in leaves)
    figures["tool_errors"] = sum(int(outcome.get("tool_errors", 0)) for _, _, outcome in leaves)
    figures.update(_interventions(grown, [outcome for _, _, outcome in leaves]))
    kinds = Counter(str(outcome.get("outcome", "unknown")) for _, _, outcome in leaves)
    figures.update({OUTCOME_PREFIX + kind: count for kind, count in sorted(kinds.items())})
    return figures


def sampled_tokens(trees: Iterable[Tree]) -> int:
    """Count the tokens that the policy sampled, shared prefixes once."""
    return sum(int(turn.sampled_mask.sum()) for tree in trees for turn in tree.turns if turn is not None)


def intervention_shares(trees: Iterable[Tree]) -> dict[str, float]:
    """Measure how often T2PO's interventions fired.

    Returns:
        thinking: share of the turns in which tokens were forced; resampling: share of the attempts at a
        turn that were discarded.
    """
    turns = forced = discarded = 0
    for tree in trees:
        for turn in tree.turns[1:]:
            turns += 1
            forced += turn is not None and not turn.sampled_mask.all()
        discarded += sum(len((outcome or {}).get("discarded", ())) for outcome in tree.outcomes)
    return {
        "thinking": forced / turns if turns else 0.0,
        "resampling": discarded / (turns + discarded) if turns else 0.0,
    }


def staleness_metrics(trees: Iterable[Tree], version: int) -> dict[str, float]:
    """Measure how old the weights were that sampled the turns of some trees.

    Args:
        trees: The trees that are trained on.
        version: Version of the weights that are about to be updated, as the policy counts them.

    Returns:
        stale_turns counts the turns that older weights sampled; staleness is their mean age in versions, over
        all turns.
    """
    ages = [version - turn.version for tree in trees for turn in tree.turns if turn is not None]
    return {
        "stale_turns": sum(age > 0 for age in ages),
        "staleness": float(np.mean(ages)) if ages else 0.0,
    }


def wilson_interval(mean: float, count: int, *, z: float = 1.96) -> tuple[float, float]:
    """Compute Wilson's interval of a proportion, which is sound near 0 and 1 and for few trials.

    Args:
        mean: The proportion seen, in [0, 1].
        count: How many trials.
        z: Normal quantile; 1.96 for 95%.
    """
    if count == 0:
        return 0.0, 1.0
    shrink = 1 + z * z / count
    centre = (mean + z * z / (2 * count)) / shrink
    half = z * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count)) / shrink
    return max(0.0, centre - half), min(1.0, centre + half)


def _interventions(trees: Sequence[Tree], outcomes: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Forced tokens, and turns that were sampled again; nothing where there are none."""
    forced = sum(int((~turn.sampled_mask).sum()) for tree in trees for turn in tree.turns if turn is not None)
    discarded = sum(len(outcome.get("discarded", ())) for outcome in outcomes)
    return {
        name: count for name, count in (("forced_tokens", forced), ("discarded_turns", discarded)) if count
    }


def _scores(outcomes: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean em, f1 and metrics (no answer counts 0), unless the environment never scores."""
    scores = {
        name: float(np.mean([float(outcome.get(name) or 0.0) for outcome in outcomes]))
        for name in ("em", "f1")
        if any(name in outcome for outcome in outcomes)
    }
    reported = [outcome.get("metrics") or {} for outcome in outcomes]
    for name in sorted({name for numbers in reported for name in numbers}):
        scores[METRIC_PREFIX + name] = float(np.mean([float(numbers.get(name, 0.0)) for numbers in reported]))
    return scores
