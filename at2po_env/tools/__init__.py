"""Tools that an agent can call.

Read `base` first (a tool and how it is called), then `function` (tools from typed functions), `search`,
`calculator`, and `programs` with its `sandbox`. `mcp` (tools of MCP servers) is imported by name: it needs an
extra.
"""

from at2po_env.tools.base import UNCHANGED, Backend, Tool, ToolContext, ToolResult, call_tool
from at2po_env.tools.calculator import CalculatorTool
from at2po_env.tools.function import FunctionTool, as_tool, tool
from at2po_env.tools.programs import PythonTool, ShellTool
from at2po_env.tools.search import SearchTool

__all__ = [
    "UNCHANGED",
    "Backend",
    "CalculatorTool",
    "FunctionTool",
    "PythonTool",
    "SearchTool",
    "ShellTool",
    "Tool",
    "ToolContext",
    "ToolResult",
    "as_tool",
    "call_tool",
    "tool",
]
