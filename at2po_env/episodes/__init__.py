"""An episode of text and tools: prompt, turns, tool calls, a final answer.

Read `tool_env` first (the environment), then `episode` (its immutable state), `actions` (protocols, which
read what the policy wrote), `prompts` (templates, and how they describe tools) and `infos` (the infos of many
environments).
"""

from at2po_env.episodes.actions import (
    ActionProtocol,
    FinalAnswer,
    HermesProtocol,
    Malformed,
    TaggedProtocol,
    ToolCall,
    make_protocol,
)
from at2po_env.episodes.episode import Episode
from at2po_env.episodes.prompts import Prompt, make_prompt
from at2po_env.episodes.tool_env import Ending, ToolEnv

__all__ = [
    "ActionProtocol",
    "Ending",
    "Episode",
    "FinalAnswer",
    "HermesProtocol",
    "Malformed",
    "Prompt",
    "TaggedProtocol",
    "ToolCall",
    "ToolEnv",
    "make_prompt",
    "make_protocol",
]
