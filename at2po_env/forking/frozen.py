"""Freezes JSON values, so that an episode and its forks can share them.

Tools keep such values between turns. Objects become `FrozenDict`, arrays become tuples; neither can be
changed in place. `thaw` gives plain JSON containers back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Self


class Shared:
    """A value that copies share: `copy.copy` and `copy.deepcopy` return the same object."""

    __slots__ = ()

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return self


class FrozenDict(Shared, dict[str, Any]):
    """A dict that refuses to change; still a dict, so `json` and equality work.

    Example:
        >>> FrozenDict(a=1) | {"b": 2}
        {'a': 1, 'b': 2}
        >>> FrozenDict(a=1)["a"] = 2
        Traceback (most recent call last):
        TypeError: a FrozenDict does not change: build a new one, e.g. freeze({**old, key: value})
    """

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("a FrozenDict does not change: build a new one, e.g. freeze({**old, key: value})")

    __setitem__ = __delitem__ = clear = pop = popitem = setdefault = update = __ior__ = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Callable[..., FrozenDict], tuple[dict[str, Any]]]:
        return FrozenDict, (dict(self),)


EMPTY = FrozenDict()


def freeze(value: Any) -> Any:
    """Return `value` with every mapping as `FrozenDict`, every list as tuple and every set as frozenset.

    Example:
        >>> freeze({"seen": ["a", {"b": 1}]})
        {'seen': ('a', {'b': 1})}
    """
    if isinstance(value, FrozenDict):
        return value
    if isinstance(value, Mapping):
        return FrozenDict({key: freeze(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return tuple([freeze(item) for item in value])
    if isinstance(value, set):
        return frozenset(value)
    return value


def thaw(value: Any) -> Any:
    """Return `value` as plain dicts and lists, ready for `json`.

    Example:
        >>> thaw(freeze({"seen": ["a"]}))
        {'seen': ['a']}
    """
    if isinstance(value, Mapping):
        return {key: thaw(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [thaw(item) for item in value]
    return value
