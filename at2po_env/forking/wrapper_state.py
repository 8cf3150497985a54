"""Writes the state of wrappers as JSON, and reads it back against what each wrapper declares.

`KNOWN` lists for each known Gymnasium wrapper which attributes are its state and in what form. Any other
wrapper says with two methods what its state is:

    def get_state(self): ...         # returns a JSON value; is called when a snapshot is taken
    def set_state(self, state): ...  # continues from such a value, or raises ValueError

A wrapper that holds nothing but callables, spaces and what it names in `fork_config` needs neither.

Snapshots may come from outside. Reading one only gives checked values to declared attributes: no class is
looked up, unknown names and forms are refused, and nothing is allocated that is larger than the text.
"""

from __future__ import annotations

import base64
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import wrappers as gym
from gymnasium.wrappers.utils import RunningMeanStd

from at2po_env.errors import SnapshotError
from at2po_env.forking.capture import copy_value, is_config
from at2po_env.forking.layers import OWN_STATE, CapturedLayer, Layer, LayerRef, name_of, rules_of

Json = Any
DTYPES = {np.dtype(kind).str: np.dtype(kind) for kind in "?bhilqBHILQefdFD"}
"""The types of arrays that are written and read: booleans and numbers, never objects."""


def write_data(value: Any) -> Json:
    """Return numbers, texts, arrays and containers of them as JSON; `read_data` is the inverse."""
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, np.ndarray | np.generic) and value.dtype.str in DTYPES:
        shape = list(value.shape) if isinstance(value, np.ndarray) else None
        return {
            "$array": base64.b64encode(value.tobytes()).decode(),
            "dtype": value.dtype.str,
            "shape": shape,
        }
    if type(value) is list:
        return [write_data(item) for item in value]
    if type(value) is tuple:
        return {"$tuple": [write_data(item) for item in value]}
    if type(value) is dict and all(type(key) is str for key in value):
        return {"$dict": {key: write_data(item) for key, item in value.items()}}
    raise TypeError(f"a {name_of(type(value))} has no JSON form")


def read_data(data: Json) -> Any:
    """Return the value that `write_data` wrote.

    Raises:
        ValueError: If it has another form.
    """
    if data is None or isinstance(data, bool | int | float | str):
        return data
    if isinstance(data, list):
        return [read_data(item) for item in data]
    match data:
        case {"$float": "nan" | "inf" | "-inf" as text, **rest} if not rest:
            return float(text)
        case {"$tuple": list(items), **rest} if not rest:
            return tuple([read_data(item) for item in items])
        case {"$dict": dict(items), **rest} if not rest:
            return {key: read_data(item) for key, item in items.items()}
        case {"$array": str(text), "dtype": str(kind), "shape": list() | None as shape, **rest} if not rest:
            if kind not in DTYPES or any(type(length) is not int or length < 0 for length in shape or ()):
                raise ValueError(f"an array of {kind:.20} and shape {shape!r:.80} is unknown")
            flat = np.frombuffer(base64.b64decode(text, validate=True), DTYPES[kind])
            return flat.reshape(()).copy()[()] if shape is None else flat.reshape(shape).copy()
    raise ValueError(f"this form is unknown: {sorted(data)!r:.80}")


class Field(NamedTuple):
    """The form of one attribute.

    Attributes:
        write: Value -> JSON.
        read: (JSON, the value held now, the wrapper) -> value; raises `ValueError` if it does not fit.
    """

    write: Callable[[Any], Json]
    read: Callable[[Json, Any, Any], Any]


def _check(fits: Callable[[Any, Any, Any], bool], expected: str, write: Any = write_data) -> Field:
    """Return a field of data that has to fit: `fits(value, the value held now, the wrapper)`."""

    def read(data: Json, held: Any, wrapper: Any) -> Any:
        value = read_data(data)
        if not fits(value, held, wrapper):
            raise ValueError(f"expected {expected}, got {value!r:.80}")
        return value

    return Field(write, read)


