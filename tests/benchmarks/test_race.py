"""The race of the algorithms: what its figures mean, and that it goes on where it stopped."""

import csv
import json
import math

import pytest

from at2po_agent.config.loading import load_config
from benchmarks.algorithms import main, parse
from benchmarks.race import (
    BASE,
    METHODS,
    TUNING_SEED,
    Job,
    jobs_to_do,
    next_step_fits,
    prepare,
    tuned_rates,
)
from benchmarks.race_report import estimate, table, tokens_to_reach, write_report


def result(method: str, seed: int, em: float) -> dict[str, object]:
    curve = [{"sampled_tokens": 0, "sampled_em": 0.1}, {"sampled_tokens": 1000, "sampled_em": em}]
    figures = {"em": em, "sampled_em": em, "start_sampled_em": 0.1, "mean_sampled_em": em}
    rest = {"turn_kl_entropy": 0.5, "clip_fraction": 0.1, "token_kl": None, "steps": 2, "leaves": 12.0}
    place = {"method": method, "seed": seed, "sampled_tokens": 1000, "rate": 1e-4, "seconds": 1.0}
    place["budget"] = 1000
    return {**place, **figures, **rest, "curve": curve}


@pytest.mark.parametrize("method", METHODS)
def test_every_row_is_a_valid_configuration_with_as_many_leaves(method):
    job = Job(method, 3, 1e-4, 1000, "somewhere", "")
    config = load_config(BASE, job.overrides)
    assert config.rollout.leaves == 12
    assert config.run.seed == 3
    assert config.optimizer.lr == 1e-4


def test_the_ablation_adds_one_part_at_a_time():
    rows = ["random tree + GRPO loss", "random tree + turn loss", "entropy tree + turn loss", "at2po"]
    found = [load_config(BASE, Job(row, 0, 1e-4, 1, "x", "").overrides) for row in rows]
    parts = [(c.rollout.expansion, c.algorithm.credit, c.algorithm.loss) for c in found]
    assert parts == [
        ("random", "group", "grpo"),
        ("random", "group", "atpo"),
        ("entropy", "group", "atpo"),
        ("entropy", "tree", "atpo"),
    ]
    assert found[1].algorithm.loss_options == {"clip_low": 3e-3, "clip_high": 4e-3}


def test_finished_runs_are_not_done_again(tmp_path):
    options = parse(["--out", str(tmp_path), "--methods", "grpo", "dapo", "--seeds", "0", "1"])
    first = jobs_to_do(options, tmp_path)
    assert [(job.method, job.seed) for job in first] == [("grpo", 0), ("dapo", 0), ("grpo", 1), ("dapo", 1)]
    (tmp_path / "runs").joinpath(first[1].result.rsplit("/", 1)[1]).write_text("{}")
    assert [(job.method, job.seed) for job in jobs_to_do(options, tmp_path)] == [
        *[("grpo", 0), ("grpo", 1), ("dapo", 1)]
    ]


def test_tuning_has_seeds_of_its_own(tmp_path):
    options = parse(["--out", str(tmp_path), "--methods", "grpo", "--seeds", "0", "1", "--tune"])
    jobs = jobs_to_do(options, tmp_path)
    assert {job.seed for job in jobs} == {TUNING_SEED, TUNING_SEED + 1}
    assert len({job.rate for job in jobs}) == 3


def test_modes_are_not_tuned_and_take_the_rate_of_at2po(tmp_path):
    assert (
        jobs_to_do(parse(["--out", str(tmp_path), "--methods", "value leaf_mean", "--tune"]), tmp_path) == []
    )
    tuning = tmp_path / "tuning"
    scores = [
        ("at2po", 2e-4, 0, 0.5),
        ("at2po", 2e-4, 1, 0.3),
        ("at2po", 8e-4, 0, 0.45),
        ("at2po", 8e-4, 1, 0.45),
    ]
    for number, (method, rate, seed, score) in enumerate([*scores, ("grpo", 4e-4, 0, 0.6)]):
        figures = result(method, seed, score) | {"rate": rate, "mean_sampled_em": score}
        (tuning / f"{number}.json").write_text(json.dumps(figures))
    rates = tuned_rates(tuning)
    assert (rates["at2po"], rates["grpo"], rates["value leaf_mean"]) == (
        8e-4,
        4e-4,
        8e-4,
    )  # 0.45 > (0.5+0.3)/2
    found = jobs_to_do(
        parse(["--out", str(tmp_path), "--methods", "grpo", "at2po", "--seeds", "0"]), tmp_path
    )
    assert [job.rate for job in found] == [4e-4, 8e-4]


