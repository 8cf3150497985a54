"""An episode of text: prompt, turns, tool calls and a final answer, or commands to a world.

Read `tool_env` (the environment of tools) or `command_env` (that of worlds) first, then `episode` (its
immutable state), `actions` (protocols, which read what the policy wrote), `prompts` (templates, and how they
describe tools) and `infos` (the infos of many environments).
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
from at2po_env.episodes.command_env import CommandEnv, CommandResult
from at2po_env.episodes.episode import Episode
from at2po_env.episodes.prompts import Prompt, make_prompt
from at2po_env.episodes.tool_env import Ending, ToolEnv

__all__ = [
    "ActionProtocol",
    "CommandEnv",
    "CommandResult",
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
