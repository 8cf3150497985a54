from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from at2po_agent.losses.segments import TurnSegments

IDS = torch.tensor([[-1, 0, 0, -1, 2, 0], [1, 1, -1, -1, -1, -1], [-1] * 6])
VALUES = torch.tensor(
    [
        [math.nan, 1.0, 2.0, math.inf, 5.0, 4.0],
        [3.0, 4.0] + [math.nan] * 4,
        [math.inf, -math.inf] * 3,
    ]
)


@pytest.mark.parametrize("index", [TurnSegments.of, TurnSegments.scattered])
def test_turns_by_hand(index: object) -> None:
    # row 0: turn 0 is 1 + 2 + 4, interrupted; no turn 1; turn 2 is 5. Row 1: turn 1 is 3 + 4. Row 2: nothing
    segments: TurnSegments = index(IDS)  # type: ignore[operator]
    padding = [0.0] * (segments.counts.shape[1] - 3)
    assert segments.counts.tolist() == [[3, 0, 1, *padding], [0, 2, 0, *padding], [0, 0, 0, *padding]]
    assert segments.sum(VALUES).tolist() == [[7, 0, 5, *padding], [0, 7, 0, *padding], [0, 0, 0, *padding]]
    mean = segments.mean(VALUES)
    assert mean[:, :3].tolist() == [[7 / np.float32(3), 0, 5], [0, 3.5, 0], [0, 0, 0]]
    spread = segments.expand(segments.sum(VALUES), fill=-9.0)
    assert spread.tolist() == [[-9, 7, 7, -9, 5, 7], [7, 7, -9, -9, -9, -9], [-9] * 6]


def test_size_of_the_compact_index() -> None:
    assert TurnSegments.of(IDS).counts.shape == (3, 3)
    assert TurnSegments.scattered(IDS).counts.shape == (3, 6)
    assert TurnSegments.of(torch.full((2, 3), -1)).counts.tolist() == [[0.0], [0.0]]


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 20), st.sampled_from([2, 5, 20]))
def test_runs_and_scattering_agree(seed: int, rows: int, tokens: int, turns: int) -> None:
    rng = np.random.default_rng(seed)
    ids = torch.from_numpy(rng.integers(-1, min(turns, tokens), (rows, tokens)))
    values = torch.from_numpy(rng.normal(size=(rows, tokens)))
    runs, scattered = TurnSegments.of(ids, torch.float64), TurnSegments.scattered(ids, torch.float64)
    width = runs.counts.shape[1]
    assert torch.equal(runs.counts, scattered.counts[:, :width])
    torch.testing.assert_close(runs.sum(values), scattered.sum(values)[:, :width])
    for row in range(rows):
        for turn in range(width):
            expected = math.fsum(values[row][ids[row] == turn].tolist())
            assert float(runs.sum(values)[row, turn]) == pytest.approx(expected, abs=1e-12)
    means, other = runs.mean(values), scattered.mean(values)
    torch.testing.assert_close(runs.expand(means, 1.0), scattered.expand(other, 1.0))


def test_equal_ids_in_neighbouring_rows_stay_apart() -> None:
    ids = torch.zeros(2, 2, dtype=torch.int64)
    assert TurnSegments.of(ids).sum(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist() == [[3.0], [7.0]]


def test_transposed_and_half_precision_input() -> None:
    ids = IDS.T.contiguous().T
    assert not ids.is_contiguous()
    values = torch.ones(3, 6, dtype=torch.bfloat16).T.contiguous().T
    assert TurnSegments.of(ids).sum(values).tolist() == TurnSegments.of(IDS).counts.tolist()


@pytest.mark.parametrize("bad", [-2, 6])
def test_ids_out_of_range_are_refused(bad: int) -> None:
    ids: Tensor = IDS.clone()
    ids[1, 3] = bad
    with pytest.raises(ValueError, match=r"turn_ids must lie between -1 \(not sampled\) and T-1 = 5"):
        TurnSegments.of(ids)
