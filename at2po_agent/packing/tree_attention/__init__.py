"""Attention of a packed tree: every token sees its ancestors and itself.

`tree_attention(model)` makes a transformers model use it; `TreePlan` says who sees whom. Each call of such a
model takes the plan as the keyword `tree_plan`.
"""

from at2po_agent.packing.tree_attention.cpu import tree_attention_cpu
from at2po_agent.packing.tree_attention.interface import NAME, attention_implementation, tree_attention
from at2po_agent.packing.tree_attention.plain import tree_attention_plain
from at2po_agent.packing.tree_attention.plan import Call, TreePlan

__all__ = [
    "NAME",
    "Call",
    "TreePlan",
    "attention_implementation",
    "tree_attention",
    "tree_attention_cpu",
    "tree_attention_plain",
]
