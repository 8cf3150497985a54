"""The tools of any MCP server as tools of an environment (extra `mcp`).

Read `server` first (a server, its sessions, and how a fork gets one), then `tools` (schemas and results) and
`transports` (pipes and HTTP, bounded).
"""

from at2po_env.tools.mcp.server import McpServer
from at2po_env.tools.mcp.tools import McpTool

__all__ = ["McpServer", "McpTool"]
