"""Keeps random generators as values, which are rebuilt at the first draw.

Building a NumPy generator costs 8 microseconds, reading its state one. A fork therefore keeps the state and
builds the generator at its first use. Only bit generators that are part of NumPy are supported.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from at2po_env.errors import SnapshotError

BIT_GENERATORS: dict[str, type[np.random.BitGenerator]] = {
    kind.__name__: kind
    for kind in (np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64)
}


MAX_SEED_WORDS = 1024
MAX_POOL_SIZE = 64
_LIMITS = {"has_uint32": 2, "uinteger": 2**32, "pos": 625, "buffer_pos": 5}
"""Exclusive upper bounds of the numbers in a bit generator's state; NumPy reads memory at `pos` unchecked."""


class RngState(NamedTuple):
    """The state of a bit generator, and how many children it has spawned.

    Attributes:
        state: What `bit_generator.state` gave; read-only by convention.
        seeds: (entropy, spawn_key, pool_size, children spawned) of the seed sequence, or `None`.
    """

    state: Mapping[str, Any]
    seeds: tuple[Any, ...] | None


def capture_rng(generator: np.random.Generator) -> RngState:
    """Read a generator without drawing from it."""
    bits = generator.bit_generator
    seeds = bits.seed_seq
    if type(seeds) is np.random.SeedSequence:
        return RngState(
            bits.state, (seeds.entropy, seeds.spawn_key, seeds.pool_size, seeds.n_children_spawned)
        )
    return RngState(bits.state, None)


def build_rng(source: int | RngState) -> np.random.Generator:
    """Return a new generator: from a seed exactly as Gymnasium does, from a captured state where that stood.

    Raises:
        SnapshotError: If the state belongs to a bit generator that NumPy does not ship.
    """
    if isinstance(source, int):
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(source)))
    name = source.state["bit_generator"]
    kind = BIT_GENERATORS.get(name)
    if kind is None:
        raise SnapshotError(f"Unknown bit generator {name!r}. Expected one of {sorted(BIT_GENERATORS)}")
    if source.seeds is None:
        bits = kind(0)
    else:
        entropy, spawn_key, pool_size, spawned = source.seeds
        bits = kind(
            np.random.SeedSequence(
                entropy, spawn_key=spawn_key, pool_size=pool_size, n_children_spawned=spawned
            )
        )
    bits.state = source.state
    return np.random.Generator(bits)


def clone_rng(generator: np.random.Generator) -> np.random.Generator:
    """Return an independent generator that will draw the same numbers."""
    return build_rng(capture_rng(generator))


def write_rng(state: RngState) -> Any:
    """Return a captured generator as JSON; arrays become lists."""
    return {"state": _plain(state.state), "seeds": _plain(state.seeds)}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, np.integer) else value


def read_rng(data: Any) -> RngState:
    """Return the captured generator that `write_rng` wrote.

    Every number is checked against its range, because the text may come from outside: NumPy itself would read
    memory out of bounds, allocate any amount, or draw the same number for ever.

    Raises:
        SnapshotError: If the value is not what `write_rng` writes.
    """
    try:
        if set(data) != {"state", "seeds"}:
            raise ValueError("expected the keys state and seeds")
        kind = BIT_GENERATORS.get(data["state"]["bit_generator"])
        if kind is None:
            raise ValueError(f"expected a bit generator among {sorted(BIT_GENERATORS)}")
        state = _like(kind(0).state, data["state"], "state")
        inner = state["state"]
        if inner.get("inc", 1) % 2 == 0 or ("pos" in inner and not inner["key"][1:].any()):
            raise ValueError("this state would repeat one number for ever")
        return RngState(state, None if data["seeds"] is None else _read_seeds(data["seeds"]))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise SnapshotError(f"This is not a random generator: {type(error).__name__}: {error}") from error


def _like(model: Any, value: Any, name: str) -> Any:
    """Return `value` if it has the keys, lengths and ranges of `model`, a state that NumPy wrote."""
    if isinstance(model, dict):
        if set(value) != set(model):
            raise ValueError(f"{name} needs the keys {sorted(model)}")
        return {key: _like(item, value[key], key) for key, item in model.items()}
    if isinstance(model, str):
        return model  # the name of the bit generator, which chose the model
    if isinstance(model, np.ndarray):
        if not isinstance(value, list) or len(value) != model.size:
            raise ValueError(f"{name} needs a list of {model.size} numbers")
        return np.array([_natural(item, 1 << 8 * model.itemsize, name) for item in value], model.dtype)
    return _natural(value, _LIMITS.get(name, 1 << 128), name)


def _read_seeds(data: Any) -> tuple[Any, ...]:
    entropy, spawn_key, pool_size, spawned = data
    if not _natural(pool_size, MAX_POOL_SIZE + 1, "pool_size") >= 4:
        raise ValueError("pool_size is below 4")
    for words in (entropy, spawn_key):
        listed = words if isinstance(words, list) else [words]
        if len(listed) > MAX_SEED_WORDS:
            raise ValueError(f"a seed has {len(listed)} words, at most {MAX_SEED_WORDS} are read")
        for word in listed:
            _natural(word, 1 << 1024, "a seed")
    return entropy, tuple(spawn_key), pool_size, _natural(spawned, 1 << 32, "spawned children")


def _natural(value: Any, limit: int, name: str) -> int:
    if type(value) is not int or not 0 <= value < limit:
        raise ValueError(f"{name} is no whole number from 0 to {limit - 1}")
    return value


def next_seed(seed: int) -> int:
    """Derive a seed of 63 bits that shares no pattern with `seed`, without building a generator.

    The finaliser of SplitMix64; calling it again on the result gives a sequence of independent seeds.

    References:
        Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014.
    """
    bits = ((seed ^ (seed >> 64)) + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (bits ^ (bits >> 31)) >> 1


def entropy() -> int:
    """Draw a seed from the operating system, as wide as NumPy's own default."""
    return secrets.randbits(128)
