"""Growing trees: policy x environment x expansion."""

from at2po_agent.expansion.registry import Expansion, expansion_rules, register_expansion
from at2po_agent.rollout.config import RolloutConfig
from at2po_agent.rollout.engine import Options, RolloutStats, rollout, rollout_with_stats

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
