"""Copies the wrappers of a stack into a twin, keeps their state, and puts it back.

Each attribute of a wrapper is copied by value (`capture`). A wrapper class can say more about its attributes:

- `fork_config = ("name", ...)` names configuration, which forks share and `restore` leaves alone;
- with `get_state` and `set_state` it says itself what a snapshot keeps (`wrapper_state`).

Most attributes are scalars, and nothing has to be done for them; the memo that keeps aliases aliases is only
built for a stack that holds something else.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import gymnasium
from gymnasium.wrappers import PassiveEnvChecker

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
OWN_STATE = "get_state()"
"""Stands in the place of an attribute's name where a wrapper says itself what its state is."""


class LayerRef:
    """Stands for one layer of a stack inside captured state."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


LAYERS = tuple(LayerRef(index) for index in range(64))


class Rules(NamedTuple):
    """How the attributes of one wrapper class are treated."""

    config: frozenset[str]
    slots: tuple[str, ...]
    own_state: bool


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
        config, slots = set(BASE_CONFIG), list[str]()
        for base in kind.__mro__:
            config.update(KNOWN_CONFIG.get(base, ()), vars(base).get("fork_config", ()))
            declared = vars(base).get("__slots__", ())
            names = [declared] if isinstance(declared, str) else declared
            slots.extend([name for name in names if name not in ("__dict__", "__weakref__")])
        own_state = hasattr(kind, "get_state") and hasattr(kind, "set_state")
        rules = _RULES[kind] = Rules(frozenset(config), tuple(slots), own_state)
    return rules


def name_of(kind: Any) -> str:
    """Return `module:qualname` of a class."""
    return f"{kind.__module__}:{kind.__qualname__}"


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
        config, slots, _ = _RULES.get(kind) or rules_of(kind)
        held = wrapper.__dict__
        twin = kind.__new__(kind)
        attributes = twin.__dict__
        attributes.update(held)
        attributes["env"] = child
        for name, value in held.items():
            if type(value) not in ATOMIC and name not in config:
                pending.append((attributes, name, value, kind))
        slotted = slotted or slots != ()
        twins.append(twin)
        child = twin
    if pending or slotted:
        memo = _memo_of([base, *reversed(wrappers)], twins)
        _copy_pending(pending, memo, spaces=True)
        if slotted:
            for wrapper, twin in zip(wrappers, twins[:0:-1], strict=True):
                for name in rules_of(type(wrapper)).slots:
                    if hasattr(wrapper, name):
                        setattr(twin, name, _copy(type(wrapper), name, getattr(wrapper, name), memo))
    return child


def capture_layers(wrappers: Sequence[Layer], base: Any) -> list[CapturedLayer]:
    """Return copies of all that is state, outermost wrapper first."""
    pending: Pending = []
    captured = []
    for wrapper in wrappers:
        kind = type(wrapper)
        config, slots, own_state = _RULES.get(kind) or rules_of(kind)
        held = wrapper.__dict__
        size = len(held)
        if own_state:
            held, size = {OWN_STATE: wrapper.get_state()}, -1  # type: ignore[attr-defined]
        elif slots:
            held = {**held, **{name: getattr(wrapper, name) for name in slots if hasattr(wrapper, name)}}
            size = -1
        values = {}
        names = []
        for name, value in held.items():
            if name not in config and name not in SPACES:
                values[name] = value
                if type(value) not in ATOMIC:
                    names.append(name)
                    pending.append((values, name, value, kind))
        captured.append(CapturedLayer(kind, values, names, size))
    if pending:
        _copy_pending(pending, _memo_of([*wrappers, base], LAYERS))
    return captured


def restore_layers(wrappers: Sequence[Layer], base: Any, captured: Sequence[CapturedLayer]) -> None:
    """Give every wrapper exactly its captured attributes; attributes gained since are dropped."""
    memo = None
    for wrapper, (kind, values, names, size) in zip(wrappers, captured, strict=True):
        if names:
            memo = _memo_of(LAYERS, [*wrappers, base]) if memo is None else memo
            values = dict(values)
            _copy_pending([(values, name, values[name], kind) for name in names], memo)
        config, slots, own_state = _RULES[kind]
        if own_state:
            wrapper.set_state(values[OWN_STATE])  # type: ignore[attr-defined]
            continue
        attributes = wrapper.__dict__
        before = len(attributes)
        attributes.update(values)
        if before != size or len(attributes) != size:
            for name in [*attributes]:
                if name in slots:
                    del attributes[name]
                    setattr(wrapper, name, values[name])
                elif name not in values and name not in config and name not in SPACES:
                    del attributes[name]
        if kind is PassiveEnvChecker:
            settle_checker(wrapper)


def settle_checker(wrapper: Layer) -> None:
    """Let Gymnasium's checker step an episode that it has not seen begin."""
    if wrapper.__dict__.get("_previous_data", ()) is None:
        wrapper.__dict__["_previous_data"] = (None, {})  # its first step compares with this


def _memo_of(old: Sequence[Any], new: Sequence[Any]) -> Memo:
    """Return a memo that sends each old layer to the new one."""
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
        raise SnapshotError(
            f"{kind.__name__}.{name} holds a {name_of(type(error.value))}, which cannot be copied "
            f"({error.why}). Fix: keep it out of the wrapper, or let forks share it as configuration: "
            f'class {kind.__name__}: fork_config = ("{name}",)'
        ) from error
    except RecursionError as error:
        raise SnapshotError(
            f"{kind.__name__}.{name} is nested too deeply to be copied. Fix: keep a flat list"
        ) from error
