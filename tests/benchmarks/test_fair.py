"""The race at equal effort: what its figures mean, and that it goes on where it stopped."""

import json
import math

import pytest

from at2po_agent.config.loading import load_config
from benchmarks import fair
from benchmarks.fair import ABLATIONS, BASE, METHODS, RATES, SHARES, TASKS, Job, Setting, best_settings
from benchmarks.fair_report import clustered, compare, holm, mean_curve, tokens_to_reach, write_report


def job(task="stops", method="grpo", updates=4, **changed):
    return Job(task, method, 0, 3, Setting(4e-4, 0.05), 1000, updates, "somewhere", "x")._replace(**changed)


def figures(method, start, seed, em, *, task="stops", rate=4e-4, share=0.05):
    place = {"task": task, "method": method, "start": start, "seed": seed, "rate": rate, "share": share}
    ends = {"budget": 1000, "updates_per_step": 4, "sampled_em": em, "em": em, "start_em": 0.1, "way_em": em}
    cost = {"sampled_tokens": 1000, "steps": 2, "updates": 8, "tool_calls": 40, "training_seconds": 1.0}
    return {**place, **ends, **cost, "seconds": 2.0, "curve": [[0, 0.1], [1000, em]]}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", [*METHODS, *ABLATIONS])
def test_all_rows_differ_in_nothing_but_the_method(task, method):
    config = load_config(BASE, job(task, method).overrides)
    assert config.algorithm.kl_weight == 0.0
    assert config.algorithm.loss_options["aggregation"] == "token"
    assert config.algorithm.clip_share == 0.05
    leaves = config.rollout.leaves * config.train.questions
    assert 192 <= leaves <= 256  # in a step
    assert config.train.questions // config.train.minibatch_questions == 4
    assert config.env.kwargs["hops"] == ([2, 3] if task == "stops" else [5, 6])


@pytest.mark.parametrize("updates", [1, 4, 16])
def test_the_number_of_updates_in_a_step_is_what_is_asked_for(updates):
    for method in METHODS:
        config = load_config(BASE, job(method=method, updates=updates).overrides)
        assert config.train.questions // config.train.minibatch_questions == updates


def test_runs_from_one_start_count_as_one():
    # Means of the starts: 0.2 and 0.4. Standard error: sqrt(0.02) / sqrt(2) = 0.1; t = 3 with one degree of
    # freedom: p = 1 - 2 atan(3) / pi. As six independent numbers the error would be 0.045.
    pairs = [(0, 0.1), (0, 0.2), (0, 0.3), (1, 0.3), (1, 0.4), (1, 0.5)]
    mean, error, p, clusters = clustered(pairs)
    assert (mean, error, clusters) == (pytest.approx(0.3), pytest.approx(0.1), 2)
    assert p == pytest.approx(1 - 2 * math.atan(3) / math.pi)
    assert math.isnan(clustered([(0, 0.1), (0, 0.2)])[1])


def test_holms_correction():
    # Sorted: 0.01 * 3, 0.02 * 2, 0.04 * 1 -> 0.03, 0.04, 0.04; without a p-value nothing is corrected.
    assert holm([0.04, 0.01, math.nan, 0.02]) == pytest.approx([0.04, 0.03, math.nan, 0.04], nan_ok=True)
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_methods_are_compared_on_the_same_start_and_seed():
    runs = [figures("at2po", 0, 0, 0.5), figures("grpo", 0, 0, 0.4), figures("grpo", 0, 1, 0.9)]
    runs += [figures("at2po", 1, 0, 0.6), figures("grpo", 1, 0, 0.6)]
    (found,) = compare(runs)
    assert (found.first, found.second, found.runs, found.starts) == ("at2po", "grpo", 2, 2)
    assert found.difference == pytest.approx(0.05)


def test_the_best_settings_are_those_that_all_seeds_tried():
    runs = [figures("grpo", 100, seed, 0.9, rate=8e-4) for seed in (100, 101)]
    runs += [figures("grpo", 100, seed, 0.5, rate=4e-4) for seed in (100, 101, 102)]
    assert best_settings(runs[:3], 1) == [Setting(8e-4, 0.05)]
    assert best_settings(runs, 3) == [Setting(4e-4, 0.05)]
    assert best_settings([], 1) == []


