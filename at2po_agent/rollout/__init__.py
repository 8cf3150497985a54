"""Growing trees: policy x environment x expansion."""

from at2po_agent.rollout.engine import Options, RolloutStats, rollout, rollout_with_stats
from at2po_agent.rollout.expansions import Expansion, expansion_rules, register_expansion
from at2po_agent.rollout.settings import RolloutConfig

__all__ = [
    "Expansion",
    "Options",
    "RolloutConfig",
    "RolloutStats",
    "expansion_rules",
    "register_expansion",
    "rollout",
    "rollout_with_stats",
]
