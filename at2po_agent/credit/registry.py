"""Credit rules by name: each gives the turns of a tree their advantages.

An own rule is one pure function: `register_credit("mine", rule)` with `rule(tree, **options) -> Credit`.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from at2po_agent.credit.groups import (
    Normalization,
    discounted_returns,
    gigpo_advantages,
    group_advantages,
    tree_grpo_advantages,
)
from at2po_agent.credit.surprisal import surprisal_tree_advantages
from at2po_agent.credit.values import (
    AdvantageMode,
    ValueMode,
    branch_advantages,
    node_advantages,
    node_values,
    normalize_leaf_rewards,
    shared_mean_advantages,
)
from at2po_agent.tree import Tree
from at2po_agent.types import FloatArray
from at2po_env.errors import ConfigError


class Credit(NamedTuple):
    """The advantages of one tree.

    Attributes:
        advantages: float[N] per node, float[L] per branch (leaves in order), or float[L, N] per node and
            branch.
        values: float[N] node values for the viewer; None where the rule has none.
    """

    advantages: FloatArray
    values: FloatArray | None = None


CreditRule = Callable[..., Credit]
"""`rule(tree, **options) -> Credit`, pure."""

_CREDIT_RULES: dict[str, CreditRule] = {}


def register_credit(name: str, rule: CreditRule) -> CreditRule:
    """Make a credit rule known to configurations.

    Args:
        name: The name, new.
        rule: Pure function `rule(tree, **options) -> Credit`.

    Raises:
        ConfigError: The name is taken.
    """
    if name in _CREDIT_RULES:
        raise ConfigError(f"a credit rule named {name!r} is registered already; choose another name")
    _CREDIT_RULES[name] = rule
    return rule


def credit_rules() -> dict[str, CreditRule]:
    """All registered credit rules by name."""
    return dict(_CREDIT_RULES)


def tree_credit(
    tree: Tree,
    *,
    normalize: bool = True,
    value_mode: ValueMode = "child_softmax",
    advantage_mode: AdvantageMode = "node_value",
) -> Credit:
    """AT²PO's: normalised leaf rewards go up the tree; a turn's advantage comes from its value."""
    leaf_value = normalize_leaf_rewards(tree.leaf_reward) if normalize else tree.leaf_reward
    values = node_values(tree.parent, tree.entropy, leaf_value, mode=value_mode)
    if advantage_mode == "group":
        return Credit(branch_advantages(leaf_value), values)
    return Credit(node_advantages(tree.parent, values, mode=advantage_mode), values)


def group_credit(tree: Tree, *, normalization: Normalization = "mean_std") -> Credit:
    """GRPO's: every token of a branch takes the branch's reward, standardised over the question."""
    return Credit(group_advantages(_rewards(tree), normalization=normalization))


def shared_group_credit(tree: Tree, *, normalization: Normalization = "mean_std") -> Credit:
    """ARPO's hard advantage: GRPO's, and a shared turn takes the mean of the branches through it."""
    leaf_value = np.full(len(tree), np.nan)
    leaf_value[tree.is_leaf] = group_advantages(_rewards(tree), normalization=normalization)
    return Credit(shared_mean_advantages(tree.parent, leaf_value))


def tree_grpo_credit(tree: Tree) -> Credit:
    """Tree-GRPO's: standardised over the question, plus standardised over the branch's own tree."""
    outcomes = [tree.outcomes[leaf] or {} for leaf in tree.leaves()]
    if any("chain" not in outcome for outcome in outcomes):
        raise ValueError(
            "credit tree_grpo needs trees of their own in a question: use rollout.expansion=tree_grpo"
        )
    return Credit(tree_grpo_advantages(_rewards(tree), [outcome["chain"] for outcome in outcomes]))


def gigpo_credit(
    tree: Tree, *, gamma: float = 0.95, step_weight: float = 1.0, normalization: Normalization = "mean_std"
) -> Credit:
    """GiGPO's: a branch's group advantage, plus that of a turn among those which saw the same observation.

    The reward comes with an episode's last turn; the first turns of all branches saw the prompt. A turn that
    branches share counts once for each, with each branch's return.
    """
    leaves = tree.leaves()
    paths = [tree.path(leaf)[1:] for leaf in leaves]
    rewards = _rewards(tree)
    returns = [
        discounted_returns([0.0] * (len(path) - 1) + [reward], gamma=gamma)
        for path, reward in zip(paths, rewards, strict=True)
    ]
    turns = [(tree.turns[node], node == path[0]) for path in paths for node in path]
    anchors = [None if first or turn is None else turn.observation for turn, first in turns]
    episodes = np.repeat(np.arange(len(leaves)), [len(path) for path in paths])
    flat = gigpo_advantages(
        rewards,
        episodes,
        np.concatenate(returns),
        anchors,
        step_weight=step_weight,
        normalization=normalization,
    )
    advantages = np.zeros((len(leaves), len(tree)))
    advantages[episodes, np.concatenate(paths)] = flat
    return Credit(advantages)


def surprisal_credit(tree: Tree, *, beyond: float = 0.3, cap: float | None = None) -> Credit:
    """Our own: a turn's value against the branches that do not pass through it, weighted by surprisal."""
    surprisal = [0.0 if turn is None else turn.entropy * int(turn.sampled_mask.sum()) for turn in tree.turns]
    return Credit(
        surprisal_tree_advantages(
            tree.parent, np.maximum(surprisal, 0.0), tree.leaf_reward, beyond=beyond, cap=cap
        )
    )


def _rewards(tree: Tree) -> FloatArray:
    rewards = tree.leaf_reward[tree.is_leaf]
    if not len(rewards):
        raise ValueError("a tree without leaves has no credit to give")
    return np.asarray(rewards)


register_credit("tree", tree_credit)
register_credit("group", group_credit)
register_credit("group_shared", shared_group_credit)
register_credit("tree_grpo", tree_grpo_credit)
register_credit("gigpo", gigpo_credit)
register_credit("surprisal", surprisal_credit)
