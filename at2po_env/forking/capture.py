"""Copies the state that a wrapper holds, and shares its configuration.

State is everything that can differ between two moments of an episode: scalars, containers, arrays, generators
and plain objects made of these. Configuration was decided when the stack was built: callables, specs, spaces
(whose samplers are nevertheless copied), and the attributes that a wrapper class names in `fork_config`.
Anything else (locks, sockets, open files, running generators) is refused.

A memo maps `id(old)` to the new object, as in `copy.deepcopy`, so that aliases stay aliases and a reference
to a layer of the old stack becomes one to the same layer of the new stack.
"""

from __future__ import annotations

import copy
import datetime
import decimal
import enum
import fractions
import functools
import logging
import operator
import pathlib
import random
import types
import uuid
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec

from at2po_env.forking.random_state import clone_rng

Memo = dict[int, Any]

ATOMIC: frozenset[type] = frozenset(
    {
        *(type(None), bool, int, float, complex, str, bytes, range, type(Ellipsis), type(NotImplemented)),
        *(datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone),
        *(decimal.Decimal, fractions.Fraction, uuid.UUID),
        *(pathlib.PosixPath, pathlib.WindowsPath, pathlib.PurePosixPath, pathlib.PureWindowsPath),
        *(np.bool_, np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64),
        *(np.float16, np.float32, np.float64, np.complex64, np.complex128, np.str_, np.bytes_),
        *{type(np.dtype(code)) for code in np.typecodes["All"]},
    }
)
CONFIG_TYPES = (
    *(types.ModuleType, EnvSpec, logging.Logger, functools.partial, np.ufunc, np.dtype),
    *(types.GetSetDescriptorType, types.MemberDescriptorType),
)
_MUTABLE_OWNERS = (np.random.Generator, np.random.RandomState, random.Random, list, dict, set, deque)


class UncapturableError(Exception):
    """A value is neither state that can be copied nor configuration; carries the path to it."""

    def __init__(self, value: object, why: str) -> None:
        super().__init__(why)
        self.value = value
        self.why = why


def is_config(value: object) -> bool:
    """Return True for what is configuration by its type: callables, modules, specs, loggers.

    A method of C code that is bound to a generator or a container is state, as its owner is: forks copy it.
    """
    if type(value) is types.BuiltinMethodType and isinstance(value.__self__, _MUTABLE_OWNERS):
        return False
    return callable(value) or isinstance(value, CONFIG_TYPES)


def copy_value(value: Any, memo: Memo) -> Any:
    """Copy state, share configuration.

    Args:
        value: Any value that a wrapper holds.
        memo: `id(old) -> new`; extended in place.

    Returns:
        A value that shares no mutable state with the old one.

    Raises:
        UncapturableError: If something inside is neither.
    """
    kind = type(value)
    if kind in ATOMIC:
        return value
    key = id(value)
    if key in memo:
        return memo[key]
    copier = _COPIERS.get(kind)
    if copier is None:
        copier = _COPIERS[kind] = _choose(kind)
    return copier(value, memo)


def clone_space(value: Any) -> Any:
    """Return a space of the same shape with a sampler of its own that continues alike.

    Bounds and other arrays are shared: they are never written. So is everything that holds no sampler, which
    makes the function fit for what stands inside a space, too.
    """
    if isinstance(value, gymnasium.Space):
        twin: Any = object.__new__(type(value))
        attributes = twin.__dict__
        attributes.update(value.__dict__)
        for name, item in attributes.items():
            if type(item) not in ATOMIC:  # a sampler, bounds, or spaces inside
                attributes[name] = clone_space(item)
        return twin
    if isinstance(value, np.random.Generator):
        return clone_rng(value)
    if isinstance(value, dict):
        return type(value)((key, clone_space(item)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)([clone_space(item) for item in value])
    return value


def _copy_list(value: list[Any], memo: Memo) -> Any:
    twin = memo[id(value)] = type(value).__new__(type(value))
    list.extend(twin, [copy_value(item, memo) for item in value])
    return _copy_attributes(value, twin, memo)


def _copy_tuple(value: tuple[Any, ...], memo: Memo) -> Any:
    items = [copy_value(item, memo) for item in value]
    if all(map(operator.is_, items, value)):
        return value
    return memo.setdefault(id(value), tuple.__new__(type(value), items))


def _copy_dict(value: dict[Any, Any], memo: Memo) -> Any:
    twin = memo[id(value)] = type(value).__new__(type(value))
    if isinstance(twin, defaultdict):
        twin.default_factory = copy_value(value.default_factory, memo)  # type: ignore[attr-defined]
    setter = OrderedDict.__setitem__ if isinstance(twin, OrderedDict) else dict.__setitem__
    for key, item in value.items():
        setter(twin, key, copy_value(item, memo))
    return _copy_attributes(value, twin, memo)


def _copy_set(value: set[Any], memo: Memo) -> Any:
    twin = memo[id(value)] = type(value).__new__(type(value))
    set.update(twin, value)
    return _copy_attributes(value, twin, memo)


def _copy_deque(value: deque[Any], memo: Memo) -> Any:
    twin = memo[id(value)] = type(value).__new__(type(value))
    deque.__init__(twin, [copy_value(item, memo) for item in value], value.maxlen)
    return _copy_attributes(value, twin, memo)


def _copy_array(value: Any, memo: Memo) -> Any:
    twin = memo[id(value)] = value.copy()
    if value.dtype.hasobject:
        flat, source = twin.reshape(-1), value.reshape(-1)
        for position in range(flat.size):
            flat[position] = copy_value(source[position], memo)
    return twin


def _copy_function(value: types.FunctionType, memo: Memo) -> Any:
    """Share a function, unless it closes over something that was copied: then it closes over the copy."""
    cells = value.__closure__
    if not cells:
        return value
    held = [_cell(cell) for cell in cells]
    contents = [memo.get(id(content), content) for content in held]
    if all(map(operator.is_, contents, held)):
        return value
    closure = tuple([types.CellType(content) for content in contents])
    twin = types.FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, closure)
    twin.__kwdefaults__ = value.__kwdefaults__
    twin.__dict__.update(value.__dict__)
    return memo.setdefault(id(value), twin)


