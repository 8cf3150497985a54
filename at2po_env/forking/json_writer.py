"""Captured wrapper state to JSON, without pickle; `at2po_env.forking.json_reader` is the inverse.

Scalars, lists and plain dicts are themselves; everything else is an object with one key that starts with `$`.
A container met twice is written once, with an `$id`, and later as a `$ref`.
"""

from __future__ import annotations

import base64
import enum
import json
import math
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium
import numpy as np

from at2po_env.errors import SnapshotError
from at2po_env.forking.capture import attributes_of, is_config
from at2po_env.forking.layers import LayerRef
from at2po_env.forking.random_state import RngState, capture_rng

Json = Any
_CONTAINERS = (list, dict, set, deque, np.ndarray, bytearray)


def name_of(kind: Any) -> str:
    """`module:qualname` of a class or function; of an instance, that of its class."""
    qualified = getattr(kind, "__qualname__", None)
    if qualified is None:
        kind, qualified = type(kind), type(kind).__qualname__
    return f"{kind.__module__}:{qualified}"


def encode_rng(state: RngState) -> Json:
    """Write a captured generator; arrays in its state become lists."""
    return {"state": _plain(state.state), "seeds": _plain(state.seeds)}


def _plain(value: Any) -> Json:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, np.integer) else value


class Encoder:
    """Writes one captured stack; remembers containers, so that aliases stay aliases."""

    def __init__(self) -> None:
        self._seen: dict[int, Any] = {}
        self._shared: dict[int, int] = {}

    def write(self, value: Any, path: str) -> Json:
        """Write one attribute; `finish` has to follow, once all are written.

        Raises:
            SnapshotError: If something inside has no JSON form; names the path to it.
        """
        try:
            return self._encode(value, path)
        except RecursionError as error:
            raise SnapshotError(f"{path} is nested too deeply for JSON. Fix: keep a flat list") from error

    def _encode(self, value: Any, path: str) -> Json:
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"$float": repr(value)}
        key = id(value)
        if key in self._seen:
            holder = self._seen[key]
            number = self._shared.setdefault(key, len(self._shared))
            holder["$id"] = number
            return {"$ref": number}
        if not _is_tracked(value):
            return self._body(value, path)
        holder = self._seen[key] = {}
        holder["$keep"] = value  # keeps id(value) from being reused
        holder["$value"] = self._body(value, path)
        return holder

    def finish(self, data: Json) -> Json:
        """Drop the bookkeeping of containers that were met only once."""
        if isinstance(data, list):
            return [self.finish(item) for item in data]
        if not isinstance(data, dict):
            return data
        if "$keep" in data:
            body = self.finish(data["$value"])
            return {"$id": data["$id"], "$value": body} if "$id" in data else body
        return {key: self.finish(item) for key, item in data.items()}

    def _body(self, value: Any, path: str) -> Json:
        for kind, write in _WRITERS:
            if isinstance(value, kind):
                return write(self, value, path)
        if is_config(value):
            return {"$config": name_of(value)}
        attributes = attributes_of(value)
        if not attributes and not hasattr(value, "__dict__"):
            raise SnapshotError(f"{path} holds a {name_of(type(value))}, which has no JSON form")
        return {"$object": name_of(type(value)), "attributes": self._mapping(attributes, path)}

    def _mapping(self, value: Mapping[Any, Any], path: str) -> Json:
        return {key: self._encode(item, f"{path}.{key}") for key, item in value.items()}

    def _items(self, value: Any, path: str) -> list[Json]:
        return [self._encode(item, f"{path}[{position}]") for position, item in enumerate(value)]

    def _dict(self, value: dict[Any, Any], path: str) -> Json:
        if type(value) is dict and all(type(key) is str and key[:1] != "$" for key in value):
            return self._mapping(value, path)
        pairs = [
            [self._encode(key, path), self._encode(item, f"{path}[{key!r}]")] for key, item in value.items()
        ]
        return {"$dict": pairs} if type(value) is dict else {"$dict": pairs, "class": name_of(type(value))}

    def _list(self, value: list[Any], path: str) -> Json:
        items = self._items(value, path)
        return items if type(value) is list else {"$list": items, "class": name_of(type(value))}

    def _tuple(self, value: tuple[Any, ...], path: str) -> Json:
        items = self._items(value, path)
        return {"$tuple": items} if type(value) is tuple else {"$tuple": items, "class": name_of(type(value))}

    def _array(self, value: np.ndarray[Any, Any], path: str) -> Json:
        shape = list(value.shape)
        if value.dtype.hasobject:
            return {"$objects": self._items(value.reshape(-1), path), "shape": shape}
        data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {"$array": data, "dtype": value.dtype.str, "shape": shape}

    def _set(self, value: set[Any] | frozenset[Any], path: str) -> Json:
        items = sorted(self._items(value, path), key=repr)
        return {"$frozenset" if isinstance(value, frozenset) else "$set": items}


