"""Other views of a text environment: the whole transcript, and numbers for value-based and SB3 agents."""

from at2po_env.wrappers.numeric import NumericView
from at2po_env.wrappers.transcript import FullTranscript

__all__ = ["FullTranscript", "NumericView"]
