"""The wrappers of a stack, each as named values: copied into a twin, kept in a snapshot, put back.

A wrapper class can say more about its attributes than their types do:

- `fork_config = ("name", ...)`: configuration, shared by forks and left alone by `restore`;
- `fork_volatile = ("name", ...)`: state that does not count when digests are compared, such as clocks.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import gymnasium
from gymnasium.wrappers import PassiveEnvChecker, RecordEpisodeStatistics

from at2po_env.capture import ATOMIC, UncapturableError, clone_space, copy_value
from at2po_env.errors import SnapshotError

Memo = dict[int, Any]
Layer = gymnasium.Wrapper[Any, Any, Any, Any]

SPACES = frozenset({"_action_space", "_observation_space"})
BASE_CONFIG = frozenset({"env", "_metadata", "_cached_spec", "_saved_kwargs"})
KNOWN_CONFIG: dict[type, tuple[str, ...]] = {
    PassiveEnvChecker: (
        *("checked_reset", "checked_step", "checked_render", "close_called", "checked_data_reuse"),
        "_previous_data",
    ),
}
KNOWN_VOLATILE: dict[type, tuple[str, ...]] = {
    RecordEpisodeStatistics: ("episode_start_time", "time_queue"),
}


class Rules(NamedTuple):
    """How the attributes of one wrapper class are treated."""

    config: frozenset[str]
    volatile: frozenset[str]
    slots: tuple[str, ...]


_RULES: dict[type, Rules] = {}


def rules_of(kind: type) -> Rules:
    """Collect the rules of a wrapper class and its bases, once."""
    rules = _RULES.get(kind)
    if rules is None:
        config, volatile, slots = set(BASE_CONFIG), set[str](), list[str]()
        for base in kind.__mro__:
            config.update(KNOWN_CONFIG.get(base, ()), vars(base).get("fork_config", ()))
            volatile.update(KNOWN_VOLATILE.get(base, ()), vars(base).get("fork_volatile", ()))
            slots.extend(_slots(vars(base).get("__slots__", ())))
        rules = _RULES[kind] = Rules(frozenset(config), frozenset(volatile), tuple(slots))
    return rules


def _slots(declared: str | Iterable[str]) -> list[str]:
    names = [declared] if isinstance(declared, str) else list(declared)
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def memo_of(old: Sequence[Any], new: Sequence[Any]) -> Memo:
    """A memo that sends each old layer to the new one."""
    return dict(zip(map(id, old), new, strict=False))


def copy_layer(old: Layer, new: Layer, child: Any, memo: Memo) -> None:
    """Fill `new`, an empty instance of the same class, with the state of `old` around `child`."""
    attributes = new.__dict__
    attributes.update(old.__dict__)
    attributes["env"] = child
    rules = rules_of(type(old))
    late = []
    for name, value in old.__dict__.items():
        kind = type(value)
        if kind in ATOMIC or name in rules.config:
            continue
        if name in SPACES:
            attributes[name] = memo.get(id(value)) or memo.setdefault(id(value), clone_space(value))
        elif kind is types.FunctionType:
            late.append(name)
        else:
            attributes[name] = _copy(old, name, value, memo)
    for name in late:  # after the state that a function may close over
        attributes[name] = _copy(old, name, attributes[name], memo)
    for name in rules.slots:
        if hasattr(old, name):
            setattr(new, name, _copy(old, name, getattr(old, name), memo))


def capture_layer(layer: Layer, memo: Memo) -> dict[str, Any]:
    """Return copies of all that is not configuration."""
    rules = rules_of(type(layer))
    held = layer.__dict__
    if rules.slots:
        held = {**held, **{name: getattr(layer, name) for name in rules.slots if hasattr(layer, name)}}
    found: dict[str, Any] = {}
    late = []
    for name, value in held.items():
        if name in rules.config or name in SPACES:
            continue
        kind = type(value)
        if kind in ATOMIC:
            found[name] = value
        elif kind is types.FunctionType:
            late.append(name)
        else:
            found[name] = _copy(layer, name, value, memo)
    for name in late:
        found[name] = _copy(layer, name, held[name], memo)
    return found


def restore_layer(layer: Layer, values: dict[str, Any]) -> None:
    """Give a wrapper exactly the captured attributes; what it has gained since is dropped."""
    rules = rules_of(type(layer))
    attributes = layer.__dict__
    for name in [*attributes]:
        if name not in values and name not in rules.config and name not in SPACES:
            del attributes[name]
    if rules.slots:
        for name in rules.slots:
            if name in values:
                setattr(layer, name, values[name])
        values = {name: value for name, value in values.items() if name not in rules.slots}
    attributes.update(values)
    if type(layer) is PassiveEnvChecker and attributes.get("_previous_data", ()) is None:
        attributes["_previous_data"] = (None, {})  # never reset: its first step compares with this


def thaw_layer(values: dict[str, Any], memo: Memo) -> dict[str, Any]:
    """Copy captured values for one use: a snapshot may be restored many times."""
    found = {}
    late = []
    for name, value in values.items():
        if type(value) is types.FunctionType:
            late.append(name)
        else:
            found[name] = value if type(value) in ATOMIC else copy_value(value, memo)
    for name in late:
        found[name] = copy_value(values[name], memo)
    return found


def _copy(layer: Layer, name: str, value: Any, memo: Memo) -> Any:
    try:
        return copy_value(value, memo)
    except UncapturableError as error:
        wrapper, held = type(layer).__name__, type(error.value)
        raise SnapshotError(
            f"{wrapper}.{name} holds a {held.__module__}.{held.__qualname__}, which cannot be "
            f"copied ({error.why}). Fix: keep it out of the wrapper, or let forks share it as configuration: "
            f'class {wrapper}: fork_config = ("{name}",)'
        ) from error
    except RecursionError as error:
        raise SnapshotError(
            f"{type(layer).__name__}.{name} is nested too deeply to be copied. Fix: keep a flat list"
        ) from error
