"""Which nodes of a tree to fork.

Read `rules` (pure functions over the tree's arrays: AT2PO's entropy score, random, Tree-GRPO's draw),
`adaptive` (ARPO's and AEPO's decision at every tool result), then `registry` (rules by name, and how to
register your own).
"""

from at2po_agent.expansion.adaptive import (
    aepo_branch_probability,
    aepo_nodes,
    aepo_root_chains,
    arpo_branch_probability,
    arpo_nodes,
    top_entropy,
)
from at2po_agent.expansion.registry import Expansion, expansion_rules, register_expansion
from at2po_agent.expansion.rules import expansion_scores, random_nodes, select_nodes, tree_grpo_nodes

__all__ = [
    "Expansion",
    "aepo_branch_probability",
    "aepo_nodes",
    "aepo_root_chains",
    "arpo_branch_probability",
    "arpo_nodes",
    "expansion_rules",
    "expansion_scores",
    "random_nodes",
    "register_expansion",
    "select_nodes",
    "top_entropy",
    "tree_grpo_nodes",
]
