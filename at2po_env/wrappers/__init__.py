"""Other views of a text environment, and forks of foreign ones.

`transcript` shows the whole transcript at every turn; `numeric` shows numbers, for value-based and
Stable-Baselines3 agents; `replay` makes any deterministic environment forkable.
"""

from at2po_env.wrappers.numeric import NumericView
from at2po_env.wrappers.replay import Replay
from at2po_env.wrappers.transcript import FullTranscript

__all__ = ["FullTranscript", "NumericView", "Replay"]
