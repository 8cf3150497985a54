"""The environment SDK: episodes that can be forked at any turn.

Importing it registers every environment id, and calls the plug-ins of the entry-point group "at2po.envs".
"""

from at2po_env import errors, scoring
from at2po_env.contract.checker import check_env
from at2po_env.data.tasks import Task, TaskList, TaskSource
from at2po_env.episodes.actions import (
    FinalAnswer,
    HermesProtocol,
    Malformed,
    TaggedProtocol,
    ToolCall,
    make_protocol,
)
from at2po_env.episodes.command_env import CommandEnv, CommandResult
from at2po_env.episodes.tool_env import Ending, ToolEnv
from at2po_env.errors import At2poError
from at2po_env.forking.base import ForkableEnv, fork, restore, snapshot
from at2po_env.forking.snapshots import Snapshot
from at2po_env.registry import load_plugins, register_shipped, register_tool_env
from at2po_env.spaces import Text
from at2po_env.tools import SearchTool, Tool, ToolContext, ToolResult, call_tool, tool
from at2po_env.vector import TextVectorEnv

__all__ = [
    "At2poError",
    "CommandEnv",
    "CommandResult",
    "Ending",
    "FinalAnswer",
    "ForkableEnv",
    "HermesProtocol",
    "Malformed",
    "SearchTool",
    "Snapshot",
    "TaggedProtocol",
    "Task",
    "TaskList",
    "TaskSource",
    "Text",
    "TextVectorEnv",
    "Tool",
    "ToolCall",
    "ToolContext",
    "ToolEnv",
    "ToolResult",
    "call_tool",
    "check_env",
    "errors",
    "fork",
    "make_protocol",
    "register_tool_env",
    "restore",
    "scoring",
    "snapshot",
    "tool",
]

register_shipped()
load_plugins()
