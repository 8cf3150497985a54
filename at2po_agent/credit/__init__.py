"""What a turn was worth.

Read `values` (a tree's leaf rewards carried back to every turn: AT2PO), `groups` (groups of branches:
GRPO, Tree-GRPO, GiGPO), `surprisal` (our own), then `registry` (rules by name, and how to register your own).
"""

from at2po_agent.credit.groups import (
    anchor_advantages,
    discounted_returns,
    gigpo_advantages,
    group_advantages,
    is_informative,
    overlong_penalty,
    tree_grpo_advantages,
)
from at2po_agent.credit.registry import Credit, CreditRule, credit_rules, register_credit
from at2po_agent.credit.surprisal import surprisal_tree_advantages, weighted_baseline_advantages
from at2po_agent.credit.values import (
    branch_advantages,
    node_advantages,
    node_values,
    normalize_leaf_rewards,
    shared_mean_advantages,
)

__all__ = [
    "Credit",
    "CreditRule",
    "anchor_advantages",
    "branch_advantages",
    "credit_rules",
    "discounted_returns",
    "gigpo_advantages",
    "group_advantages",
    "is_informative",
    "node_advantages",
    "node_values",
    "normalize_leaf_rewards",
    "overlong_penalty",
    "register_credit",
    "shared_mean_advantages",
    "surprisal_tree_advantages",
    "tree_grpo_advantages",
    "weighted_baseline_advantages",
]
