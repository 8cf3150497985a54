"""An MCP server of the official package, for tests: `python mcp_server.py` by pipes, with a port by HTTP.

Each session counts for itself. Over HTTP a process has many sessions, over pipes one.
"""

import asyncio
import base64
import json
import os
import sys
import time

from mcp.server.mcpserver import Context, Image, MCPServer
from mcp_types import ToolAnnotations


def make_server() -> MCPServer:
    server = MCPServer("counter", log_level="CRITICAL")
    totals: dict[str, int] = {}

    def session(ctx: Context) -> str:
        return (ctx.headers or {}).get("mcp-session-id", "pipes")

    @server.tool()
    def add(amount: int, ctx: Context) -> str:
        """Add to the total."""
        totals[session(ctx)] = totals.get(session(ctx), 0) + amount
        return f"total {totals[session(ctx)]}"

    @server.tool(annotations=ToolAnnotations(read_only_hint=True))
    def total(ctx: Context) -> str:
        """Say the total."""
        return f"total {totals.get(session(ctx), 0)}"

    @server.tool()
    def fail() -> str:
        """Always fail."""
        raise ValueError("this never works")

    @server.tool()
    def picture() -> list[Image | str]:
        """Draw."""
        return ["a dot", Image(data=base64.b64decode("aGVsbG8h"), format="png")]

    @server.tool()
    def clock() -> str:
        """Say a time that never comes back."""
        return str(time.monotonic_ns())

    @server.tool()
    async def sleep(seconds: float) -> str:
        """Sleep."""
        await asyncio.sleep(seconds)
        return "awake"

    @server.tool()
    def die() -> str:
        """Die."""
        sys.stderr.write("I am dying")
        sys.stderr.flush()
        os._exit(3)

    @server.tool()
    def flood(megabytes: int) -> str:
        """Say a lot."""
        return "x" * (megabytes << 20)

    @server.tool()
    def pid() -> str:
        """Say the process."""
        return str(os.getpid())

    @server.tool()
    def surroundings(word: str, ctx: Context) -> str:
        """Say where the server runs, and what it was given under a word."""
        header = (ctx.headers or {}).get(word)
        return json.dumps({"folder": os.getcwd(), "variable": os.environ.get(word), "header": header})

    return server


if __name__ == "__main__":
    if len(sys.argv) > 1:
        make_server().run("streamable-http", port=int(sys.argv[1]))
    make_server().run("stdio")