def _is_tracked(value: Any) -> bool:
    """Whether aliases of a value matter: containers and objects, not immutable leaves or configuration."""
    if isinstance(value, _CONTAINERS):
        return True
    if isinstance(value, tuple | frozenset | str | bytes | np.generic | complex | enum.Enum | LayerRef):
        return False
    return not is_config(value)


def _b64(value: bytes | bytearray) -> str:
    return base64.b64encode(value).decode()


_WRITERS: tuple[tuple[Any, Callable[[Encoder, Any, str], Json]], ...] = (
    (LayerRef, lambda _e, value, _p: {"$layer": value.index}),
    (enum.Enum, lambda _e, value, _p: {"$enum": name_of(type(value)), "name": value.name}),
    (bytearray, lambda _e, value, _p: {"$bytearray": _b64(value)}),
    (bytes, lambda _e, value, _p: {"$bytes": _b64(value)}),
    (np.generic, lambda _e, value, _p: {"$scalar": _b64(value.tobytes()), "dtype": value.dtype.str}),
    (complex, lambda _e, value, _p: {"$complex": [repr(value.real), repr(value.imag)]}),
    (np.ndarray, Encoder._array),
    (tuple, Encoder._tuple),
    (list, Encoder._list),
    (dict, Encoder._dict),
    ((set, frozenset), Encoder._set),
    (
        deque,
        lambda e, value, path: {"$deque": e._items(value, path), "maxlen": value.maxlen},
    ),
    (np.random.Generator, lambda _e, value, _p: {"$generator": encode_rng(capture_rng(value))}),
    (
        np.random.RandomState,
        lambda _e, value, _p: {"$random_state": _plain(value.get_state(legacy=False))},
    ),
    (random.Random, lambda _e, value, _p: {"$random": _plain(value.getstate())}),
    (gymnasium.Space, lambda _e, value, _p: {"$space": _space_rng(value)}),
)


def _space_rng(space: Any) -> Json:
    generator = space._np_random
    return None if generator is None else encode_rng(capture_rng(generator))


def canonical(data: Json) -> Json:
    """Bring what `Encoder` wrote into one form for all equal states, for digests.

    The order of keys does not count (that of an `OrderedDict` does), nor which alias is met first.
    """
    bodies: dict[int, Json] = {}
    _collect(data, bodies)
    return _canonical(data, bodies, {})


def _collect(data: Json, bodies: dict[int, Json]) -> None:
    if isinstance(data, dict):
        if "$id" in data:
            bodies[data["$id"]] = data["$value"]
        for item in data.values():
            _collect(item, bodies)
    elif isinstance(data, list):
        for item in data:
            _collect(item, bodies)


def _canonical(data: Json, bodies: Mapping[int, Json], numbers: dict[int, int]) -> Json:
    if isinstance(data, list):
        return [_canonical(item, bodies, numbers) for item in data]
    if not isinstance(data, dict):
        return data
    number: Any = data.get("$id", data.get("$ref"))
    if number in bodies:
        if number in numbers:
            return {"$ref": numbers[number]}
        numbers[number] = len(numbers)
        return {"$id": numbers[number], "$value": _canonical(bodies[number], bodies, numbers)}
    if "$dict" in data and data.get("class") != _ORDERED:
        pairs = sorted(data["$dict"], key=lambda pair: json.dumps(pair[0], sort_keys=True))
        data = {**data, "$dict": pairs}
    return {key: _canonical(data[key], bodies, numbers) for key in sorted(data)}


_ORDERED = name_of(OrderedDict)
