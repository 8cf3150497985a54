import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.report_samples import small_tree
from matplotlib.image import imread

from at2po_agent.config.loading import config_text
from at2po_agent.config.sections import Config
from at2po_agent.report.fork_points import fork_points, forks, rank_correlation
from at2po_agent.report.plot_data import (
    Group,
    cost,
    curve,
    group_runs,
    mean_interval,
    read_run,
)
from at2po_agent.report.plots import FIGURES, plot_runs
from at2po_env.errors import DataError


def step(number: int, **values: Any) -> dict[str, Any]:
    """A record of training with all that the figures show."""
    recorded = {
        "em": 0.5,
        "reward": 0.25,
        "metrics/success": 0.75,
        "entropy": 0.9,
        "turn_kl": 1e-4,
        "clip_fraction": 0.02,
        "update_norm": 0.03,
        "sampled_tokens": 1000 * number,
        "step_tool_calls": 10,
        "seconds": 5.0,
        "seconds/sampling": 3.0,
        "seconds/update": 2.0,
    }
    return {"kind": "train", "step": number, **recorded, **values}


def evaluation(number: int, em: float, mode: str = "greedy") -> dict[str, Any]:
    return {"kind": "eval", "mode": mode, "step": number, "em": em, "reward": em, "metrics": {"success": em}}


