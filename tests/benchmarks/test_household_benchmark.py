"""The benchmark of the household runs, with or without TextWorld, and times what it says."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from at2po_envs.household.games import read_game
from at2po_envs.household.world import is_won, obey

from benchmarks._timing import measure
from benchmarks.household import OURS, WALK, cases_of, new_process, write_games


def test_walks_are_possible_in_their_games_and_reach_no_goal(tmp_path: Path) -> None:
    games = write_games(tmp_path)
    assert len(games) == 6
    for file, walk in games:
        state = read_game(file).start
        assert len(walk) == WALK
        for command in walk:
            step = obey(state, command)
            assert step.possible
            state = step.state
        assert not is_won(state)


def test_steps_resets_and_forks_are_timed(tmp_path: Path) -> None:
    before = random.getstate()
    timings = measure(cases_of(write_games(tmp_path), with_textworld=False), rounds=1, warmup=0)
    assert set(timings) == {"steps", "reset", "fork_turn0", "fork_turn40"}
    assert all(0 < timing.median < 0.1 for timing in timings.values())
    assert random.getstate() == before


@pytest.mark.slow
def test_a_new_process_plays_the_games_and_says_its_memory(tmp_path: Path) -> None:
    seconds, mib = new_process(OURS, [file for file, _ in write_games(tmp_path)][:2])
    assert 0 < seconds < 100
    assert 10 < mib < 1_000
