"""JSON to captured wrapper state: the inverse of `at2po_env.forking.json_writer`.

Reading takes a template, the value that the environment holds now. Configuration and classes come from there,
or from a class that is already imported from a wrapper's own module; never from a name in the text alone.
"""

from __future__ import annotations

import base64
import binascii
import enum
import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import gymnasium
import numpy as np

from at2po_env.errors import SnapshotError
from at2po_env.forking.capture import attributes_of, clone_space
from at2po_env.forking.json_writer import Json, name_of
from at2po_env.forking.layers import LAYERS
from at2po_env.forking.random_state import BIT_GENERATORS, RngState, build_rng

_DAMAGE = (
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    binascii.Error,
)
_LIBRARY = {"builtins", "typing", "abc"}
_BUILTIN_CLASSES: tuple[type, ...] = (Counter, OrderedDict, defaultdict)


def decode_rng(data: Json) -> RngState:
    """Read what `encode_rng` wrote."""
    try:
        state, seeds = dict(data["state"]), data["seeds"]
        if state["bit_generator"] not in BIT_GENERATORS:
            raise SnapshotError(f"Unknown bit generator {state['bit_generator']!r}")
        dtype = np.uint32 if state["bit_generator"] == "MT19937" else np.uint64
        if isinstance(state["state"], Mapping):
            state["state"] = {
                key: np.array(item, dtype) if isinstance(item, list) else item
                for key, item in state["state"].items()
            }
        if isinstance(state.get("buffer"), list):
            state["buffer"] = np.array(state["buffer"], dtype)
        entropy, spawn_key, *rest = seeds or (None, ())
        return RngState(state, None if seeds is None else (entropy, tuple(spawn_key), *rest))
    except (KeyError, TypeError, ValueError) as error:
        raise SnapshotError(f"This is not a generator: {type(error).__name__}: {error}") from error


class Decoder:
    """Reads one captured stack against what the environment holds now.

    Args:
        owners: The wrappers whose state is read; the modules of their classes may contribute classes.
    """

    def __init__(self, owners: Iterable[object]) -> None:
        self._shared: dict[int, Any] = {}
        self._modules = {kind.__module__ for owner in owners for kind in type(owner).__mro__} - _LIBRARY

    def decode(self, data: Json, template: Any, path: str) -> Any:
        """Read one value.

        Raises:
            SnapshotError: If the text is not what `Encoder` writes, or asks for a class or a configuration
                that the template does not have.
        """
        try:
            return self._decode(data, template, path)
        except _DAMAGE as error:
            raise SnapshotError(f"{path} cannot be read: {type(error).__name__}: {error}") from error

    def _decode(self, data: Json, template: Any, path: str, number: int | None = None) -> Any:
        if data is None or isinstance(data, bool | int | float | str):
            return data
        if isinstance(data, list):
            twin: list[Any] = []
            self._remember(number, twin)
            twin.extend(self._items(data, template if isinstance(template, list) else (), path))
            return twin
        if "$id" in data:
            return self._decode(data["$value"], template, path, data["$id"])
        if "$ref" in data:
            if data["$ref"] not in self._shared:
                raise SnapshotError(f"{path} refers to value {data['$ref']} before it is defined")
            return self._shared[data["$ref"]]
        tag = next((key for key in data if key.startswith("$")), None)
        if tag is None:
            return self._plain_dict(data, template, path, number)
        if tag not in _READERS:
            raise SnapshotError(f"{path} has the unknown tag {tag!r}. Expected one of {sorted(_READERS)}")
        return _READERS[tag](self, data, template, path, number)

    def _remember(self, number: int | None, value: Any) -> Any:
        if number is not None:
            self._shared[number] = value
        return value

    def _items(self, data: list[Json], template: Any, path: str) -> list[Any]:
        known = list(template)
        known += [known[-1] if known else None] * (len(data) - len(known))
        return [
            self._decode(item, known[position], f"{path}[{position}]") for position, item in enumerate(data)
        ]

    def _plain_dict(self, data: Any, template: Any, path: str, number: int | None) -> Any:
        twin: dict[str, Any] = {}
        self._remember(number, twin)
        known = template if isinstance(template, dict) else {}
        for key, item in data.items():
            twin[key] = self._decode(item, known.get(key), f"{path}.{key}")
        return twin

    def _dict(self, data: Any, template: Any, path: str, number: int | None) -> Any:
        kind = self._class(data.get("class"), template, path, dict)
        twin = kind.__new__(kind)
        if isinstance(twin, defaultdict):
            twin.default_factory = getattr(template, "default_factory", None)
        self._remember(number, twin)
        known = template if isinstance(template, dict) else {}
        for raw_key, item in data["$dict"]:
            key = self._decode(raw_key, None, path)
            twin[key] = self._decode(item, known.get(key), f"{path}[{key!r}]")
        return twin

    def _list(self, data: Any, template: Any, path: str, number: int | None) -> Any:
        kind = self._class(data["class"], template, path, list)
        twin = self._remember(number, kind.__new__(kind))
        list.extend(twin, self._items(data["$list"], template if isinstance(template, list) else (), path))
        return twin

    def _tuple(self, data: Any, template: Any, path: str, _: int | None) -> Any:
        items = self._items(data["$tuple"], template if isinstance(template, tuple) else (), path)
        return tuple.__new__(self._class(data.get("class"), template, path, tuple), items)

    def _deque(self, data: Any, template: Any, path: str, number: int | None) -> Any:
        twin: deque[Any] = deque(maxlen=data["maxlen"])
        self._remember(number, twin)
        twin.extend(self._items(data["$deque"], template if isinstance(template, deque) else (), path))
        return twin

    def _objects(self, data: Any, template: Any, path: str, number: int | None) -> Any:
        flat = np.empty(len(data["$objects"]), dtype=object)
        known = template.reshape(-1) if isinstance(template, np.ndarray) else ()
        for position, item in enumerate(self._items(data["$objects"], known, path)):
            flat[position] = item
        return self._remember(number, flat.reshape(data["shape"]))

    def _object(self, data: Any, template: Any, path: str, number: int | None) -> Any:
        kind = self._class(data["$object"], template, path, object)
        twin = self._remember(number, object.__new__(kind))
        known = attributes_of(template) if type(template) is kind else {}
        for name, item in data["attributes"].items():
            object.__setattr__(twin, name, self._decode(item, known.get(name), f"{path}.{name}"))
        return twin

    def _config(self, data: Any, template: Any, path: str, _: int | None) -> Any:
        if template is None or name_of(template) != data["$config"]:
            held = "nothing" if template is None else name_of(template)
            raise SnapshotError(
                f"{path} was configured with {data['$config']} and this environment holds {held}. "
                "Fix: build the environment with the same arguments"
            )
        return template

    def _space(self, data: Any, template: Any, path: str, _: int | None) -> Any:
        if not isinstance(template, gymnasium.Space):
            raise SnapshotError(f"{path} was a space and this environment holds {name_of(template)}")
        twin = clone_space(template)
        twin._np_random = None if data["$space"] is None else build_rng(decode_rng(data["$space"]))
        return twin

    def _enum(self, data: Any, template: Any, path: str, _: int | None) -> Any:
        return self._class(data["$enum"], template, path, enum.Enum)[data["name"]]

    def _class(self, name: str | None, template: Any, path: str, base: type) -> Any:
        """Find a class by name among the template's and those already imported from the same modules."""
        if name is None:
            return base
        if name_of(type(template)) == name:
            return type(template)
        for kind in _BUILTIN_CLASSES:
            if name_of(kind) == name:
                return kind
        module, _, qualified = name.partition(":")
        found: Any = sys.modules.get(module) if module in self._modules else None
        for part in qualified.split("."):
            found = getattr(found, part, None)
        if isinstance(found, type) and issubclass(found, base) and found.__module__ == module:
            return found
        raise SnapshotError(
            f"{path} needs the class {name}, which this environment does not use. "
            "Fix: build the environment with the same wrappers, or reset it once before restoring"
        )


