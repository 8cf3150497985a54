"""A transformers model as a policy, with continuous batching of its own.

Read `policy` (what users make), `batching` (requests come and go, each step is one forward pass),
`prefix_cache` (a radix tree of what was computed), `slots` (keys and values in arenas), `attention`,
`decoder` and `fused` (the forward pass).
"""

from at2po_agent.policies.hf.policy import HFPolicy

__all__ = ["HFPolicy"]