def test_tuning_gives_every_method_the_same_effort(tmp_path, monkeypatch):
    done = []

    def pretend(jobs, _):
        for one in jobs:
            path = tmp_path / one.task / "tuning" / one.result.rsplit("/", 1)[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            em = one.setting.rate  # the highest rate wins
            path.write_text(json.dumps(figures(one.method, 100, one.seed, em, rate=one.setting.rate,
                                               share=one.setting.share)))  # fmt: skip
            done.append(one)

    monkeypatch.setattr(fair, "do", pretend)
    monkeypatch.setattr(fair, "prepare", lambda *_: tmp_path)
    fair.main(["--out", str(tmp_path), "--tune", "--tasks", "stops"])
    for method in METHODS:
        own = [one for one in done if one.method == method]
        assert len(own) == 2 * len(RATES) * len(SHARES) + 3 * 4
        assert {one.setting.rate for one in own if one.seed >= 102} == {max(RATES)}


def test_a_race_takes_the_tuned_settings_and_wants_them(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(fair, "do", lambda jobs, _: done.extend(jobs))
    monkeypatch.setattr(fair, "prepare", lambda *_: tmp_path)
    arguments = ["--out", str(tmp_path), "--tasks", "stops", "--methods", "grpo", "--seeds", "2"]
    with pytest.raises(SystemExit, match="grpo has no tuning runs on stops"):
        fair.main(arguments)
    (tmp_path / "stops" / "tuning").mkdir(parents=True)
    (tmp_path / "stops" / "tuning" / "a.json").write_text(
        json.dumps(figures("grpo", 100, 100, 0.4, rate=2e-4))
    )
    fair.main(arguments)
    assert [(one.start, one.seed) for one in done] == [(s, seed) for seed in (0, 1) for s in range(4)]
    assert {one.setting for one in done} == {Setting(2e-4, 0.05)}


def test_curves_are_read_between_their_points():
    assert tokens_to_reach([[0, 0.1], [100, 0.3]], 0.2) == pytest.approx(50)
    assert tokens_to_reach([[0, 0.1], [100, 0.3]], 0.4) is None
    assert tokens_to_reach([[0, 0.5]], 0.4) == 0
    curves = [figures("grpo", 0, 0, 0.3), {"curve": [[0, 0.1], [2000, 0.5]]}]
    assert mean_curve(curves, points=3)[-1] == (1000, pytest.approx((0.3 + 0.3) / 2))


def test_the_report_says_what_was_run_and_keeps_the_text_around_it(tmp_path):
    runs = [
        figures(method, start, 0, em) for start in (0, 1) for method, em in (("grpo", 0.4), ("surpo", 0.6))
    ]
    write_report(runs, runs[:1], tmp_path)
    page = tmp_path / "fair.md"
    assert "surpo - grpo | +0.200" in page.read_text()
    page.write_text("before\n" + page.read_text() + "after\n")
    write_report(runs[:2], [], tmp_path)
    assert page.read_text().startswith("before\n")
    assert page.read_text().rstrip().endswith("after")
    assert len((tmp_path / "fair.csv").read_text().splitlines()) == 3
    assert (tmp_path / "fair.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_run_from_its_own_cold_start(tmp_path, monkeypatch):
    small = ("cold_start.demonstrations=20", "model.layers=1")
    monkeypatch.setattr(fair, "TASKS", {"stops": small})
    monkeypatch.setattr(fair, "COLD_STARTS", (3, 5))
    with pytest.raises(SystemExit, match=r"does not reach 0\.08 sampled EM in 5 steps"):
        fair.prepare(tmp_path, "stops", 7)
    monkeypatch.setattr(fair, "LEAST_EM", 0.0)
    monkeypatch.setattr(fair, "QUESTIONS", 6)
    monkeypatch.setattr(fair, "SAMPLES", 2)
    checkpoint = fair.prepare(tmp_path, "stops", 7)
    one = job(method="surpo", checkpoint=str(checkpoint), budget=400)
    found = fair.run(one)
    assert found["sampled_tokens"] > 0
    assert found["updates"] == 4 * found["steps"]
    assert found["curve"][-1] == (found["sampled_tokens"], found["sampled_em"])
    assert fair.prepare(tmp_path, "stops", 7) == checkpoint
    assert checkpoint.parent.parent.name == "start_7_3"  # the first that will do
