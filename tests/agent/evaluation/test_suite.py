import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.guess_env import CharTokenizer
from rich.console import Console
from typer.testing import CliRunner

from at2po_agent.agents.agent import Agent
from at2po_agent.cli.app import app
from at2po_agent.cli.eval import results_file, take_json_file
from at2po_agent.config.loading import load_config
from at2po_agent.config.sections import Config
from at2po_agent.evaluation import published
from at2po_agent.evaluation.metrics import wilson_interval
from at2po_agent.evaluation.suite import Source, evaluate_suite, find_questions
from at2po_agent.policies.scripted import ScriptedPolicy
from at2po_agent.report.tables import print_suite
from at2po_agent.runs.progress import Progress
from at2po_env.data import At2poSampleWarning
from at2po_env.errors import ConfigError

ANSWER = "<think> easy </think> <answer> \\boxed{ Ada } </answer>"
ROWS = {row.name: row for row in published.PUBLISHED}


def figures(row: published.PublishedRow) -> dict[str, dict[str, Any]]:
    """Published percentages in the form of results."""
    shares = {name: percent / 100 for name, percent in row.sets.items()}
    return {name: {"em": em, "em_low": em, "em_high": em, "questions": 1} for name, em in shares.items()}


def print_of(results: dict[str, Any], *, width: int = 140) -> str:
    console = Console(width=width, file=io.StringIO())
    print_suite(console, results, "mine")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# --- sets and averages -----------------------------------------------------------------------------------


def test_the_weights_are_the_sizes_of_the_evaluated_splits():
    sizes = {
        name: (published.published_split(name), published.set_size(name))
        for name in published.suite_sets("all")
    }
    assert sizes == {
        "hotpotqa": ("dev", 7405),
        "2wikimultihopqa": ("dev", 12576),
        "musique": ("dev", 2417),
        "bamboogle": ("test", 125),
        "nq": ("test", 3610),
        "triviaqa": ("test", 11313),
        "popqa": ("test", 14267),
    }


def test_a_published_average_by_hand():
    # AT²PO: (49.44 x 7405 + 52.99 x 12576 + 24.80 x 2417 + 56.80 x 125) / 22523
    #      = (366103.20 + 666402.24 + 59941.60 + 7100.00) / 22523 = 1099547.04 / 22523 = 48.8189
    average = published.group_average("multihop", figures(ROWS["AT²PO"]))
    assert average is not None
    assert 100 * average.em == pytest.approx(48.8189, abs=1e-4)
    assert (average.partial, average.questions) == (False, 4)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("group", published.GROUPS)
def test_published_averages_follow_from_the_sets_when_weighted_by_questions(name: str, group: str):
    average = published.group_average(group, figures(ROWS[name]))
    assert average is not None
    printed = ROWS[name].averages[group]
    if (name, group) == ("AT²PO", "singlehop"):  # the paper's own slip, which PUBLISHED_REMARK tells
        assert 100 * average.em == pytest.approx(56.56, abs=0.01)
        assert printed == 56.44
    else:
        assert 100 * average.em == pytest.approx(printed, abs=0.02)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("group", published.GROUPS)
def test_the_plain_mean_of_the_sets_is_another_number(name: str, group: str):
    # negative control
    plain = sum(ROWS[name].sets[key] for key in published.GROUPS[group]) / len(published.GROUPS[group])
    assert abs(plain - ROWS[name].averages[group]) > 0.2


def test_the_interval_of_one_set_is_wilsons():
    # p = 0.5, n = 200: 0.4314 .. 0.5686 (test_evaluate has the derivation)
    mean, low, high = published.weighted_interval([125], [0.5], [wilson_interval(0.5, 200)])
    assert (mean, low, high) == pytest.approx((0.5, 0.4314, 0.5686), abs=1e-4)


