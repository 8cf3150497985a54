"""Growing trees: policy x environment x expansion.

Read `engine` (`rollout` and its scheduler), then `question` (the rounds of one tree) and `branch` (one
branch, turn by turn). `requests` asks any policy; `steps` steps environments, slow ones in threads; `watch`
and `uncertainty` look into the sampling of a turn (ARPO's entropy, T2PO's interventions); `config` has the
settings.
"""

from at2po_agent.expansion.registry import Expansion, expansion_rules, register_expansion
from at2po_agent.rollout.config import RolloutConfig
from at2po_agent.rollout.engine import GrownTrees, Options, RolloutStats, rollout

__all__ = [
    "Expansion",
    "GrownTrees",
    "Options",
    "RolloutConfig",
    "RolloutStats",
    "expansion_rules",
    "register_expansion",
    "rollout",
]
