from __future__ import annotations

import numpy as np
import pytest

from at2po_agent.types import Generation, Turn, mean_surprisal


def test_entropy_of_a_turn_is_the_mean_surprisal_of_its_sampled_tokens() -> None:
    log_probs = np.array([-1.0, -2.0, -6.0], dtype=np.float32)
    assert mean_surprisal(log_probs) == 3.0
    # the forced token does not count: (1 + 2) / 2, neither 9 / 3 nor 3 / 3
    assert mean_surprisal(log_probs, np.array([True, True, False])) == 1.5
    assert mean_surprisal(log_probs, np.zeros(3, dtype=np.bool_)) == 0.0
    assert mean_surprisal(np.zeros(0, dtype=np.float32)) == 0.0


def test_turn_from_generation_keeps_every_token() -> None:
    generation = Generation(
        (5, 6), np.array([-0.5, -9.0], dtype=np.float32), "stop", np.array([True, False]), version=3
    )
    turn = Turn.from_generation(generation, observation_ids=[1, 2], observation="seen", action="done")
    assert turn.ids == (1, 2, 5, 6)
    assert turn.action_ids == (5, 6)
    assert turn.entropy == 0.5
    assert turn.sampled_mask.tolist() == [True, False]
    assert (turn.observation, turn.action, turn.stop_reason) == ("seen", "done", "stop")
    assert turn.version == 3
    all_sampled = Turn.from_generation(Generation((7,), np.array([-1.0], np.float32), "eos"), action="")
    assert all_sampled.sampled_mask.tolist() == [True]
    assert all_sampled.observation_ids == ()


def test_stored_arrays_are_private_and_read_only() -> None:
    given = np.array([-1.0, -2.0])
    generation = Generation((1, 2), given, "length")  # type: ignore[arg-type]  float64 is converted
    given[0] = 0.0
    assert generation.log_probs.dtype == np.float32
    assert generation.log_probs.tolist() == [-1.0, -2.0]
    with pytest.raises(ValueError, match="read-only"):
        generation.log_probs[0] = 0.0


@pytest.mark.parametrize(
    ("ids", "log_probs", "sampled", "stop_reason", "message"),
    [
        ((1, 2), [-1.0], None, "stop", r"log_probs must hold one number per id: got shape \(1,\) for 2 ids"),
        ((1,), [-1.0], [True, False], "stop", "sampled must hold one flag per id"),
        ((1,), [-1.0], None, "done", "stop_reason must be one of .*'abort', 'eos', 'length', 'stop'.*'done'"),
    ],
)
def test_inconsistent_generations_are_refused(
    ids: tuple[int, ...], log_probs: list[float], sampled: list[bool] | None, stop_reason: str, message: str
) -> None:
    mask = None if sampled is None else np.array(sampled)
    with pytest.raises(ValueError, match=message):
        Generation(ids, np.array(log_probs, dtype=np.float32), stop_reason, mask)  # type: ignore[arg-type]
