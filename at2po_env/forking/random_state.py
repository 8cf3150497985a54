"""Random generators as values: captured in a microsecond, rebuilt only when somebody draws.

Building a NumPy generator costs 8 microseconds, reading its state one. A fork therefore keeps the state and
builds the generator at its first use. Generators of NumPy bit generators that are not part of NumPy are
refused.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from at2po_env.errors import SnapshotError

BIT_GENERATORS: dict[str, type[np.random.BitGenerator]] = {
    kind.__name__: kind
    for kind in (np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64)
}


class RngState(NamedTuple):
    """A generator at rest: the state of its bit generator, and where `spawn` stands.

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


def clone_random(generator: random.Random) -> random.Random:
    """The same for the standard library's generator."""
    twin = type(generator).__new__(type(generator))
    twin.setstate(generator.getstate())
    return twin


def clone_random_state(generator: np.random.RandomState) -> np.random.RandomState:
    """The same for NumPy's legacy generator."""
    twin = np.random.RandomState(0)
    twin.set_state(generator.get_state(legacy=False))
    return twin


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