def test_intervals_of_several_sets_add_in_quadrature_each_side_on_its_own():
    # weights 3/4 and 1/4; distances down 0.04 and 0.12, up 0.08 and 0.08: mean 0.15 + 0.15 = 0.3;
    # down sqrt(0.03^2 + 0.03^2) = 0.042426; up sqrt(0.06^2 + 0.02^2) = 0.063246
    got = published.weighted_interval([300, 100], [0.2, 0.6], [(0.16, 0.28), (0.48, 0.68)])
    assert got == pytest.approx((0.3, 0.257574, 0.363246), abs=1e-6)


def test_the_interval_covers_the_weighted_mean_as_often_as_it_says():
    # 500 questions of three sets and all 125 of the fourth, as eval.questions=500 asks them
    rng = np.random.default_rng(0)
    weights, asked = np.array([7405, 12576, 2417, 125]), np.array([500, 500, 500, 125])
    shares = np.array([0.4944, 0.5299, 0.2480, 0.5680])
    truth = float(weights @ shares / weights.sum())
    covered = pooled_covered = 0
    for right in rng.binomial(asked, shares, size=(1000, 4)):
        seen = right / asked
        intervals = [wilson_interval(float(p), int(n)) for p, n in zip(seen, asked, strict=True)]
        _, low, high = published.weighted_interval(list(weights), list(seen), intervals)
        covered += low <= truth <= high
        low, high = wilson_interval(float(right.sum() / asked.sum()), int(asked.sum()))
        pooled_covered += low <= truth <= high
    assert 0.93 <= covered / 1000 <= 0.97
    assert pooled_covered / 1000 < 0.5  # negative control: Wilson's interval of all answers in one heap


def test_an_average_over_fewer_sets_is_partial_and_names_them():
    some = {key: value for key, value in figures(ROWS["GRPO"]).items() if key in ("nq", "popqa")}
    average = published.group_average("singlehop", some)
    assert average is not None
    assert (average.partial, average.sets, average.missing) == (True, ("nq", "popqa"), ("triviaqa",))
    # (45.98 x 3610 + 49.18 x 14267) / 17877 = (165987.80 + 701651.06) / 17877
    assert 100 * average.em == pytest.approx(48.5338, abs=1e-4)
    assert published.group_average("multihop", some) is None


# --- where questions are ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Questions of two sets, a corpus of one passage, an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AT2PO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "140")
    write_questions(tmp_path / "qa" / "hotpotqa" / "dev.jsonl", ["Ada", "Bob"])
    write_questions(tmp_path / "qa" / "bamboogle" / "test.jsonl", ["Bob", "Ada", "Eve"])
    passage = {"id": "0", "contents": '"Ada"\nAda wrote the first program.'}
    (tmp_path / "corpus.jsonl").write_text(json.dumps(passage) + "\n", encoding="utf-8")
    return tmp_path


