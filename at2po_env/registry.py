"""Registers environment ids: the shipped ones, tool environments of users, plug-ins of third parties.

Importing `at2po_env` registers everything; nothing is built, opened or read before `gymnasium.make`. Specs
hold string entry points and plain arguments, so they go through JSON.

A third party names a function in the entry-point group "at2po.envs" of its distribution; it is called once,
when `at2po_env` is imported, and registers its ids:

    [project.entry-points."at2po.envs"]
    my_envs = "my_package.registration:register"

A plug-in that fails is reported by a warning that names it; it breaks nothing else.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import gymnasium

from at2po_env.data.qa import Tasks, as_tasks
from at2po_env.episodes.tool_env import Reward, ToolEnv
from at2po_env.errors import ConfigError, EnvError
from at2po_env.tools.base import Tool
from at2po_env.tools.function import as_tool
from at2po_env.vector import TextVectorEnv, make_vector

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
WORLDS = {"Household": "at2po_envs.household", "WebShop": "at2po_envs.webshop"}
"""Worlds that are played by commands, and where each is made."""

REMOTE_ID = "at2po/Remote-v0"
"""Whatever a server of `at2po serve-env` plays; needs `url=`."""

NO_WRAPPERS: Mapping[str, Any] = {"order_enforce": False, "disable_env_checker": True}
"""A `ToolEnv` refuses a step before reset itself, and its contract tests run Gymnasium's checker in full; the
two wrappers that `make` would add cost 6% of a step. `make(id, disable_env_checker=False)` adds one."""

_recipes: dict[str, dict[str, Any]] = {}
_loading_plugins = False


class PluginWarning(UserWarning):
    """A plug-in of the group "at2po.envs" could not be loaded."""


def register_tool_env(
    id: str,
    *,
    tools: Sequence[Tool | Callable[..., Any]],
    tasks: Tasks | Mapping[str, Tasks],
    reward: Reward = "tag",
    **options: Any,
) -> None:
    """Register a tool environment, for `gymnasium.make(id)` and `gymnasium.make_vec(id)`.

    Called at the top level of an importable module, or by a plug-in, the spec goes through JSON and works in
    other processes; called in a function or a script, it holds for this process.

    Args:
        id: The id, e.g. "my/Shop-v0".
        tools: Tools, or plain typed functions: signature = schema, docstring = description.
        tasks: A list of dicts `{"question", "golden_answers"}`, a `TaskSource`, the path of a FlashRAG file,
            or a function that returns one of these; read at the first `make`. Or a mapping from the names of
            splits to any of these: `make(id, split=NAME)` takes one, by default the first. A run trains on
            that one and evaluates on "test", else "dev", else the last.
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
    if isinstance(tasks, Mapping) and not (tasks and all(isinstance(name, str) for name in tasks)):
        raise ConfigError(f"tasks of {id!r}: expected names of splits with their tasks, got {tasks!r:.200}")
    ToolEnv(**{**recipe, "tasks": [{"question": "?"}]})  # so that errors are raised now and not at make
    home = _home(sys._getframe(1))
    if home is None:
        # No other process can repeat this registration, so the spec must not claim to be portable.
        entry: Any = functools.partial(make_tool_env, recipe=id)
        vector: Any = functools.partial(make_vector, entry)
        gymnasium.register(id, entry_point=entry, vector_entry_point=vector, **NO_WRAPPERS)
    else:
        gymnasium.register(
            id,
            entry_point="at2po_env.registry:make_tool_env",
            vector_entry_point="at2po_env.registry:make_tool_env_vector",
            kwargs={"recipe": id, "module": home},
            **NO_WRAPPERS,
        )
    _recipes[id] = {**recipe, "splits": dict(tasks) if isinstance(tasks, Mapping) else {None: tasks}}


def _home(caller: FrameType) -> str | None:
    """Return the module whose import repeats a registration made by `caller`, if there is one."""
    if _loading_plugins:
        return __name__
    name = caller.f_globals.get("__name__", "__main__")
    if caller.f_code.co_name != "<module>" or name == "__main__":
        return None
    return name if getattr(sys.modules.get(name), "__spec__", None) is not None else None


def make_tool_env(
    *, recipe: str, module: str | None = None, split: str | None = None, **options: Any
) -> ToolEnv:
    """Build a registered tool environment.

    Args:
        recipe: Its id.
        module: The module that registers it; it is imported if the recipe is not there yet.
        split: One of the splits that it was registered with; None takes the first.
        **options: Arguments of `ToolEnv` over those registered.

    Raises:
        EnvError: It is not registered in this process.
        ConfigError: It has no such split.
    """
    if recipe not in _recipes and module is not None:
        importlib.import_module(module)
    if recipe not in _recipes:
        raise EnvError(
            f"the tool environment {recipe!r} is not registered in this process. Fix: import the module that "
            "calls register_tool_env first"
        )
    found = _recipes[recipe]
    splits: dict[str | None, Any] = found[
        "splits"
    ]  # tasks are read once per process, for all its environments
    name = next(iter(splits)) if split is None else split
    if name not in splits:
        known = (
            ", ".join(map(repr, splits)) if None not in splits else "none: its tasks were given as one list"
        )
        raise ConfigError(f"{recipe!r} has no split {split!r}. It has {known}")
    splits[name] = as_tasks(splits[name])
    arguments = {key: value for key, value in found.items() if key != "splits"}
    env = ToolEnv(**{**arguments, "tasks": splits[name], **options})
    env.splits = tuple(one for one in splits if one is not None)
    return env


def make_tool_env_vector(**options: Any) -> TextVectorEnv:
    """Build many of a registered tool environment; see `vector.make_vector`."""
    return make_vector(make_tool_env, **options)


def register_shipped() -> None:
    """Register the ids of the environments that ship with at2po."""
    shipped: dict[str, tuple[str, dict[str, Any]]] = {
        **{name: ("at2po_envs.search_qa", {"name": name}) for name in SEARCH_QA},
        **{name: (module, {}) for name, module in WORLDS.items()},
    }
    for name, (module, arguments) in shipped.items():
        env_id = f"at2po/{name}-v0"
        if env_id in gymnasium.registry:  # the package was reloaded
            continue
        gymnasium.register(
            env_id,
            entry_point=f"{module}:make",
            vector_entry_point=f"{module}:make_vector",
            kwargs=arguments,
            **NO_WRAPPERS,
        )
    if REMOTE_ID not in gymnasium.registry:
        gymnasium.register(
            REMOTE_ID,
            entry_point="at2po_env.serving.client:RemoteEnv",
            vector_entry_point="at2po_env.serving.client:make_remote_vector",
            **NO_WRAPPERS,
        )


def load_plugins() -> None:
    """Call every entry point of the group "at2po.envs"; one that fails becomes a `PluginWarning`."""
    global _loading_plugins
    _loading_plugins = True
    try:
        for point in importlib.metadata.entry_points(group=PLUGIN_GROUP):
            try:
                loaded = point.load()
                if callable(loaded):
                    loaded()
            except Exception as error:  # noqa: BLE001 - third-party code must not break the import
                distribution = point.dist.name if point.dist is not None else "unknown"
                warnings.warn(
                    f"the plug-in {point.name!r} ({point.value}) of {distribution!r} could not be loaded: "
                    f"{type(error).__name__}: {error}. Its environments are missing",
                    PluginWarning,
                    stacklevel=2,
                )
    finally:
        _loading_plugins = False
