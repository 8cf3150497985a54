"""Collects the infos of many environments in one dict of arrays, in Gymnasium's layout.

Every key has an array with one element per environment, and `_key` says which of them are set. Unlike
Gymnasium's own code, environments may give one key values of different types or shapes: the array is then of
objects, and nothing fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Infos = dict[str, Any]


def add_info(infos: Infos, info: Mapping[str, Any], number: int, count: int) -> None:
    """Add the info of one environment.

    Args:
        infos: The infos so far; extended in place.
        info: The info of one environment.
        number: Its index.
        count: Number of environments.

    Example:
        >>> infos = {}
        >>> add_info(infos, {"turn": 1, "episode": {"r": 0.5}}, 0, 2)
        >>> add_info(infos, {"turn": "?"}, 1, 2)
        >>> infos["turn"], infos["_episode"], infos["episode"]["r"]
        (array([1, '?'], dtype=object), array([ True, False]), array([0.5, 0. ]))
    """
    for key, value in info.items():
        held = infos.get(key)
        if isinstance(value, dict) and (held is None or isinstance(held, dict)) and key != "final_obs":
            nested = infos.setdefault(key, {})
            add_info(nested, value, number, count)
        else:
            if isinstance(held, dict):
                held = _as_objects(held, infos[f"_{key}"], count)
            infos[key] = _put(held, value, number, count, as_object=key == "final_obs")
        infos.setdefault(f"_{key}", np.zeros(count, np.bool_))[number] = True


def info_of(infos: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Return the info of one environment: the inverse of `add_info`.

    Example:
        >>> infos = {}
        >>> add_info(infos, {"turn": 1, "stop": ("a",)}, 1, 2)
        >>> info_of(infos, 0), info_of(infos, 1)
        ({}, {'turn': 1, 'stop': ('a',)})
    """
    found: dict[str, Any] = {}
    for key, value in infos.items():
        mask = infos.get(f"_{key}")
        if mask is not None and mask[number]:
            found[key] = info_of(value, number) if isinstance(value, dict) else _plain(value[number])
    return found


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _put(held: Any, value: Any, number: int, count: int, *, as_object: bool) -> Any:
    """Put a value into the array of its key; an array of objects takes over where types or shapes differ."""
    array = np.asarray(value) if isinstance(value, bool | int | float | np.number | np.ndarray) else None
    if not as_object and array is not None and not array.dtype.hasobject:
        if held is None:
            held = np.zeros((count, *array.shape), array.dtype)
        if held.dtype == array.dtype and held.shape == (count, *array.shape):
            held[number] = value
            return held
    if held is None or not held.dtype.hasobject:
        items = [None] * count if held is None else [_plain(item) for item in held]
        held = np.full(count, None, object)
        for position, item in enumerate(items):
            held[position] = item
    held[number] = _plain(value)
    return held


def _as_objects(held: Infos, mask: Any, count: int) -> Any:
    """Turn collected dicts back into one array of dicts."""
    objects = np.full(count, None, object)
    for position in np.flatnonzero(mask):
        objects[position] = info_of(held, int(position))
    return objects
