"""A snapshot keeps the state of an environment as one frozen, versioned value with a digest.

Taking one keeps references to immutable state; JSON is written when `to_json` or `digest` is first asked for.
Reading one back never unpickles, imports nothing, and looks up no class that the text names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, NoReturn, Self

from pydantic import BaseModel, ConfigDict, PlainSerializer, PlainValidator, ValidationError

from at2po_env.errors import At2poError, SnapshotError
from at2po_env.forking.frozen import Shared
from at2po_env.forking.layers import name_of
from at2po_env.forking.random_state import RngState, build_rng, capture_rng, read_rng, write_rng

VERSION = 1
MAX_CHARACTERS = 64 * 2**20
"""The longest text that is read."""


class BaseState(NamedTuple):
    """The state of the environment under the wrappers: its episode, its generator, and that one's seed."""

    state: Any
    rng: int | RngState | None
    seed: int | None


class LazyJson:
    """One half of a snapshot: live values, written as JSON when first asked, or JSON that was read."""

    __slots__ = ("_json", "_write", "live")

    def __init__(self, live: Any = None, write: Callable[[Any], Any] | None = None, data: Any = None) -> None:
        self.live = live
        self._write = write
        self._json = data

    @property
    def json(self) -> Any:
        """The JSON value, written at the first call."""
        if self._json is None and self._write is not None:
            self._json = self._write(self.live)
        return self._json

    def __repr__(self) -> str:
        return f"LazyJson({'live' if self._json is None else 'json'})"


def _read_base_half(value: Any) -> LazyJson:
    if isinstance(value, LazyJson):
        return value
    if not isinstance(value, dict) or value.keys() != {"episode", "rng", "seed"}:
        raise ValueError("expected an object with episode, rng and seed")
    return LazyJson(data=value)


def _read_wrapper_half(value: Any) -> LazyJson:
    if isinstance(value, LazyJson):
        return value
    if not isinstance(value, list) or not all(
        isinstance(layer, dict)
        and layer.keys() == {"class", "state", "clocks"}
        and isinstance(layer["class"], str)
        for layer in value
    ):
        raise ValueError("expected a list of objects with class, state and clocks")
    return LazyJson(data=value)


_AS_JSON = PlainSerializer(lambda half: half.json)


class Snapshot(Shared, BaseModel):
    """The state of an environment and its wrappers.

    Attributes:
        version: Version of the JSON layout.
        env_id: Registered id of the environment, or `module:Class`.
        state: The episode, and the generator of the environment under the wrappers.
        wrappers: The state of each wrapper, outermost first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = VERSION
    env_id: str
    state: Annotated[LazyJson, PlainValidator(_read_base_half), _AS_JSON]
    wrappers: Annotated[LazyJson, PlainValidator(_read_wrapper_half), _AS_JSON]

    @classmethod
    def of(cls, env_id: str, state: LazyJson, wrappers: LazyJson) -> Self:
        """Build a snapshot from values known to be right, without validating them again."""
        snap = cls.__new__(cls)
        values = {"version": VERSION, "env_id": env_id, "state": state, "wrappers": wrappers}
        object.__setattr__(snap, "__dict__", values)
        object.__setattr__(snap, "__pydantic_fields_set__", _FIELDS)
        object.__setattr__(snap, "__pydantic_extra__", None)
        object.__setattr__(snap, "__pydantic_private__", None)
        return snap

    def to_json(self) -> str:
        """Write the snapshot as ASCII JSON, lone surrogates in actions included.

        Raises:
            SnapshotError: If `dump_state`, or a wrapper's `get_state`, returns something that is not JSON, or
                a wrapper has state that only fork and restore can copy; names where.
        """
        return self._text(self.wrappers.json, sort_keys=False)

    def _text(self, wrappers: Any, *, sort_keys: bool) -> str:
        data = {
            "version": self.version,
            "env_id": self.env_id,
            "state": self.state.json,
            "wrappers": wrappers,
        }
        try:
            return json.dumps(data, sort_keys=sort_keys, allow_nan=False, separators=(",", ":"))
        except (TypeError, ValueError, RecursionError) as error:
            path, value = _first_bad(data, "snapshot")
            raise SnapshotError(
                f"{path} is {value}, which is not JSON ({error}). Fix: dump_state must return only None, "
                "bool, int, finite float, str, list and dict with str keys, and so must a wrapper's get_state"
            ) from error

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read a snapshot that `to_json` wrote; `restore` checks whether it fits an environment.

        Raises:
            SnapshotError: If the text is not one, of another version, or longer than 64 MiB.
        """
        if len(text) > MAX_CHARACTERS:
            raise SnapshotError(
                f"This text has {len(text)} characters. Snapshots are read up to {MAX_CHARACTERS}"
            )
        try:
            data = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise SnapshotError(f"This is not a snapshot: {error}. Expected what to_json writes") from error
        found = data.get("version") if isinstance(data, dict) else None
        if found != VERSION:
            raise SnapshotError(
                f"This snapshot has version {found!r:.80}; this release reads version {VERSION}"
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise SnapshotError(f"This is not a snapshot: {error}") from error

    @property
    def digest(self) -> str:
        """SHA-256 of the state; equal states have equal digests. Clocks of wrappers do not count.

        Raises:
            SnapshotError: If the snapshot cannot be written as JSON, as in `to_json`.
        """
        layers = [{"class": layer["class"], "state": layer["state"]} for layer in self.wrappers.json]
        return hashlib.sha256(self._text(layers, sort_keys=True).encode("ascii")).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Snapshot) and (self is other or self.digest == other.digest)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_json, (self.to_json(),)

    def __repr__(self) -> str:
        return f"Snapshot(env_id={self.env_id!r}, version={self.version})"


_FIELDS = {"version", "env_id", "state", "wrappers"}


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _first_bad(data: Any, path: str) -> tuple[str, str]:
    """Return where a value stops being JSON and what stands there, searching breadth first."""
    queue = [(path, data)]
    for place, value in queue:
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    return f"{place}, key {key!r}", f"a {type(key).__name__}"
            queue.extend((f"{place}.{key}", item) for key, item in value.items())
        elif isinstance(value, list | tuple):
            queue.extend((f"{place}[{index}]", item) for index, item in enumerate(value))
        elif isinstance(value, float) and value - value != 0:
            return place, repr(value)
        elif value is not None and not isinstance(value, bool | int | float | str):
            return place, f"a {name_of(type(value))}"
        if len(queue) > 1_000_000:
            break
    return path, "too deep or circular"


def write_base(dump: Callable[[Any], Any], base: BaseState) -> Any:
    """Write the environment's half, with the environment's own `dump_state`."""
    rng = capture_rng(build_rng(base.rng)) if isinstance(base.rng, int) else base.rng
    return {
        "episode": dump(base.state),
        "rng": None if rng is None else write_rng(rng),
        "seed": base.seed,
    }


def read_base(data: Any, load: Callable[[Any], Any]) -> BaseState:
    """Read what `write_base` wrote, with the environment's own `load_state`."""
    rng = None if data["rng"] is None else read_rng(data["rng"])
    seed = data["seed"]
    if not (seed is None or (type(seed) is int and -1 <= seed < 1 << 1024)):
        raise SnapshotError(f"The snapshot's seed is {seed!r:.80}. Expected a whole number from -1, or null")
    try:
        return BaseState(load(data["episode"]), rng, seed)
    except At2poError:
        raise
    except Exception as error:  # an environment's own code: whatever it raises, the state does not fit it
        raise SnapshotError(f"load_state refused the state: {type(error).__name__}: {error}") from error
