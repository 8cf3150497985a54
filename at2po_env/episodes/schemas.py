"""What a prompt says about a tool's arguments, read from their pydantic model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol

from pydantic import BaseModel


class Described(Protocol):
    """What a schema has to know of a tool."""

    name: str
    description: str
    Arguments: type[BaseModel]


def text_field(model: type[BaseModel]) -> str | None:
    """The field that a plain string fills: the only one, or the only required one."""
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    if len(fields) == 1:
        return next(iter(fields))
    required = [name for name, field in fields.items() if field.is_required()]
    return required[0] if len(required) == 1 else None


def bare_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema without titles, which only cost tokens."""
    schema = model.model_json_schema()
    schema.pop("title", None)
    schema.pop("description", None)
    for field in schema.get("properties", {}).values():
        field.pop("title", None)
    return schema


def function_schema(tool: Described) -> dict[str, Any]:
    """A tool as chat endpoints take it: `{"type": "function", "function": {...}}`, arguments by schema."""
    parameters = bare_schema(tool.Arguments)
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


def argument_lines(model: type[BaseModel]) -> dict[str, str]:
    """Field -> `(type, optional): description`."""
    schema = model.model_json_schema()
    required = schema.get("required", [])
    lines = {}
    for name, field in schema.get("properties", {}).items():
        optional = "" if name in required else ", optional"
        described = f": {field['description']}" if "description" in field else ""
        lines[name] = f"({_type_name(field)}{optional}){described}"
    return lines


def _type_name(field: Mapping[str, Any]) -> str:
    if "enum" in field:
        return " | ".join(json.dumps(value, ensure_ascii=False) for value in field["enum"])
    if "anyOf" in field:
        return " | ".join(_type_name(option) for option in field["anyOf"])
    if field.get("type") == "array" and "items" in field:
        return f"list of {_type_name(field['items'])}"
    return str(field.get("type", "object"))


def example_arguments(model: type[BaseModel]) -> dict[str, Any]:
    """Arguments for a trial call: the required fields, filled by their types."""
    values = {"string": "example", "integer": 1, "number": 1.0, "boolean": True, "array": [], "object": {}}
    schema = model.model_json_schema()
    fields = schema.get("properties", {})
    return {name: values.get(str(fields[name].get("type")), "example") for name in schema.get("required", [])}
