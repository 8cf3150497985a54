"""Seeds that depend on where a draw happens in the trees, never on when it happens."""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a seed is for; two purposes never share a stream."""

    ENVIRONMENT = 0
    SAMPLING = 1
    EXPANSION = 2


def derive_seed(seed: int, purpose: Purpose, *place: int) -> int:
    """A 63-bit seed for one place: (question, branch, turn) or (question, round)."""
    sequence = np.random.SeedSequence(seed, spawn_key=(int(purpose), *place))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def derive_generator(seed: int, purpose: Purpose, *place: int) -> np.random.Generator:
    """A generator for one place."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(int(purpose), *place)))