def test_other_settings_need_a_name_and_a_place_of_their_own(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(["--set", "algorithm.loss_options.clip_high=0.2"])
    assert "--study" in capsys.readouterr().err
    options = parse(
        ["--out", str(tmp_path), "--methods", "at2po", "--seeds", "0", "--study", "clip", "--set", "a=1"]
    )
    (job,) = jobs_to_do(options, tmp_path)
    assert job.extra == ("a=1",)
    assert "/study-clip/" in job.result


def test_runs_of_another_task_are_refused_in_the_same_folder(tmp_path):
    (tmp_path / "cold_start" / "checkpoints" / "step_000000").mkdir(parents=True)
    (tmp_path / "cold_start" / "checkpoints" / "step_000000" / "state.json").write_text("{}")
    prepare(tmp_path, ["env.kwargs.namesakes=0.3"])
    prepare(tmp_path, ["env.kwargs.namesakes=0.3"])
    with pytest.raises(SystemExit, match=r"namesakes=0\.3"):
        prepare(tmp_path, [])


def test_a_run_ends_as_near_to_the_budget_as_whole_steps_allow():
    assert next_step_fits([], 100)
    assert next_step_fits([{"sampled_tokens": 90, "step_tokens": 20}], 100)
    assert not next_step_fits([{"sampled_tokens": 91, "step_tokens": 20}], 100)


def test_the_interval_is_students():
    # 0.1, 0.2, 0.3: mean 0.2, unbiased std 0.1, t(2) = 4.303: 0.2 +- 4.303 * 0.1 / sqrt 3
    found = estimate([0.1, 0.2, None, 0.3])
    assert found.mean == pytest.approx(0.2)
    assert found.half == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    assert str(estimate([0.5])) == "0.500"
    assert str(estimate([])) == "-"


def test_tokens_to_reach_a_level_are_interpolated():
    curve = [{"sampled_tokens": 0, "sampled_em": 0.1}, {"sampled_tokens": 100, "sampled_em": 0.5}]
    assert tokens_to_reach(curve, 0.3) == pytest.approx(50)
    assert tokens_to_reach(curve, 0.05) == 0
    assert tokens_to_reach(curve, 0.6) is None


def test_the_report_holds_every_run(tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    for number, (method, em) in enumerate([("grpo", 0.4), ("at2po", 0.6), ("at2po", 0.5)]):
        (runs / f"{number}.json").write_text(json.dumps(result(method, number, em)))
    write_report(runs, tmp_path / "report", tuning=runs)
    with (tmp_path / "report" / "algorithms.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["method"], row["seed"]) for row in rows] == [("at2po", "1"), ("at2po", "2"), ("grpo", "0")]
    assert rows[0]["tokens_to_grpo"] == "600"  # 0.1 + 0.5 share = 0.4
    assert list(rows[0])[:5] == ["method", "seed", "sampled_tokens", "em", "sampled_em"]
    text = (tmp_path / "report" / "algorithms.md").read_text()
    assert "| at2po | 0.0001 | 2 | 0.550 ± 0.635 | - |" in text  # t(1) = 12.706 times 0.0707 / sqrt 2
    assert (tmp_path / "report" / "tuning.csv").read_text().count("\n") == 4
    assert (tmp_path / "report" / "algorithms.png").stat().st_size > 10_000


def test_differences_to_grpo_are_those_of_the_same_seeds():
    scores = {"grpo": (0.5, 0.3), "at2po": (0.6, 0.5), "gspo": (0.4, 0.2)}
    runs = [
        {**result(method, seed, em), "tokens_to_grpo": None}
        for method, ems in scores.items()
        for seed, em in enumerate(ems)
    ]
    rows = {line.split(" | ")[0]: line.split(" | ")[4] for line in table(runs).splitlines()[2:]}
    assert rows == {
        "| at2po": "+0.150 ± 0.635",
        "| grpo": "-",
        "| gspo": "-0.100 ± 0.000",
    }  # +0.1 and +0.2: std 0.0707


def test_a_method_without_runs_has_no_row():
    run = {**result("grpo", 0, 0.4), "tokens_to_grpo": 1000}
    assert table([run]).count("\n") == 3


def test_studies_of_several_folders_make_one_report(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(["--studies", str(tmp_path)])
    assert "--report" in capsys.readouterr().err
    for folder, study, em in (("a", "clip-wide", 0.5), ("a", "clip-wide", 0.7), ("b", "deep", 0.2)):
        runs = tmp_path / folder / f"study-{study}"
        runs.mkdir(parents=True, exist_ok=True)
        run = {**result("at2po", int(10 * em), em), "settings": [f"x.{study}=1", "y=2"]}
        (runs / f"{em}.json").write_text(json.dumps(run))
    main(["--studies", str(tmp_path / "a"), str(tmp_path / "b"), "--report", str(tmp_path / "report")])
    with (tmp_path / "report" / "studies.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["study"], row["rules"], row["seed"]) for row in rows] == [
        ("clip-wide", "x.clip-wide=1 y=2", "5"),
        ("clip-wide", "x.clip-wide=1 y=2", "7"),
        ("deep", "x.deep=1 y=2", "2"),
    ]
    text = (tmp_path / "report" / "studies.md").read_text()
    assert (
        "| clip-wide | `x.clip-wide=1` `y=2` | at2po | 1000 | 0.0001 | 2 | 0.100 ± 0.000 | 0.600 ± 1.271 |"
        in text
    )
