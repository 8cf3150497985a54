"""A snapshot: where an environment stands, as one frozen, versioned value with a digest.

Taking one keeps references to immutable state; JSON is written only when somebody asks for `to_json` or
`digest`. Reading one back never unpickles and never imports anything that the text names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, PlainSerializer, PlainValidator, ValidationError

from at2po_env.errors import SnapshotError
from at2po_env.forking.capture import ATOMIC
from at2po_env.forking.json_reader import Decoder, decode_rng
from at2po_env.forking.json_writer import Encoder, canonical, encode_rng, name_of
from at2po_env.forking.layers import CapturedLayer, Layer, rules_of
from at2po_env.forking.random_state import RngState, build_rng, capture_rng

VERSION = 1


class BaseState(NamedTuple):
    """What is kept of the environment under the wrappers."""

    state: Any
    rng: int | RngState | None
    seed: int | None


class Part:
    """One half of a snapshot: live values until JSON is asked for, or JSON that was read."""

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
        return f"Part({'live' if self._json is None else 'json'})"


def _read_part(value: Any) -> Part:
    return value if isinstance(value, Part) else Part(data=value)


AnyPart = Annotated[Part, PlainValidator(_read_part), PlainSerializer(lambda part: part.json)]


class Snapshot(BaseModel):
    """Where an environment stands.

    Attributes:
        version: Version of the JSON layout.
        env_id: Registered id of the environment, or `module:Class`.
        state: The episode, and the generator of the environment under the wrappers.
        wrappers: The state of each wrapper, outermost first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = VERSION
    env_id: str
    state: AnyPart
    wrappers: AnyPart

    @classmethod
    def of(cls, env_id: str, state: Part, wrappers: Part) -> Self:
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
            SnapshotError: If the environment's `dump_state` returns something that is not JSON, or a wrapper
                holds something that has no JSON form; names where.
        """
        return _to_text(
            {
                "version": self.version,
                "env_id": self.env_id,
                "state": self.state.json,
                "wrappers": self.wrappers.json,
            }
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read a snapshot that `to_json` wrote.

        Raises:
            SnapshotError: If the text is not one, or of another version.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SnapshotError(f"This is not a snapshot: {error}. Expected what to_json writes") from error
        found = data.get("version") if isinstance(data, dict) else None
        if found != VERSION:
            raise SnapshotError(f"This snapshot has version {found!r}; this release reads version {VERSION}")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise SnapshotError(f"This is not a snapshot: {error}") from error

    @property
    def digest(self) -> str:
        """SHA-256 of the state; equal states have equal digests. Clocks of wrappers do not count."""
        layers = canonical(
            [{"class": layer["class"], "attributes": _steady(layer)} for layer in self.wrappers.json or ()]
        )
        text = _to_text(
            {"version": self.version, "env_id": self.env_id, "state": self.state.json, "wrappers": layers},
            sort_keys=True,
        )
        return hashlib.sha256(text.encode("ascii")).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Snapshot) and (self is other or self.digest == other.digest)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_json, (self.to_json(),)

    def __repr__(self) -> str:
        return f"Snapshot(env_id={self.env_id!r}, version={self.version})"


_FIELDS = {"version", "env_id", "state", "wrappers"}


def _to_text(data: Any, *, sort_keys: bool = False) -> str:
    try:
        return json.dumps(data, sort_keys=sort_keys, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        path, value = _first_bad(data, "snapshot")
        raise SnapshotError(
            f"{path} is {value}, which is not JSON ({error}). Fix: dump_state must return only None, bool, "
            "int, finite float, str, list and dict with str keys"
        ) from error


def _first_bad(data: Any, path: str) -> tuple[str, str]:
    """Find where a value stops being JSON, breadth first."""
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


def _steady(layer: dict[str, Any]) -> dict[str, Any]:
    volatile = layer.get("volatile", ())
    return {name: value for name, value in layer["attributes"].items() if name not in volatile}


def write_base(dump: Callable[[Any], Any]) -> Callable[[BaseState], Any]:
    """Return the function that writes the environment's half with its own `dump_state`."""

    def write(base: BaseState) -> Any:
        rng = base.rng
        if isinstance(rng, int):
            rng = capture_rng(build_rng(rng))
        return {
            "episode": dump(base.state),
            "rng": None if rng is None else encode_rng(rng),
            "seed": base.seed,
        }

    return write


def read_base(data: Any, load: Callable[[Any], Any]) -> BaseState:
    """Read what `write_base` wrote, with the environment's own `load_state`."""
    if not isinstance(data, dict) or set(data) != {"episode", "rng", "seed"}:
        raise SnapshotError("The snapshot's state is incomplete. Expected episode, rng and seed")
    rng = None if data["rng"] is None else decode_rng(data["rng"])
    try:
        return BaseState(load(data["episode"]), rng, data["seed"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise SnapshotError(f"load_state refused the state: {type(error).__name__}: {error}") from error


def write_layers(captured: Sequence[CapturedLayer]) -> list[dict[str, Any]]:
    """Write the state of every wrapper, outermost first."""
    encoder = Encoder()
    layers = []
    for kind, values, _, _ in captured:
        attributes = {name: encoder.write(value, f"{kind.__name__}.{name}") for name, value in values.items()}
        volatile = sorted(rules_of(kind).volatile & values.keys())
        layers.append({"class": name_of(kind), "attributes": attributes, "volatile": volatile})
    return [{**layer, "attributes": encoder.finish(layer["attributes"])} for layer in layers]


def read_layers(data: Any, wrappers: Sequence[Layer]) -> list[CapturedLayer]:
    """Read what `write_layers` wrote, against the wrappers that will take it.

    Raises:
        SnapshotError: If the stacks differ or the text is damaged.
    """
    if not isinstance(data, list) or not all(isinstance(layer, dict) for layer in data):
        raise SnapshotError("The snapshot's wrappers are damaged. Expected a list of objects")
    check_stack([layer.get("class") for layer in data], wrappers)
    decoder = Decoder(wrappers)
    captured = []
    for layer, wrapper in zip(data, wrappers, strict=True):
        kind = type(wrapper)
        values = {
            name: decoder.decode(item, getattr(wrapper, name, None), f"{kind.__name__}.{name}")
            for name, item in layer["attributes"].items()
        }
        complex_names = [name for name, value in values.items() if type(value) not in ATOMIC]
        captured.append(CapturedLayer(kind, values, complex_names, -1))
    return captured


def check_stack(captured: Sequence[Any], wrappers: Sequence[Layer]) -> None:
    """Raise unless the wrappers are those that were captured."""
    present = [name_of(type(wrapper)) for wrapper in wrappers]
    if list(captured) != present:
        raise SnapshotError(
            f"The snapshot was taken through the wrappers {list(captured)} and this environment has "
            f"{present}, outermost first. Fix: restore into an environment built by the same call"
        )