def write(
    folder: Path,
    records: Sequence[Mapping[str, Any]],
    *,
    settings: Mapping[str, Any] | None = None,
    trees: bool = True,
) -> Path:
    """A run's folder with these records, and with the whole configuration if some settings are given."""
    folder.mkdir(parents=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    if settings is not None:
        (folder / "config.yaml").write_text(config_text(Config.model_validate(settings)), encoding="utf-8")
    if trees:
        (folder / "trees").mkdir()
        line = json.dumps({"step": 1, "tree": small_tree().to_json()}) + "\n"
        (folder / "trees" / "step_000001.jsonl").write_text(line, encoding="utf-8")
    return folder


def group(*folders: Path) -> Group:
    return Group("runs", tuple(read_run(folder) for folder in folders))


# --- groups ----------------------------------------------------------------------------------------------


def test_runs_that_differ_only_in_their_seed_are_one_group(tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [
        {"run": {"seed": 0, "name": "first"}},
        {"run": {"seed": 1, "name": "other"}, "eval": {"questions": 7}, "train": {"steps": 9}},
        {"run": {"seed": 2}, "optimizer": {"lr": 3e-4}},
        {"run": {"seed": 0}, "algorithm": {"preset": "grpo"}},
    ]
    runs = [
        read_run(write(tmp_path / str(i), [step(1)], settings=one, trees=False))
        for i, one in enumerate(settings)
    ]
    groups = group_runs(runs)
    assert [[run.path.name for run in each.runs] for each in groups] == [["0", "1"], ["2"], ["3"]]
    default = Config().optimizer.lr
    assert [each.label for each in groups] == [
        f"at2po · optimizer.lr={default}",
        "at2po · optimizer.lr=0.0003",
        "grpo",
    ]


def test_groups_that_differ_in_many_settings_are_told_apart_by_folder(tmp_path: Path) -> None:
    changed = {"optimizer": {"lr": 3e-4, "beta1": 0.5, "beta2": 0.5}}
    a, b = write(tmp_path / "a", [step(1)], settings={}), write(tmp_path / "b", [step(1)], settings=changed)
    assert [each.label for each in group_runs([read_run(a), read_run(b)])] == [f"at2po · {a}", f"at2po · {b}"]


def test_a_configuration_of_an_older_release_has_the_defaults(tmp_path: Path) -> None:
    new = write(tmp_path / "new", [step(1)], settings={"run": {"seed": 1}})
    old = write(tmp_path / "old", [step(1)])
    (old / "config.yaml").write_text("algorithm: {preset: at2po}\nrun: {seed: 0}\n", encoding="utf-8")
    (both,) = group_runs([read_run(old), read_run(new)])
    assert len(both.runs) == 2


def test_runs_without_configuration_stay_apart(tmp_path: Path) -> None:
    runs = [read_run(write(tmp_path / place / "run", [step(1)])) for place in "ab"]
    labels = [each.label for each in group_runs(runs)]
    assert labels == [f"run · {tmp_path / place / 'run'}" for place in "ab"]


# --- curves ----------------------------------------------------------------------------------------------


def test_an_interval_is_students() -> None:
    # 0.2 and 0.4: mean 0.3, s = sqrt(0.02), s / sqrt(2) = 0.1, and t = 12.706 with one degree of freedom.
    # 1, 2, 3 and 6: mean 3, s = sqrt(14 / 3), s / 2 = 1.0801, t = 3.182 with three.
    table = np.array([[0.2, 1.0, 5.0], [0.4, 2.0, np.nan], [np.nan, 3.0, np.nan], [np.nan, 6.0, np.nan]])
    mean, low, high, runs = mean_interval(table)
    np.testing.assert_allclose(mean, [0.3, 3.0, 5.0])
    np.testing.assert_allclose(high - mean, [1.2706, 3.182 * 1.080123, np.nan], rtol=1e-4)
    np.testing.assert_allclose(mean - low, high - mean)
    assert runs.tolist() == [2, 4, 1]
    assert high[0] - mean[0] > 2 * 0.196  # negative control: the normal quantile would promise too much
    # 21 values, half of them 1: t = 2.0860 with 20 degrees of freedom, beyond the table.
    many = np.array([[float(i % 2)] for i in range(21)])
    mean, _, high, _ = mean_interval(many)
    assert (high - mean)[0] == pytest.approx(2.0860 * many.std(ddof=1) / math.sqrt(21), rel=2e-3)


def test_a_run_that_is_behind_counts_as_far_as_it_is(tmp_path: Path) -> None:
    ahead = write(tmp_path / "a", [step(1, em=0.2), step(2, em=0.3)])
    behind = write(tmp_path / "b", [step(1, em=0.4)])
    found = curve(group(ahead, behind), "em")
    assert found.step.tolist() == [1, 2]
    np.testing.assert_allclose(found.mean, [0.3, 0.3])
    assert found.runs.tolist() == [2, 1]
    assert np.isfinite(found.low).tolist() == [True, False]


def test_curves_know_what_was_spent_by_then(tmp_path: Path) -> None:
    records = [
        evaluation(0, 0.1),
        step(1, sampled_tokens=100, step_tool_calls=3, seconds=5.0),
        step(2, sampled_tokens=250, step_tool_calls=4, seconds=90.0, **{"seconds/paused": 80.0}),
        evaluation(2, 0.3),
        step(3, sampled_tokens=300, step_tool_calls=5, seconds=6.0),
    ]
    run = group(write(tmp_path / "run", records))
    training, held_out = curve(run, "em"), curve(run, "em", "greedy")
    assert {name: spent.tolist() for name, spent in training.costs.items()} == {
        "sampled_tokens": [100, 250, 300],
        "tool_calls": [3, 7, 12],
        "seconds": [5, 15, 21],  # without the pause
    }
    assert held_out.step.tolist() == [0, 2]
    assert held_out.costs["tool_calls"].tolist() == [0, 7]
    assert held_out.costs["seconds"].tolist() == [0, 15]
    success = curve(run, "metrics/success", "greedy")
    np.testing.assert_allclose(success.mean, [0.1, 0.3])


def test_what_a_run_has_not_recorded_is_not_made_up(tmp_path: Path) -> None:
    old = [step(1), step(2), evaluation(2, 0.5)]
    for record in old:
        record.pop("step_tool_calls", None)
    run = group(write(tmp_path / "old", [evaluation(0, 0.1), *old]))
    assert np.isnan(curve(run, "em").costs["tool_calls"]).all()
    assert np.isnan(curve(run, "em", "greedy").costs["tool_calls"]).all()
    gap = group(write(tmp_path / "gap", [step(1), step(3)]))  # what step 2 called is not known
    np.testing.assert_allclose(curve(gap, "em").costs["tool_calls"], [10, np.nan])
    np.testing.assert_allclose(curve(gap, "em").costs["sampled_tokens"], [1000, 3000])
    assert curve(run, "no such number").step.tolist() == []


def test_long_curves_are_smoothed_within_each_run(tmp_path: Path) -> None:
    records = [step(i + 1, em=float(i % 2)) for i in range(1000)]
    found = curve(group(write(tmp_path / "run", records)), "em")
    assert found.window == 25
    assert len(found.mean) == 1000
    assert np.abs(found.mean[12:-12] - 0.5).max() == pytest.approx(0.02)  # 12 or 13 of 25 are 1


# --- forks and cost --------------------------------------------------------------------------------------


def test_fork_points_are_siblings_with_what_came_of_them() -> None:
    # The tree's chains and its second fork begin at the root: turns 1, 3 and 6, first of them of entropy 0.9,
    # with leaves of rewards 1, 1, 0, 0. The first fork is turn 5 beside turn 2, both right.
    first, second = fork_points(small_tree())
    assert (first.depth, first.entropy, first.siblings, first.leaves) == (1, pytest.approx(0.9), 3, 4)
    assert first.variance == pytest.approx(0.25)
    assert (second.depth, second.entropy, second.siblings, second.leaves) == (2, pytest.approx(0.5), 2, 2)
    assert second.variance == 0.0


def test_forks_are_averaged_by_depth_within_each_run_first(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a", [step(1)]), write(tmp_path / "b", [step(1)])
    # Run b keeps a second tree whose leaves all fail: variances 0.25 and 0 at depth 1.
    failed = small_tree().with_leaf_rewards([0.0] * 4)
    line = json.dumps({"step": 2, "tree": failed.to_json()}) + "\n"
    (two / "trees" / "step_000002.jsonl").write_text(line, encoding="utf-8")
    found = forks(group(one, two))
    assert len(found.points) == 6
    assert found.by_depth.x.tolist() == [1, 2]
    # a: 0.25; b: 0.125; their mean is not that of the three fork points.
    np.testing.assert_allclose(found.by_depth.mean, [0.1875, 0.0])
    assert found.by_depth.points.tolist() == [3, 3]
    assert found.by_depth.runs.tolist() == [2, 2]


def test_rank_correlation_is_spearmans() -> None:
    # Ranks 1 2 3 and 1 3 2: 1 - 6 (0 + 1 + 1) / (3 * 8) = 0.5.
    assert rank_correlation(np.array([1.0, 10.0, 11.0]), np.array([0.0, 9.0, 5.0])) == pytest.approx(0.5)
    # Ties share their mean rank: 1 2.5 2.5 4 against 1 2 3 4, deviations (-1.5, 0, 0, 1.5) and
    # (-1.5, -0.5, 0.5, 1.5): 4.5 / sqrt(4.5 * 5) = 0.948683.
    tied = rank_correlation(np.array([1.0, 2.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0, 4.0]))
    assert tied == pytest.approx(0.948683)
    assert math.isnan(rank_correlation(np.array([1.0, 2.0]), np.array([3.0, 3.0])))


def test_cost_is_the_mean_of_a_step_by_phase(tmp_path: Path) -> None:
    a = write(tmp_path / "a", [step(1), step(2, **{"seconds/paused": 8.0, "seconds/own": 1.0})])
    b = write(tmp_path / "b", [step(1, **{"seconds/sampling": 5.0}), step(2)])
    found = cost(group(a, b))
    assert {name: each.tolist() for name, each in found.phases.items()} == {
        "sampling": [4.0, 3.0],
        "update": [2.0, 2.0],
        "paused": [0.0, 4.0],
        "own": [0.0, 0.5],
    }
    many = cost(group(write(tmp_path / "many", [step(i) for i in range(1, 1001)])))
    assert (many.first[0], many.last[0], many.first[-1], many.last[-1]) == (1, 25, 976, 1000)
    np.testing.assert_allclose(many.phases["sampling"], 3.0)


# --- figures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_figure_is_drawn_of_short_and_of_long_runs(tmp_path: Path, steps: int) -> None:
    records = [evaluation(0, 0.2), *(step(i) for i in range(1, steps + 1)), evaluation(steps, 0.6)]
    plots = plot_runs([write(tmp_path / "run", records)], tmp_path / "out")
    assert list(plots.files) == list(FIGURES)
    assert (plots.left_out, plots.notes) == ({}, [])
    for file in plots.files.values():
        assert (imread(file)[..., :3] < 0.99).any(axis=-1).mean() > 0.005, file


def test_equal_runs_give_equal_files(tmp_path: Path) -> None:
    run = write(tmp_path / "run", [evaluation(0, 0.2), step(1), step(2)])
    for image in ("png", "svg"):
        first, second = (plot_runs([run], tmp_path / place, only=["forks"], image=image) for place in "ab")
        for name, file in first.files.items():
            assert file.read_bytes() == second.files[name].read_bytes(), file


def test_the_printed_numbers_are_the_drawn_ones_and_json(tmp_path: Path) -> None:
    runs = [
        write(tmp_path / str(seed), [step(1, em=em)], settings={"run": {"seed": seed}})
        for seed, em in enumerate((0.2, 0.4))
    ]
    chosen = ["training", "exact_match", "forks", "cost"]
    plots = plot_runs(runs, tmp_path / "out", only=chosen)
    told = json.loads(json.dumps(plots.to_json(), allow_nan=False))
    assert told["groups"] == [{"label": "at2po", "runs": [str(run) for run in runs]}]
    (training,) = (each for each in told["figures"]["exact_match"]["numbers"] if each["kind"] == "training")
    assert training["mean"] == [pytest.approx(0.3)]
    assert training["high"] == [pytest.approx(0.3 + 1.2706)]
    assert training["runs"] == [2]
    assert told["figures"]["training"]["numbers"]["update_norm"][0]["mean"] == [0.03]
    assert told["figures"]["cost"]["numbers"][0]["phases"]["sampling"] == [3.0]
    points = told["figures"]["forks"]["numbers"][0]["points"]
    assert points[0]["variance"] == pytest.approx(0.25)
    assert Path(told["figures"]["forks"]["file"]).is_file()


def test_a_run_that_is_given_twice_counts_once(tmp_path: Path) -> None:
    run = write(tmp_path / "run", [step(1)], settings={})
    (only,) = plot_runs([run, tmp_path / "." / "run"], tmp_path / "out", only=["cost"]).groups
    assert len(only.runs) == 1
    other = write(tmp_path / "copy", [step(1)], settings={})
    plots = plot_runs([run, other], tmp_path / "out", only=["cost"])
    assert plots.notes == ["at2po: runs of one seed count as independent in its intervals"]


def test_only_the_figure_of_trees_is_missing_without_trees(tmp_path: Path) -> None:
    run = write(tmp_path / "run", [step(1)], trees=False)
    plots = plot_runs([run], tmp_path / "out")
    assert set(FIGURES) - set(plots.files) == {"forks"}
    assert plots.left_out["forks"].startswith(f"{run}: no trees there.")
    (run / "trees").mkdir()
    (run / "trees" / "step_000001.jsonl").write_text("nonsense\n", encoding="utf-8")
    plots = plot_runs([run], tmp_path / "out", only=["forks", "cost"])
    assert list(plots.files) == ["cost"]
    assert "line 1: not JSON" in plots.left_out["forks"]


def test_where_one_of_several_runs_has_trees_the_figure_says_whose(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", [step(1)]), write(tmp_path / "b", [step(1)], trees=False)
    plots = plot_runs([a, b], tmp_path / "out", only=["forks"])
    assert [each.label for each in plots.numbers["forks"]] == ["a"]
    assert len(plots.notes) == 1
    assert plots.notes[0].startswith(f"forks: {b}: no trees there.")


def test_an_old_run_is_drawn_without_what_it_lacks(tmp_path: Path) -> None:
    old = [{"kind": "train", "step": i, "em": 0.5, "reward": 0.5, "entropy": 1.0} for i in (1, 2)]
    plots = plot_runs([write(tmp_path / "old", old, trees=False)], tmp_path / "out")
    assert set(plots.files) == {"training", "exact_match", "reward"}
    assert set(plots.left_out) == {"forks", "cost"}  # no run reports success: it is not missed
    assert plots.notes[:3] == [
        "training: old has no turn_kl",
        "training: old has no clip_fraction",
        "training: old has no update_norm",
    ]
    assert "exact_match: no run tells its tool calls" in plots.notes


def test_a_run_that_writes_its_last_line_is_drawn(tmp_path: Path) -> None:
    run = write(tmp_path / "run", [step(1), step(2)])
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "train", "step": 3, "em": 0.')
    plots = plot_runs([run], tmp_path / "out", only=["exact_match"])
    assert plots.numbers["exact_match"][0].step.tolist() == [1, 2]
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('5}\n{"kind": "train", "step": 3, "em": 0.75}\n')  # done again after a resume
    plots = plot_runs([run], tmp_path / "out", only=["exact_match"])
    assert plots.numbers["exact_match"][0].mean.tolist() == [0.5, 0.5, 0.75]


@pytest.mark.parametrize("record", [{"kind": "train"}, {"kind": ["train"], "step": "one"}])
def test_a_record_without_a_step_names_the_file(tmp_path: Path, record: dict[str, Any]) -> None:
    run = write(tmp_path / "run", [step(1), record])
    with pytest.raises(DataError, match=r"metrics\.jsonl: a record has no number as step"):
        plot_runs([run], tmp_path / "out")