def _array(decoder: Decoder, data: Any, _: Any, __: str, number: int | None) -> Any:
    flat = np.frombuffer(base64.b64decode(data["$array"], validate=True), dtype=np.dtype(data["dtype"]))
    return decoder._remember(number, flat.reshape(data["shape"]).copy())


def _random(decoder: Decoder, data: Any, template: Any, _: str, number: int | None) -> Any:
    twin = type(template)() if isinstance(template, random.Random) else random.Random()
    version, internal, gauss = data["$random"]
    twin.setstate((version, tuple(internal), gauss))
    return decoder._remember(number, twin)


def _random_state(decoder: Decoder, data: Any, _: Any, __: str, number: int | None) -> Any:
    twin = np.random.RandomState(0)
    state = data["$random_state"]
    key = np.array(state["state"]["key"], np.uint32)
    twin.set_state({**state, "state": {**state["state"], "key": key}})
    return decoder._remember(number, twin)


_READERS: dict[str, Callable[[Decoder, Any, Any, str, int | None], Any]] = {
    "$float": lambda _d, data, _t, _p, _n: float(data["$float"]),
    "$complex": lambda _d, data, _t, _p, _n: complex(*map(float, data["$complex"])),
    "$bytes": lambda _d, data, _t, _p, _n: base64.b64decode(data["$bytes"], validate=True),
    "$bytearray": lambda d, data, _t, _p, n: d._remember(n, bytearray(base64.b64decode(data["$bytearray"]))),
    "$scalar": lambda _d, data, _t, _p, _n: np.frombuffer(
        base64.b64decode(data["$scalar"]), dtype=np.dtype(data["dtype"])
    )[0],
    "$array": _array,
    "$objects": Decoder._objects,
    "$tuple": Decoder._tuple,
    "$list": Decoder._list,
    "$dict": Decoder._dict,
    "$set": lambda d, data, _t, path, n: d._remember(n, set(d._items(data["$set"], (), path))),
    "$frozenset": lambda d, data, _t, path, _n: frozenset(d._items(data["$frozenset"], (), path)),
    "$deque": Decoder._deque,
    "$object": Decoder._object,
    "$config": Decoder._config,
    "$space": Decoder._space,
    "$enum": Decoder._enum,
    "$layer": lambda _d, data, _t, _p, _n: LAYERS[data["$layer"]],
    "$generator": lambda d, data, _t, _p, n: d._remember(n, build_rng(decode_rng(data["$generator"]))),
    "$random": _random,
    "$random_state": _random_state,
}
