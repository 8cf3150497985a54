"""Trees as tensors, and the forward pass over them.

Read `rows` (one row per leaf, the plain form), `trees` (every unique token once) with `prefixes` (the
index arithmetic below it), `forward` (a model's log-probs of a packed tree), `tree_attention/`, and
`head` and `log_probs` (log-softmax without copies).
"""
