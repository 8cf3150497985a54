r"""Builds prompts: the templates, and the descriptions of tools that they hold.

A template's `{tools}` becomes the protocol's description of the tools, its `{question}` the task's question.
Templates are raw strings, and the names in braces are replaced as plain text, so all other braces and
backslashes (`\boxed{...}`) mean themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from pydantic import BaseModel

from at2po_env.data.tasks import Task
from at2po_env.errors import ConfigError

Prompt = str | Callable[[Task], str]

BOXED_PROMPT = r"""Answer the question step by step; use tools to find what you do not know.
Think first in every turn, between <think> and </think>. Then either call a tool or give the final answer.
{tools}
At most {calls} calls are possible. When you know the answer, write it as short as possible, in this form:
<think> why this is the answer </think>
<answer> The final answer is \boxed{answer here} </answer>

Question: {question}
"""

TAG_PROMPT = r"""Answer the question below.
Reason between <think> and </think> first, each time you get new information. Then call a tool or answer.
{tools}
At most {calls} calls are possible. If you need no more knowledge, give the answer between <answer> and
</answer>, without explanation. For example, <answer> Beijing </answer>.

Question: {question}
"""

SHORT_PROMPT = "Question: {question}\n"

PROMPTS = {"boxed": BOXED_PROMPT, "tag": TAG_PROMPT, "structured": TAG_PROMPT, "short": SHORT_PROMPT}


def make_prompt(prompt: Prompt, *, tools: str, calls: int) -> Callable[[Task], str]:
    """Make the function from a task to its prompt.

    Args:
        prompt: A name of `PROMPTS`, a template that holds `{question}`, or the function itself.
        tools: Replaces `{tools}`.
        calls: Replaces `{calls}`.

    Raises:
        ConfigError: The template has no `{question}`.
    """
    if callable(prompt):
        return prompt
    template = PROMPTS.get(prompt, prompt).replace("{tools}", tools).replace("{calls}", str(calls))
    head, found, tail = template.partition("{question}")
    if not found:
        raise ConfigError(
            f"prompt {prompt[:60]!r} holds no {{question}}: expected a template with {{question}}, and "
            f"{{tools}} for the tools' description, or one of the names {', '.join(PROMPTS)}"
        )
    return lambda task: f"{head}{task.question}{tail}"


class ToolSpec(Protocol):
    """The properties of a tool that prompts and protocols read."""

    name: str
    description: str
    Arguments: type[BaseModel]


def text_field(model: type[BaseModel]) -> str | None:
    """Return the field that plain text fills: the only one, or the only required one."""
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    if len(fields) == 1:
        return next(iter(fields))
    required = [name for name, field in fields.items() if field.is_required()]
    return required[0] if len(required) == 1 else None


def function_schema(tool: ToolSpec) -> dict[str, Any]:
    """Describe a tool as chat endpoints do: `{"type": "function", "function": {...}}`.

    The JSON schema of the arguments has no titles, which would only cost tokens.
    """
    parameters = tool.Arguments.model_json_schema()
    parameters.pop("title", None)
    parameters.pop("description", None)
    for field in parameters.get("properties", {}).values():
        field.pop("title", None)
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


def argument_lines(model: type[BaseModel]) -> dict[str, str]:
    """Describe each argument: field -> `(type, optional): description`."""
    schema = model.model_json_schema()
    required = schema.get("required", [])
    lines = {}
    for name, field in schema.get("properties", {}).items():
        optional = "" if name in required else ", optional"
        described = f": {field['description']}" if "description" in field else ""
        lines[name] = f"({_type_name(field)}{optional}){described}"
    return lines


def _type_name(field: Any) -> str:
    if not isinstance(field, Mapping):  # JSON Schema also knows true, which allows everything
        return "object"
    if "enum" in field:
        return " | ".join(json.dumps(value, ensure_ascii=False) for value in field["enum"])
    if isinstance(field.get("anyOf"), list):
        return " | ".join(_type_name(option) for option in field["anyOf"])
    if field.get("type") == "array" and "items" in field:
        return f"list of {_type_name(field['items'])}"
    return str(field.get("type", "object"))


def example_arguments(model: type[BaseModel]) -> dict[str, Any]:
    """Make arguments for a trial call: the required fields, filled by their types."""
    values = {"string": "example", "integer": 1, "number": 1.0, "boolean": True, "array": [], "object": {}}
    schema = model.model_json_schema()
    fields = schema.get("properties", {})
    return {name: values.get(str(fields[name].get("type")), "example") for name in schema.get("required", [])}
