"""The tools of an MCP server in the terms of an environment: schemas, arguments, and results as text.

Everything here comes from the server, so nothing of it is trusted: sizes are bounded, names and schemas are
checked before a prompt shows them, and anything but text is named instead of shown.
"""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, create_model

from at2po_env.errors import MissingExtraError, ToolError
from at2po_env.tools.base import UNCHANGED, Tool, ToolContext, ToolResult, encodable
from at2po_env.tools.mcp.sessions import Answer, Call, Record

try:
    import mcp_types
except ModuleNotFoundError as _error:
    raise MissingExtraError(f"{_error}. Fix: pip install 'at2po[mcp]'") from _error

if TYPE_CHECKING:
    from at2po_env.tools.mcp.server import McpServer

MAX_SCHEMA_CHARS = 64 * 1024
MAX_DESCRIPTION_CHARS = 4000
_TYPES: dict[str, Any] = {"string": str, "integer": int, "number": int | float, "boolean": bool}


class McpTool(Tool):
    """One tool of an MCP server; `McpServer.tools` makes it.

    The names, types and presence of the arguments are checked here, as for any tool; anything deeper in the
    schema is checked by the server, whose refusal is a failed call. The deadlines are the server's
    (`McpServer`), and a call needs no thread of its own.

    Args:
        server: The server.
        definition: What the server says about the tool.
        prefix: Put before its name.

    Attributes:
        writes: Whether a call may change the session, so that it is recorded and replayed for a fork.

    Raises:
        ToolError: The definition cannot be used.
    """

    failures: ClassVar[tuple[type[BaseException], ...]] = (ToolError,)

    def __init__(self, server: McpServer, definition: mcp_types.Tool, *, prefix: str = "") -> None:
        self.backend = server
        self.server = server
        self.remote_name = definition.name
        self.name = prefix + definition.name
        text = encodable(" ".join((definition.description or definition.title or definition.name).split()))
        self.description = text[:MAX_DESCRIPTION_CHARS]
        hints = definition.annotations
        read_only = hints is not None and hints.read_only_hint is True
        self.writes = server.records(read_only=read_only)
        self.Arguments = arguments_model(self.name, definition.input_schema)

    def run(self, arguments: BaseModel, context: ToolContext) -> ToolResult:
        """Call the server in the session that the episode's record describes."""
        record = read_record(context.state)
        try:
            given = json.dumps(
                arguments.model_dump(by_alias=True, exclude_unset=True),
                ensure_ascii=False,
                allow_nan=False,
                sort_keys=True,
            )
        except (ValueError, RecursionError) as error:
            raise ToolError(f"the arguments cannot be written as JSON: {error}") from error
        answer, after = self.server.call(self.remote_name, encodable(given), record, writes=self.writes)
        return ToolResult(shown(answer), UNCHANGED if after == record else after, answer.ok)


class _Arguments(BaseModel):
    """Arguments by a server's schema: our checks, the server's own words in prompts."""

    model_config = ConfigDict(extra="forbid")

    published: ClassVar[dict[str, Any]] = {}

    @classmethod
    def model_json_schema(cls, *_: Any, **__: Any) -> dict[str, Any]:
        """Return the server's schema."""
        return copy.deepcopy(cls.published)


class _OpenArguments(_Arguments):
    """Arguments that may have other names as well."""

    model_config = ConfigDict(extra="allow")


def arguments_model(name: str, schema: Any) -> type[BaseModel]:
    """Make the model of a tool's arguments from its JSON schema.

    Args:
        name: The tool's name, for messages.
        schema: A schema of an object. A property of a plain type gets that type, so that text that stands for
            a number becomes one; any other takes every JSON value.

    Raises:
        ToolError: It is no schema of an object, or too large.
    """
    try:
        if len(json.dumps(schema)) > MAX_SCHEMA_CHARS:
            raise ToolError(
                f"the MCP tool {name!r:.80}: its schema has more than {MAX_SCHEMA_CHARS:,} characters"
            )
        required, properties = schema.get("required", []), dict(schema.get("properties", {}))
        if schema.get("type") != "object" or not all(isinstance(key, str) for key in required):
            raise ValueError("expected an object with named properties")
        properties = {key: value if isinstance(value, dict) else {} for key, value in properties.items()}
        properties |= {key: {} for key in required if key not in properties}
        fields: dict[str, Any] = {}
        for number, (key, value) in enumerate(properties.items()):
            kind = value.get("type")
            default = ... if key in required else None
            annotation = _TYPES.get(kind, Any) if isinstance(kind, str) else Any
            fields[f"argument_{number}"] = (annotation, Field(default, alias=key))
        # Unlike JSON Schema we refuse unknown names unless the schema allows them: a slip is said at once.
        open_ended = schema.get("additionalProperties", not properties) or "patternProperties" in schema
        base: type[_Arguments] = _OpenArguments if open_ended else _Arguments
        model: type[_Arguments] = create_model("Arguments", __base__=base, **fields)
        model.published = {**schema, "properties": properties, "required": list(required)}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ToolError(f"the MCP tool {name!r:.80} has a schema that cannot be used: {error}") from error
    return model


def read_record(state: Any) -> Record:
    """Read the calls that an episode remembers.

    Raises:
        ToolError: The value is no such list (a snapshot from outside may hold anything).
    """
    if state is None:
        return ()
    try:
        record = tuple([Call(*call) for call in state])
        if not all(isinstance(part, str) for call in record for part in call):
            raise TypeError("a part is no text")
        if not all(isinstance(json.loads(call.arguments), dict) for call in record):
            raise TypeError("arguments are no JSON object")
    except (TypeError, ValueError, RecursionError) as error:
        raise ToolError(f"the episode's record of MCP calls is damaged: {error}") from error
    return record


def shown(answer: Answer) -> str:
    """Return a result as text; images, sounds and files are named in square brackets."""
    if isinstance(answer.result, str):
        return answer.result
    parts = []
    for block in answer.result.content:
        if isinstance(block, mcp_types.TextContent):
            parts.append(block.text)
        elif isinstance(block, mcp_types.EmbeddedResource):
            resource = block.resource
            if isinstance(resource, mcp_types.TextResourceContents):
                parts.append(resource.text)
            else:
                parts.append(_placeholder("file", resource.mime_type, resource.blob))
        elif isinstance(block, mcp_types.ResourceLink):
            parts.append(f"[link: {block.name[:200]}, {str(block.uri)[:500]}]")
        else:
            parts.append(_placeholder(block.type, block.mime_type, block.data))
    if not parts and answer.result.structured_content is not None:
        parts.append(json.dumps(answer.result.structured_content, ensure_ascii=False))
    return "\n".join(parts)


def _placeholder(kind: str, mime_type: str | None, data: str) -> str:
    return f"[{kind}: {(mime_type or 'unknown type')[:100]}, {len(data) * 3 // 4:,} bytes]"
