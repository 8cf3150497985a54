"""MCP servers that misbehave, without any package so that they start fast: `python mcp_hostile.py MODE`."""

import json
import signal
import subprocess
import sys
import time
from typing import Any

ECHO = {"name": "echo", "inputSchema": {"type": "object", "properties": {"text": {"type": "string"}}}}
TOOLS: dict[str, list[Any]] = {
    "schema_is_text": [{"name": "echo", "inputSchema": "object"}],
    "schema_of_array": [{"name": "echo", "inputSchema": {"type": "array"}}],
    "properties_are_text": [{"name": "echo", "inputSchema": {"type": "object", "properties": "text"}}],
    "huge_schema": [{"name": "echo", "inputSchema": {"type": "object", "properties": {"x" * 70_000: {}}}}],
    "odd_schema": [
        {
            "name": "echo",
            "inputSchema": {
                "type": "object",
                "properties": {
                    "any": True,
                    "or": {"anyOf": "?"},
                    "model_config": {"type": ["string", "null"]},
                },
                "required": ["undeclared"],
            },
        }
    ],
}
RESULTS: dict[str, Any] = {
    "content_is_text": {"content": "hello"},
    "unknown_block": {"content": [{"type": "smell", "data": 1}]},
    "no_object": [1, 2],
    "refusal": None,
}


def send(**message: Any) -> None:
    sys.stdout.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
    sys.stdout.flush()


def answer(mode: str, method: str, parameters: dict[str, Any]) -> Any:
    if mode == "modern" and method == "server/discover":
        found = {"supportedVersions": ["2026-07-28"], "capabilities": {"tools": {}}}
        return {**found, "resultType": "complete", "ttlMs": 0, "cacheScope": "private"}
    if method == "initialize":
        return {
            "protocolVersion": parameters["protocolVersion"],
            "capabilities": {"tools": {}},
            "serverInfo": {"name": mode, "version": "1"},
        }
    if method == "tools/list":
        return {"tools": TOOLS.get(mode, [ECHO])} | ({"nextCursor": "more"} if mode == "endless_list" else {})
    if mode == "garbage":
        sys.stdout.write("a stray print\n{]\n\x00\n")
    if mode == "hang":
        time.sleep(3600)
    while mode == "flood_line":
        sys.stdout.write("x" * 65536)
    while mode == "flood_messages":
        send(method="notifications/message", params={"level": "info", "data": "x" * 1000})
    while mode == "flood_errors":
        sys.stderr.write("x" * 65536)
    said = parameters["arguments"].get("text", "")
    return RESULTS.get(mode, {"content": [{"type": "text", "text": f"echo {said}"}]})


def main(mode: str) -> None:
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen(["sleep", "3600"])
    while mode == "silent":
        time.sleep(1)
    for line in sys.stdin:
        message = json.loads(line)
        if "id" in message:
            if mode == "modern" and message["method"] == "initialize":
                send(id=message["id"], error={"code": -32601, "message": "no such method"})
                continue
            result = answer(mode, message["method"], message.get("params") or {})
            if mode == "modern" and message["method"] != "server/discover":
                result = {**result, "resultType": "complete", "ttlMs": 0, "cacheScope": "private"}
            if result is None:
                send(id=message["id"], error={"code": -32602, "message": "not these arguments"})
            else:
                send(id=message["id"], result=result)
    while mode == "stubborn":
        time.sleep(1)


if __name__ == "__main__":
    main(sys.argv[1])
