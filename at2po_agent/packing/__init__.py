"""Trees as tensors, and the forward pass over them.

`pack_rows` writes one padded row per branch; `pack_trees` puts every token that branches share into one
sequence, once. Both make a `Batch` (`batch`), which the learner cuts into micro-batches and asks for log-
probs.

Read `branches` (a tree's branches as arrays), `batch` (what both forms offer), `rows` (the plain form), then
`prefixes` (where each token of a packed tree stands), `trees` (the packed form and its forward pass),
`tree_attention/` and `log_probs` (log-softmax without copies).
"""