def write_questions(file: Path, answers: list[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"id": str(number), "question": "Who?", "golden_answers": [answer]}
        for number, answer in enumerate(answers)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def config_for(folder: Path, *more: str) -> Config:
    data = [f"dataset={folder / 'qa'}", f"corpus={folder / 'corpus.jsonl'}"]
    return load_config("at2po-search", [*data, *more])


def scripted() -> ScriptedPolicy:
    return ScriptedPolicy(lambda _: ANSWER, CharTokenizer())


def test_questions_are_looked_for_in_the_folder_then_the_cache_then_the_sample(folder: Path):
    qa = str(folder / "qa")
    assert find_questions("hotpotqa", qa) == Source("given", "dev", folder / "qa/hotpotqa/dev.jsonl")
    assert find_questions("nq", qa) == Source("missing", "test", None)
    assert find_questions("nq", None) == Source("sample", "test", None)
    for split in ("dev", "test"):
        file = folder / "cache" / "datasets" / "nq" / f"{split}.jsonl"
        write_questions(file, ["Ada"])
        assert find_questions("nq", None) == Source("cache", split, file)


def test_one_file_is_not_seven_sets(folder: Path):
    with pytest.raises(ConfigError, match=r"folder with NAME/test\.jsonl"):
        find_questions("nq", str(folder / "qa" / "hotpotqa" / "dev.jsonl"))


# --- evaluation ------------------------------------------------------------------------------------------


def test_sets_that_are_there_are_asked_and_the_others_are_missing(folder: Path):
    file = folder / "out" / "results.json"
    results = evaluate_suite(config_for(folder), "multihop", Progress(), policy=scripted(), files=[file])
    assert json.loads(file.read_text(encoding="utf-8")) == results
    assert results["complete"]
    # "Ada" answers one of two questions of HotpotQA, and one of three of Bamboogle
    sets = results["sets"]
    assert {name: one["origin"] for name, one in sets.items()} == {
        **{"hotpotqa": "given", "2wikimultihopqa": "missing", "musique": "missing", "bamboogle": "given"}
    }
    assert (sets["hotpotqa"]["figures"]["questions"], sets["hotpotqa"]["figures"]["em"]) == (2, 0.5)
    assert sets["bamboogle"]["figures"]["em"] == pytest.approx(1 / 3)
    assert sets["bamboogle"]["figures"]["em_high"] == pytest.approx(wilson_interval(1 / 3, 3)[1])
    # by hand: half of 7405 and a third of 125 are 3744.1667 of 7530
    average = results["averages"]["multihop"]
    assert average["em"] == pytest.approx(0.497233, abs=1e-6)
    assert (average["partial"], average["missing"]) == (True, ["2wikimultihopqa", "musique"])
    text = print_of(results)
    assert "49.72*" in text
    assert "Missing: 2Wiki, MuSiQue" in text
    assert text.count("0 of 2,417") == 1
    assert "48.81" in text
    assert "arXiv 2601.04767" in text
    assert "56.56" in text  # the remark on the published average that does not add up


def test_the_tables_fit_a_narrow_terminal(folder: Path):
    write_questions(folder / "qa" / "nq" / "test.jsonl", ["Ada"])
    results = evaluate_suite(config_for(folder), "all", Progress(), policy=scripted())
    lines = print_of(results, width=80).splitlines()
    multihop, singlehop = [line.split() for line in lines if line.startswith("  AT²PO")]
    assert multihop == ["AT²PO", "(published)", "49.44", "52.99", "24.80", "56.80", "48.81"]
    assert singlehop == ["AT²PO", "(published)", "47.90", "65.32", "51.81", "56.44"]
    own = [line.split() for line in lines if line.startswith("  mine")]
    assert own == [["mine", "50.00", "–", "–", "33.33", "49.72*"], ["mine", "100.00", "–", "–", "100.00*"]]


def test_eval_questions_limits_every_set(folder: Path):
    limited = config_for(folder, "eval.questions=1")
    results = evaluate_suite(limited, "multihop", Progress(), policy=scripted())
    asked = {name: one["figures"] and one["figures"]["questions"] for name, one in results["sets"].items()}
    assert asked == {"hotpotqa": 1, "2wikimultihopqa": None, "musique": None, "bamboogle": 1}
    with pytest.raises(ConfigError, match=r"eval\.questions"):
        evaluate_suite(config_for(folder, "eval.questions=0"), "all", Progress(), policy=scripted())


def test_what_is_asked_is_greedy_and_one_chain_per_question(folder: Path):
    requests: list[Any] = []

    class Watched(ScriptedPolicy):
        def generate(self, asked: Any) -> Any:
            requests.extend(asked)
            return super().generate(asked)

    policy = Watched(lambda _: ANSWER, CharTokenizer())
    evaluate_suite(config_for(folder), "multihop", Progress(), policy=policy)
    assert [request.temperature for request in requests] == [0.0] * 5


def test_a_set_that_breaks_off_leaves_those_before_it_on_disk(folder: Path):
    (folder / "qa" / "bamboogle" / "test.jsonl").write_text("not JSON\n", encoding="utf-8")
    file = folder / "results.json"
    with pytest.raises(Exception, match=r"test\.jsonl"):
        evaluate_suite(config_for(folder), "multihop", Progress(), policy=scripted(), files=[file])
    kept = json.loads(file.read_text(encoding="utf-8"))
    assert (kept["complete"], kept["sets"]["hotpotqa"]["figures"]["em"]) == (False, 0.5)


def test_a_folder_without_any_set_is_an_error(folder: Path):
    with pytest.raises(ConfigError, match="holds none of nq, triviaqa, popqa"):
        evaluate_suite(config_for(folder), "singlehop", Progress(), policy=scripted())


def test_figures_from_the_sample_are_marked_as_not_comparable(folder: Path):
    del folder  # an empty cache, and no dataset
    with pytest.warns(At2poSampleWarning, match="ship with at2po"):
        results = evaluate_suite(load_config("at2po-search"), "singlehop", Progress(), policy=scripted())
    assert {one["origin"] for one in results["sets"].values()} == {"sample"}
    assert results["passages"]["origin"] == "sample"
    text = print_of(results)
    assert "Warning: NOT COMPARABLE with the published figures: NQ, Trivia, PopQA" in text
    assert text.count("SAMPLE, not comparable (test)") == 3
    assert "12 of 3,610" in text


def test_a_run_in_another_world_hands_on_what_all_environments_share(folder: Path):
    data = [f"dataset={folder / 'qa'}", f"corpus={folder / 'corpus.jsonl'}"]
    config = load_config("quickstart", [*data, "env.kwargs.max_turns=3"])
    results = evaluate_suite(config, "multihop", Progress(), policy=scripted())
    assert results["environment"] == {"max_turns": 3}  # not worlds, hops and split of MiniWiki


# --- command line ----------------------------------------------------------------------------------------


def test_the_command_prints_the_table_and_leaves_files(folder: Path, monkeypatch: pytest.MonkeyPatch):
    ready = Agent(None, scripted())  # type: ignore[arg-type]
    monkeypatch.setattr("at2po_agent.evaluation.target.build_agent", lambda _: ready)
    command = ["eval", "some/model", "--suite", "multihop", "dataset=qa", "corpus=corpus.jsonl"]
    shown = CliRunner().invoke(app, [*command, "--json", "mine.json"])
    assert shown.exit_code == 0, shown.output
    assert "49.72*" in shown.stdout
    assert shown.stdout.endswith("suite_multihop.json\nmine.json\n")
    mine = json.loads((folder / "mine.json").read_text(encoding="utf-8"))
    assert mine == json.loads((folder / "suite_multihop.json").read_text(encoding="utf-8"))
    assert mine["model"] == "some/model"
    printed = CliRunner().invoke(app, [*command, "--json"])
    assert json.loads(printed.stdout) == mine
    assert (folder / "suite_multihop-2.json").exists()  # nothing is overwritten


def test_a_misspelt_suite_is_one_message(folder: Path):
    del folder
    result = CliRunner().invoke(app, ["eval", "some/model", "--suite", "multi"])
    assert result.exit_code == 2
    assert "--suite: got 'multi', expected one of multihop, singlehop, all" in result.stderr


def test_results_belong_to_the_run(folder: Path):
    config = load_config("quickstart")
    (folder / "run").mkdir()
    assert results_file(config, "run", "all") == Path("suite_all.json")  # a model's folder
    (folder / "run" / "config.yaml").touch()
    assert results_file(config, "run", "all") == Path("run/suite_all.json")
    checkpoint = load_config("quickstart", ["run.dir=run"])
    assert results_file(checkpoint, "run/checkpoints/step_000001", "all") == Path("run/suite_all.json")


def test_the_file_of_json_is_the_word_that_sets_nothing():
    assert take_json_file(["a.json", "eval.questions=1"], as_json=True) == (
        ["eval.questions=1"],
        Path("a.json"),
    )
    assert take_json_file(["eval.questions=1"], as_json=True) == (["eval.questions=1"], None)
    assert take_json_file(["a.json"], as_json=False) == (["a.json"], None)  # then it is a wrong override
    with pytest.raises(ConfigError, match="got 2 files"):
        take_json_file(["a.json", "b.json"], as_json=True)
