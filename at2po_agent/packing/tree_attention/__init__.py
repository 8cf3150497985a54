"""Attention of a packed tree: every token sees its ancestors and itself.

`tree_attention(model)` (`interface`) makes a transformers model attend so; each call of it then takes the
`prefixes.Layout` of the pack, which says who descends from whom, as the keyword `tree_layout`. `cpu` and
`flex` do the work on a CPU and on a GPU.
"""

from at2po_agent.packing.tree_attention.cpu import tree_attention_cpu, tree_attention_plain
from at2po_agent.packing.tree_attention.interface import NAME, attention_implementation, tree_attention

__all__ = [
    "NAME",
    "attention_implementation",
    "tree_attention",
    "tree_attention_cpu",
    "tree_attention_plain",
]
