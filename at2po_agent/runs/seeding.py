"""Seeds of a run: one independent stream for each purpose and step, all from `run.seed`."""

from enum import IntEnum

import numpy as np

_RUN = 7


class RunPurpose(IntEnum):
    """What a seed is for."""

    MODEL = 0
    TOKENIZER = 1
    COLD_START = 2
    TASKS = 3
    ROLLOUT = 4
    MINIBATCHES = 5
    EVALUATION = 6


def run_seed(seed: int, purpose: RunPurpose, *place: int) -> int:
    """A 63-bit seed."""
    return int(_sequence(seed, purpose, place).generate_state(1, np.uint64)[0] >> np.uint64(1))


def run_generator(seed: int, purpose: RunPurpose, *place: int) -> np.random.Generator:
    """A generator."""
    return np.random.default_rng(_sequence(seed, purpose, place))


def _sequence(seed: int, purpose: RunPurpose, place: tuple[int, ...]) -> np.random.SeedSequence:
    return np.random.SeedSequence(seed, spawn_key=(_RUN, int(purpose), *place))
