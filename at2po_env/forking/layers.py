"""The wrappers of a stack, each as named values: copied into a twin, kept in a snapshot, put back.

A wrapper class can say more about its attributes than their types do:

- `fork_config = ("name", ...)`: configuration, shared by forks and left alone by `restore`;
- `fork_volatile = ("name", ...)`: state that does not count when digests are compared, such as clocks.

Most attributes are scalars, and nothing has to be done for them; the memo that keeps aliases aliases is only
built for a stack that holds something else.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import gymnasium
from gymnasium.wrappers import PassiveEnvChecker, RecordEpisodeStatistics

from at2po_env.errors import SnapshotError
from at2po_env.forking.capture import ATOMIC, Memo, UncapturableError, clone_space, copy_value

Layer = gymnasium.Wrapper[Any, Any, Any, Any]
Pending = list[tuple[dict[str, Any], str, Any, type]]

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


class LayerRef:
    """Stands for the n-th layer of a stack, outermost first, inside captured state."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


LAYERS = tuple(LayerRef(index) for index in range(64))


class Rules(NamedTuple):
    """How the attributes of one wrapper class are treated."""

    config: frozenset[str]
    volatile: frozenset[str]
    slots: tuple[str, ...]


class CapturedLayer(NamedTuple):
    """The state of one wrapper.

    Attributes:
        kind: Class of the wrapper.
        values: Attribute -> value; what is not atomic is a private copy.
        complex_names: Attributes whose values have to be copied again at every restore.
        size: Number of attributes the wrapper had, configuration included; -1 if unknown.
    """

    kind: type
    values: dict[str, Any]
    complex_names: Sequence[str]
    size: int


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


def fork_layers(wrappers: Sequence[Layer], base: Any, child: Any) -> Any:
    """Return the same stack around `child`, with its own state.

    Args:
        wrappers: The old wrappers, outermost first.
        base: The old environment under them.
        child: The new environment under the new ones.
    """
    pending: Pending = []
    slotted = False
    twins: list[Any] = [child]
    for wrapper in reversed(wrappers):
        kind = type(wrapper)
        rules = _RULES.get(kind) or rules_of(kind)
        config = rules.config
        held = wrapper.__dict__
        twin = kind.__new__(kind)
        attributes = twin.__dict__
        attributes.update(held)
        attributes["env"] = child
        for name, value in held.items():
            if type(value) not in ATOMIC and name not in config:
                pending.append((attributes, name, value, kind))
        slotted = slotted or rules.slots != ()
        twins.append(twin)
        child = twin
    if pending or slotted:
        memo = memo_of([base, *reversed(wrappers)], twins)
        _copy_pending(pending, memo, spaces=True)
        if slotted:
            _copy_slots(wrappers, twins[:0:-1], memo)
    return child


def _copy_slots(wrappers: Sequence[Layer], twins: Sequence[Layer], memo: Memo) -> None:
    for wrapper, twin in zip(wrappers, twins, strict=True):
        for name in rules_of(type(wrapper)).slots:
            if hasattr(wrapper, name):
                setattr(twin, name, _copy(type(wrapper), name, getattr(wrapper, name), memo))


def capture_layers(wrappers: Sequence[Layer], base: Any) -> list[CapturedLayer]:
    """Return copies of all that is state, outermost wrapper first."""
    pending: Pending = []
    captured = []
    for wrapper in wrappers:
        kind = type(wrapper)
        config, _, slots = _RULES.get(kind) or rules_of(kind)
        held = wrapper.__dict__
        if slots:
            held = {**held, **{name: getattr(wrapper, name) for name in slots if hasattr(wrapper, name)}}
        values = {}
        names = []
        for name, value in held.items():
            if name not in config and name not in SPACES:
                values[name] = value
                if type(value) not in ATOMIC:
                    names.append(name)
                    pending.append((values, name, value, kind))
        captured.append(CapturedLayer(kind, values, names, -1 if slots else len(held)))
    if pending:
        _copy_pending(pending, memo_of([*wrappers, base], LAYERS))
    return captured


def restore_layers(wrappers: Sequence[Layer], base: Any, captured: Sequence[CapturedLayer]) -> None:
    """Give every wrapper exactly its captured attributes; what it has gained since is dropped."""
    memo = None
    for wrapper, (kind, values, names, size) in zip(wrappers, captured, strict=True):
        if names:
            memo = memo_of(LAYERS, [*wrappers, base]) if memo is None else memo
            values = dict(values)
            _copy_pending([(values, name, values[name], kind) for name in names], memo)
        attributes = wrapper.__dict__
        before = len(attributes)
        attributes.update(values)
        if before != size or len(attributes) != size:
            _drop_gained(wrapper, values)
        if kind is PassiveEnvChecker and attributes.get("_previous_data", ()) is None:
            attributes["_previous_data"] = (None, {})  # never reset: its first step compares with this


def _drop_gained(wrapper: Layer, values: dict[str, Any]) -> None:
    config, _, slots = rules_of(type(wrapper))
    attributes = wrapper.__dict__
    for name in [*attributes]:
        if name in slots:
            del attributes[name]
            setattr(wrapper, name, values[name])
        elif name not in values and name not in config and name not in SPACES:
            del attributes[name]


def memo_of(old: Sequence[Any], new: Sequence[Any]) -> Memo:
    """A memo that sends each old layer to the new one."""
    return dict(zip(map(id, old), new, strict=False))


def _copy_pending(pending: Pending, memo: Memo, *, spaces: bool = False) -> None:
    """Copy in place; functions last, after the state that they may close over."""
    for late in (False, True):
        for attributes, name, value, kind in pending:
            if (type(value) is types.FunctionType) is not late:
                continue
            if spaces and name in SPACES:
                attributes[name] = memo.get(id(value)) or memo.setdefault(id(value), clone_space(value))
            else:
                attributes[name] = _copy(kind, name, value, memo)


def _copy(kind: type, name: str, value: Any, memo: Memo) -> Any:
    try:
        return copy_value(value, memo)
    except UncapturableError as error:
        held = type(error.value)
        raise SnapshotError(
            f"{kind.__name__}.{name} holds a {held.__module__}.{held.__qualname__}, which cannot be copied "
            f"({error.why}). Fix: keep it out of the wrapper, or let forks share it as configuration: "
            f'class {kind.__name__}: fork_config = ("{name}",)'
        ) from error
    except RecursionError as error:
        raise SnapshotError(
            f"{kind.__name__}.{name} is nested too deeply to be copied. Fix: keep a flat list"
        ) from error