def _cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a cell that was never filled
        return None


def _copy_method(value: types.MethodType, memo: Memo) -> Any:
    owner = memo.get(id(value.__self__))
    return value if owner is None else types.MethodType(value.__func__, owner)


def _copy_builtin(value: types.BuiltinMethodType, memo: Memo) -> Any:
    owner = value.__self__
    if isinstance(owner, _MUTABLE_OWNERS):
        return getattr(copy_value(owner, memo), value.__name__)
    return value


def _share(value: Any, memo: Memo) -> Any:  # noqa: ARG001  (one signature for all)
    return value


def _copy_rng(value: Any, memo: Memo) -> Any:
    if isinstance(value, np.random.Generator):
        twin: Any = clone_rng(value)
    elif isinstance(value, random.Random):
        twin = type(value).__new__(type(value))
        twin.setstate(value.getstate())
    else:
        twin = np.random.RandomState(0)
        twin.set_state(value.get_state(legacy=False))
    return memo.setdefault(id(value), twin)


def _copy_object(value: Any, memo: Memo) -> Any:
    twin = memo[id(value)] = object.__new__(type(value))
    return _copy_attributes(value, twin, memo)


def _copy_attributes(value: Any, twin: Any, memo: Memo) -> Any:
    for name, item in _attributes_of(value).items():
        object.__setattr__(twin, name, copy_value(item, memo))
    return twin


def _attributes_of(value: Any) -> dict[str, Any]:
    """Return everything stored on an instance, in its `__dict__` and in the slots of its classes."""
    found = dict(getattr(value, "__dict__", ()))
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            private = slot.startswith("__") and not slot.endswith("__")
            name = f"_{kind.__name__.lstrip('_')}{slot}" if private else slot
            if slot not in ("__dict__", "__weakref__") and hasattr(value, name):
                found[name] = getattr(value, name)
    return found


def _copy_by_protocol(value: Any, memo: Memo) -> Any:
    """Copy with `copy.deepcopy`, as a last resort."""
    try:
        return copy.deepcopy(value, memo)
    except Exception as error:  # foreign code: whatever it raises means that it cannot be copied
        raise UncapturableError(value, f"{type(error).__name__}: {error}") from error


def _refuse_env(value: Any, memo: Memo) -> Any:  # noqa: ARG001
    raise UncapturableError(value, "it is an environment outside this stack")


def _choose(kind: type) -> Callable[[Any, Memo], Any]:
    """Pick the copier of a type: the first rule that fits."""
    if issubclass(kind, tuple(ATOMIC - {object})) and not hasattr(kind, "__dict__"):
        return _share
    if issubclass(kind, tuple | dict) and hasattr(kind, "__deepcopy__"):
        return _copy_by_protocol  # frozen values (`Episode`, `FrozenDict`) are their own copy
    for family, copier in _FAMILIES:
        if issubclass(kind, family):
            return copier
    if any("__call__" in vars(base) for base in kind.__mro__):
        return _share
    if "__deepcopy__" not in dir(kind) and _is_plain(kind):
        return _copy_object
    return _copy_by_protocol


def _is_plain(kind: type) -> bool:
    """Return True if `object.__new__` plus attributes rebuilds an instance: no class is written in C."""
    bases = [base for base in kind.__mro__ if base is not object]
    return all(base.__flags__ & (1 << 9) for base in bases) and any(
        "__dict__" in vars(base) or "__slots__" in vars(base) for base in bases
    )


_FAMILIES: tuple[tuple[Any, Callable[[Any, Memo], Any]], ...] = (
    (type, _share),
    (enum.Enum, _share),
    (frozenset, _share),
    (types.FunctionType, _copy_function),
    (types.MethodType, _copy_method),
    (types.BuiltinMethodType, _copy_builtin),
    (CONFIG_TYPES, _share),
    (gymnasium.Space, lambda value, memo: memo.setdefault(id(value), clone_space(value))),
    (gymnasium.Env, _refuse_env),
    (gymnasium.vector.VectorEnv, _refuse_env),
    ((np.random.Generator, np.random.RandomState, random.Random), _copy_rng),
    (np.ndarray, _copy_array),
    (tuple, _copy_tuple),
    (list, _copy_list),
    (dict, _copy_dict),
    (set, _copy_set),
    (deque, _copy_deque),
    (bytearray, lambda value, memo: memo.setdefault(id(value), value[:])),
)
_COPIERS: dict[type, Callable[[Any, Memo], Any]] = {}