def _is_count(value: Any, *_: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_number(value: Any, *_: Any) -> bool:
    if isinstance(value, np.generic):
        return value.dtype.kind in "iuf"
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _is_like(value: Any, held: Any, _: Any) -> bool:
    arrays = isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "iuf"
    return arrays and value.shape == np.shape(held)


def _queue(item: Field, *, most: str | None = None, full: bool = False) -> Field:
    """Return a field of a deque; `most` names the attribute that bounds its length, by default `maxlen`."""

    def read(data: Json, held: Any, wrapper: Any) -> Any:
        longest = held.maxlen if most is None else getattr(wrapper, most)
        if not isinstance(data, list) or len(data) > longest or (full and len(data) < longest):
            raise ValueError(f"expected a list of {'' if full else 'at most '}{longest} entries")
        return deque([item.read(entry, None, wrapper) for entry in data], held.maxlen)

    return Field(lambda values: [item.write(value) for value in values], read)


def _read_statistics(data: Json, held: Any, wrapper: Any) -> RunningMeanStd:
    if not isinstance(data, dict) or set(data) != {"mean", "var", "count"}:
        raise ValueError("expected mean, var and count")
    statistics = RunningMeanStd()  # type: ignore[no-untyped-call]
    statistics.mean = ARRAY.read(data["mean"], held.mean, wrapper)
    statistics.var = ARRAY.read(data["var"], held.var, wrapper)
    statistics.count = NUMBER.read(data["count"], held.count, wrapper)
    return statistics


FLAG = _check(lambda value, *_: type(value) is bool, "true or false", bool)
COUNT = _check(_is_count, "a count below 2**31", int)
TURNS = _check(lambda value, *_: value is None or _is_count(value), "a count below 2**31, or null")
NUMBER = _check(_is_number, "a number")
ARRAY = _check(_is_like, "an array of the same shape")
FRAMES = _check(lambda value, *_: type(value) is list, "a list")
OBSERVATION = _check(
    lambda value, _, wrapper: _lies_in(wrapper.env.observation_space, value), "an observation"
)
ACTION = _check(
    lambda value, _, wrapper: value is None or _lies_in(wrapper.action_space, value), "an action, or null"
)
STATISTICS = Field(
    lambda held: {name: write_data(item) for name, item in vars(held).items()}, _read_statistics
)


def _lies_in(space: gymnasium.Space[Any], value: Any) -> bool:
    if isinstance(space, gymnasium.spaces.Box) and not isinstance(value, np.ndarray):
        return False  # Gymnasium would convert it, with a warning
    return space.contains(value)


class Known(NamedTuple):
    """The attributes of a wrapper class.

    Attributes:
        state: Those that change during an episode, with their forms.
        config: Those that are set when the stack is built; they are not written.
        clocks: State that is written but does not count when digests are compared.
        check: Returns what is wrong with values that fit one by one but not together, or "".
    """

    state: Mapping[str, Field] = {}
    config: tuple[str, ...] = ()
    clocks: Mapping[str, Field] = {}
    check: Callable[[Mapping[str, Any]], str] = lambda _: ""


KNOWN: dict[type, Known] = {
    gym.TimeLimit: Known({"_elapsed_steps": TURNS}, ("_max_episode_steps",)),
    gym.OrderEnforcing: Known({"_has_reset": FLAG}, ("_disable_render_order_enforcing",)),
    gym.Autoreset: Known({"autoreset": FLAG}),
    gym.RecordEpisodeStatistics: Known(
        {
            "episode_count": COUNT,
            "episode_returns": NUMBER,
            "episode_lengths": COUNT,
            "return_queue": _queue(NUMBER),
            "length_queue": _queue(COUNT),
        },
        ("_stats_key",),
        {"episode_start_time": NUMBER, "time_queue": _queue(NUMBER)},
    ),
    gym.RenderCollection: Known({"frame_list": FRAMES}, ("pop_frames", "reset_clean")),
    gym.AddWhiteNoise: Known({}, ("probability_of_noise_per_pixel", "is_noise_grayscale")),
    gym.ObstructView: Known({}, ("obstruction_centers_ratio", "obstruction_width", "is_noise_grayscale")),
    gym.StickyAction: Known(
        {"last_action": ACTION, "is_sticky_actions": FLAG, "num_repeats": COUNT, "repeats_taken": COUNT},
        ("repeat_action_probability", "repeat_action_duration_range"),
        check=lambda values: (
            "it has no action to repeat"
            if values["is_sticky_actions"] and values["last_action"] is None
            else ""
        ),
    ),
    gym.RepeatAction: Known({}, ("num_repeats",)),
    gym.DelayObservation: Known({"observation_queue": _queue(OBSERVATION, most="delay")}, ("delay",)),
    gym.TimeAwareObservation: Known({"timesteps": COUNT}, ("max_timesteps", "flatten", "normalize_time")),
    gym.FrameStackObservation: Known(
        {"obs_queue": _queue(OBSERVATION, full=True), "padding_value": OBSERVATION},
        ("stack_size", "padding_type", "stacked_obs"),  # stacked_obs is overwritten in each step
    ),
    gym.MaxAndSkipObservation: Known({"_obs_buffer": ARRAY}, ("_skip",)),
    gym.NormalizeObservation: Known({"obs_rms": STATISTICS}, ("epsilon", "_update_running_mean")),
    gym.NormalizeReward: Known(
        {"return_rms": STATISTICS, "discounted_reward": ARRAY}, ("gamma", "epsilon", "_update_running_mean")
    ),
    gym.DiscretizeAction: Known({}, ("low", "high", "n_dims", "multidiscrete", "bin_centers", "bins")),
    gym.DiscretizeObservation: Known({}, ("low", "high", "n_dims", "multidiscrete", "bin_edges", "bins")),
    gym.FilterObservation: Known({}, ("filter_keys",)),
    gym.GrayscaleObservation: Known({}, ("keep_dim",)),
    gym.ResizeObservation: Known({}, ("shape", "cv2_shape")),
    gym.ReshapeObservation: Known({}, ("shape",)),
    gym.DtypeObservation: Known({}, ("dtype",)),
}
"""A subclass has the attributes of its base. `PassiveEnvChecker` has no state that counts, wrappers that hold
only callables need no entry, and those that write files or own a window cannot be written."""


def _known(kind: type) -> Known:
    """Return what is known of a class: its nearest base in the table counts."""
    return next((KNOWN[base] for base in kind.__mro__ if base in KNOWN), Known())


def write_layers(captured: Sequence[CapturedLayer]) -> list[dict[str, Json]]:
    """Write the state of every wrapper, outermost first.

    Raises:
        SnapshotError: If a wrapper holds state that is neither known nor returned by its `get_state`.
    """
    layers = []
    for kind, values, _, _ in captured:
        written: dict[str, Any] = {"class": name_of(kind), "state": {}, "clocks": {}}
        layers.append(written)
        if rules_of(kind).own_state:
            written["state"] = values[OWN_STATE]
            continue
        known = _known(kind)
        for name, value in values.items():
            part = "clocks" if name in known.clocks else "state"
            field = known.clocks.get(name) or known.state.get(name)
            if field is not None:
                try:
                    written[part][name] = field.write(value)
                except (TypeError, ValueError, AttributeError, RecursionError) as error:
                    raise SnapshotError(f"{kind.__name__}.{name} cannot be written: {error}") from error
            elif not (name in known.config or is_config(value) or isinstance(value, LayerRef)):
                raise SnapshotError(
                    f"{kind.__name__}.{name} holds a {name_of(type(value))}, which snapshots cannot write. "
                    f"Fix: give {kind.__name__} get_state() -> JSON value and set_state(value), or, if it "
                    f'never changes in an episode, fork_config = ("{name}",); fork and restore work as it is'
                )
    return layers


def read_layers(data: Json, wrappers: Sequence[Layer]) -> list[dict[str, Any]]:
    """Return the values that each wrapper is to be given, after checking all of them.

    Raises:
        SnapshotError: If the stacks differ, or a value does not fit what a wrapper declares.
    """
    check_stack([layer["class"] for layer in data], wrappers)
    found = []
    for layer, wrapper in zip(data, wrappers, strict=True):
        kind = type(wrapper)
        if rules_of(kind).own_state:
            found.append({OWN_STATE: layer["state"]})
            continue
        known = _known(kind)
        values: dict[str, Any] = {}
        for part, fields in (("state", known.state), ("clocks", known.clocks)):
            given = layer[part]
            if not isinstance(given, dict) or given.keys() != fields.keys():
                raise SnapshotError(
                    f"{kind.__name__} was given the {part} {given!r:.80}. Expected {sorted(fields)}"
                )
            for name, field in fields.items():
                try:
                    values[name] = field.read(given[name], getattr(wrapper, name, None), wrapper)
                except Exception as error:  # spaces are foreign code: whatever they raise, it does not fit
                    raise SnapshotError(f"{kind.__name__}.{name} cannot be read: {error}") from error
        wrong = known.check(values)
        if wrong:
            raise SnapshotError(f"{kind.__name__} cannot be read: {wrong}")
        found.append(values)
    return found


def give_layers(wrappers: Sequence[Layer], found: Sequence[dict[str, Any]]) -> None:
    """Give every wrapper the values that `read_layers` returned for it."""
    for wrapper, values in zip(wrappers, found, strict=True):
        if rules_of(type(wrapper)).own_state:
            wrapper.set_state(copy_value(values[OWN_STATE], {}))  # type: ignore[attr-defined]
        else:
            vars(wrapper).update(values)


def check_stack(captured: Sequence[str], wrappers: Sequence[Layer]) -> None:
    """Raise unless the wrappers are those that were captured."""
    present = [name_of(type(wrapper)) for wrapper in wrappers]
    if list(captured) != present:
        raise SnapshotError(
            f"The snapshot was taken through the wrappers {list(captured)} and this environment has "
            f"{present}, outermost first. Fix: restore into an environment built by the same call"
        )
