"""The benchmark beside TRL compares two sides that do the same."""

import importlib
import time

import pytest

from benchmarks.random_trees import TreeShape

pytest.importorskip("trl", reason="needs TRL (extra trl): make test-trl")
peers = importlib.import_module("benchmarks.peers")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_both_sides_update_by_the_same_gradient(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    monkeypatch.setitem(peers.LEARNER, "tiny", TreeShape(3, 1, 1, (2, 3), (4, 6), (3, 5), (2, 4)))
    found = peers.learner_case("tiny", rounds=2, clock=time.perf_counter, folder=tmp_path, memory=False)
    assert found["leaves"] == 4
    assert found["gradient_error"] < 1e-4
    low, median, high = found["trl_pairs_s"]
    assert 0 < low <= median <= high
    assert found["trl_tokens_per_s"] == pytest.approx(found["tokens"] / found["trl_s"][1])
