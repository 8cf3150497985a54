"""Makes tools from plain typed functions."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, overload

from pydantic import BaseModel, ConfigDict, Field, create_model
from pydantic.errors import PydanticUserError

from at2po_env.data.tasks import Task
from at2po_env.errors import ToolError
from at2po_env.tools.base import Tool, ToolContext

_PREFIX = "argument_"  # lets an argument be called `json`, `copy` or `_x`, which pydantic fields may not be


class FunctionTool(Tool):
    """A typed function as a tool; see `tool`."""

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        description: str | None = None,
        timeout_s: float | None = None,
        retries: int = 0,
        state: Any = None,
    ) -> None:
        label = getattr(function, "__name__", type(function).__name__)
        if inspect.iscoroutinefunction(function):
            raise ToolError(
                f"tool {label!r} is asynchronous; write a plain function (it may block: set timeout_s)"
            )
        self.function = function
        self.name = name or label
        doc = inspect.getdoc(function) or ""
        self.description = description or " ".join(doc.strip().split("\n\n")[0].split())
        if not self.description:
            raise ToolError(f"tool {self.name!r} has no description: write a docstring or pass description=")
        self.timeout_s, self.retries = timeout_s, retries
        self._state = state
        self._context_name, self._names, self.Arguments = _model(self.name, function, doc)

    def start(self, task: Task) -> Any:
        """Return the declared initial state, or call it with the task where it is a function."""
        return self._state(task) if callable(self._state) else self._state

    def run(self, arguments: Any, context: ToolContext) -> Any:
        """Call the function with the validated arguments, and with the context where it asks for one."""
        values = {name: getattr(arguments, _PREFIX + name) for name in self._names}
        if self._context_name is not None:
            values[self._context_name] = context
        return self.function(**values)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function itself, so that a decorated function stays callable."""
        return self.function(*args, **kwargs)


@overload
def tool(function: Callable[..., Any], /) -> FunctionTool: ...


@overload
def tool(
    *,
    name: str | None = None,
    description: str | None = None,
    timeout_s: float | None = None,
    retries: int = 0,
    state: Any = None,
) -> Callable[[Callable[..., Any]], FunctionTool]: ...


def tool(function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Make a tool from a typed function: the signature is the schema, the docstring the description.

    A parameter called `context`, or annotated with `ToolContext`, gets the call's context and is no argument.
    Any exception that the function raises is a failure of the tool: recorded and shown, never raised.

    Args:
        function: The function; every parameter needs a type.
        **options: name, description, timeout_s, retries, and state: the state at the start of an episode, or
            a function of the task that gives it.

    Raises:
        ToolError: A signature that cannot be a tool, with the reason.

    Example:
        >>> @tool(retries=1)
        ... def add(a: int, b: int = 1) -> int:
        ...     '''Add two numbers.'''
        ...     return a + b
        >>> add.name, add.description, add(2, 3)
        ('add', 'Add two numbers.', 5)
    """
    if function is not None:
        return FunctionTool(function)
    return lambda decorated: FunctionTool(decorated, **options)


def as_tool(value: Tool | Callable[..., Any]) -> Tool:
    """Return `value` if it is a tool, else the tool made from the function.

    Raises:
        ToolError: Neither, or not usable as a tool.
    """
    if isinstance(value, Tool):
        return value
    if callable(value) and not isinstance(value, type):
        return FunctionTool(value)
    raise ToolError(f"expected a Tool or a typed function, got {value!r}")


def _model(
    name: str, function: Callable[..., Any], doc: str
) -> tuple[str | None, tuple[str, ...], type[BaseModel]]:
    """Return the context parameter's name, the arguments' names, and the model of the arguments."""
    try:
        parameters = inspect.signature(function, eval_str=True).parameters
    except (NameError, TypeError, ValueError) as error:
        raise ToolError(f"tool {name!r}: its signature cannot be read: {error}") from error
    described = _described_arguments(doc)
    context_name: str | None = None
    fields: dict[str, Any] = {}
    for parameter in parameters.values():
        if parameter.annotation is ToolContext or parameter.name == "context":
            context_name = parameter.name
            continue
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ToolError(f"tool {name!r}: parameter {parameter} must be an ordinary, named one")
        if parameter.annotation is parameter.empty:
            raise ToolError(
                f"tool {name!r}: parameter {parameter.name!r} needs a type, e.g. {parameter.name}: str"
            )
        default = ... if parameter.default is parameter.empty else parameter.default
        field = Field(default, alias=parameter.name, description=described.get(parameter.name))
        fields[_PREFIX + parameter.name] = (parameter.annotation, field)
    try:
        model = create_model(name, __config__=ConfigDict(extra="forbid"), **fields)
        model.model_json_schema()
    except PydanticUserError as error:
        raise ToolError(f"tool {name!r}: an argument's type has no JSON schema: {error}") from error
    return context_name, tuple(key.removeprefix(_PREFIX) for key in fields), model


def _described_arguments(doc: str) -> Mapping[str, str]:
    """Read each argument's description from the Args section of a Google-style docstring."""
    _, _, section = doc.partition("\nArgs:\n")
    described: dict[str, str] = {}
    last = ""
    for line in section.splitlines():
        match = re.match(r" {2,4}(\w+)(?: \([^)]*\))?: *(.*)", line)
        if match:
            last = match[1]
            described[last] = match[2]
        elif line.startswith("  ") and line.strip() and last:
            described[last] += " " + line.strip()
        elif line and not line.startswith(" "):
            break
    return described
