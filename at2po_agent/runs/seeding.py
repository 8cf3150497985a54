"""Draws the seeds of a run from `run.seed`: one independent stream for each purpose and step."""

from enum import IntEnum

import numpy as np

_RUN = 7


class RunPurpose(IntEnum):
    """The purpose of a seed."""

    MODEL = 0
    TOKENIZER = 1
    COLD_START = 2
    TASKS = 3
    ROLLOUT = 4
    MINIBATCHES = 5
    EVALUATION = 6
    ADAPTERS = 7
    DROPOUT = 8


def run_seed(seed: int, purpose: RunPurpose, *position: int) -> int:
    """Return a 63-bit seed."""
    return int(_sequence(seed, purpose, position).generate_state(1, np.uint64)[0] >> np.uint64(1))


def run_generator(seed: int, purpose: RunPurpose, *position: int) -> np.random.Generator:
    """Return a generator."""
    return np.random.default_rng(_sequence(seed, purpose, position))


def _sequence(seed: int, purpose: RunPurpose, position: tuple[int, ...]) -> np.random.SeedSequence:
    return np.random.SeedSequence(seed, spawn_key=(_RUN, int(purpose), *position))
