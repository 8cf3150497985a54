"""Environment ids: the shipped ones, tool environments of users, plug-ins of third parties.

Importing `at2po_env` registers everything; nothing is built, opened or read before `gymnasium.make`. Specs
hold string entry points and plain arguments, so they go through JSON.

A third party names a function in the entry-point group "at2po.envs" of its distribution; it is called once,
when `at2po_env` is imported, and registers its ids:

    [project.entry-points."at2po.envs"]
    my_envs = "my_package.registration:register"

A plug-in that fails is reported by a warning that names it; it breaks nothing else.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium

from at2po_env.data.sources import Tasks, as_tasks
from at2po_env.errors import EnvError
from at2po_env.tool_env import Reward, ToolEnv
from at2po_env.tools.base import Tool
from at2po_env.tools.function import as_tool

PLUGIN_GROUP = "at2po.envs"
SEARCH_QA = (
    "HotpotQA",
    "2WikiMultihopQA",
    "MuSiQue",
    "Bamboogle",
    "NaturalQuestions",
    "TriviaQA",
    "PopQA",
    "MiniWiki",
)

_recipes: dict[str, dict[str, Any]] = {}


class PluginWarning(UserWarning):
    """A plug-in of the group "at2po.envs" could not be loaded."""


def register_tool_env(
    id: str,
    *,
    tools: Sequence[Tool | Callable[..., Any]],
    tasks: Tasks,
    reward: Reward = "tag",
    **options: Any,
) -> None:
    """Register a tool environment, for `gymnasium.make(id)` and `gymnasium.make_vec(id)`.

    Args:
        id: The id, e.g. "my/Shop-v0".
        tools: Tools, or plain typed functions: signature = schema, docstring = description.
        tasks: A list of dicts `{"question", "golden_answers"}`, a `TaskSource`, the path of a FlashRAG file,
            or a function that returns one of these; read at the first `make`.
        reward: A rule ("tag", "boxed", "structured") or a function of an `at2po_env.Ending`.
        **options: Further arguments of `ToolEnv` (protocol, prompt, max_turns, on_malformed); `make` may
            override them.

    Raises:
        ToolError, ConfigError: A tool or an option that cannot work.
    """
    recipe: dict[str, Any] = {
        "tools": [as_tool(tool) for tool in tools],
        "tasks": tasks,
        "reward": reward,
        **options,
    }
    ToolEnv(**{**recipe, "tasks": [{"question": "?"}]})  # say now, not at make, what cannot work
    gymnasium.register(
        id,
        entry_point="at2po_env.registry:make_tool_env",
        vector_entry_point="at2po_env.registry:make_tool_env_vector",
        kwargs={"recipe": id},
    )
    _recipes[id] = recipe


def make_tool_env(*, recipe: str, **options: Any) -> ToolEnv:
    """Build a registered tool environment.

    Raises:
        EnvError: It is not registered in this process.
    """
    if recipe not in _recipes:
        raise EnvError(
            f"the tool environment {recipe!r} is not registered in this process. Fix: import the module that "
            "calls register_tool_env first"
        )
    found = _recipes[recipe]
    found["tasks"] = as_tasks(found["tasks"])  # read once per process, shared by all its environments
    return ToolEnv(**{**found, **options})


def make_tool_env_vector(*, num_envs: int, recipe: str, **options: Any) -> Any:
    """Build many, stepped concurrently."""
    from at2po_env.vector import TextVectorEnv

    return TextVectorEnv([lambda: make_tool_env(recipe=recipe, **options)] * num_envs)


def register_shipped() -> None:
    """Register the ids of the environments that ship with at2po."""
    for name in SEARCH_QA:
        gymnasium.register(
            f"at2po/{name}-v0",
            entry_point="at2po_envs.search_qa:make",
            vector_entry_point="at2po_envs.search_qa:make_vector",
            kwargs={"name": name},
        )


def load_plugins() -> None:
    """Call every entry point of the group "at2po.envs"; one that fails becomes a `PluginWarning`."""
    for point in importlib.metadata.entry_points(group=PLUGIN_GROUP):
        try:
            loaded = point.load()
            if callable(loaded):
                loaded()
        except Exception as error:  # noqa: BLE001 - third-party code: whatever it raises must not break the import
            distribution = point.dist.name if point.dist is not None else "unknown"
            warnings.warn(
                f"the plug-in {point.name!r} ({point.value}) of {distribution!r} could not be loaded: "
                f"{type(error).__name__}: {error}. Its environments are missing",
                PluginWarning,
                stacklevel=2,
            )
