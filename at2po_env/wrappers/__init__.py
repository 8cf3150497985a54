"""Other views of a text environment.

`transcript` shows the whole transcript at every turn; `numeric` shows numbers, for value-based and
Stable-Baselines3 agents.
"""

from at2po_env.wrappers.numeric import NumericView
from at2po_env.wrappers.transcript import FullTranscript

__all__ = ["FullTranscript", "NumericView"]
