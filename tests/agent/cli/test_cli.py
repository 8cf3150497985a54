import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.fake_hub import QUESTIONS, serving
from helpers.report_samples import write_run
from typer.testing import CliRunner

from at2po_agent.cli.app import app, smoke_overrides
from at2po_agent.config.loading import load_config
from at2po_agent.config.sections import Config

AT2PO = [sys.executable, "-c", "from at2po_agent.cli.app import main; main()"]
TINY = [
    *("cold_start.steps=2", "cold_start.demonstrations=20", "train.steps=3", "train.questions=2"),
    *(
        "train.minibatch_questions=1",
        "train.save_every=1",
        "eval.questions=2",
        "eval.every=0",
        "eval.sampled=false",
    ),
    *("rollout.chains=2", "rollout.forks=1", "rollout.rounds=1", "rollout.max_turn_tokens=8"),
    *("model.hidden_size=32", "model.layers=1", "model.ffn_size=32", "run.threads=1"),
]
COMMANDS = ("train", "eval", "export", "view", "plot", "config", "envs", "data")


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    """A runner in an empty folder, with an empty cache, on a wide terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AT2PO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "140")
    return CliRunner()


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )


# --- settings --------------------------------------------------------------------------------------------


def test_settings_are_found_and_explained(cli: CliRunner) -> None:
    result = cli.invoke(
        app, ["config", "learning", "rate", "--of", "quickstart", "--set", "optimizer.lr=0.5"]
    )
    assert result.exit_code == 0
    assert "optimizer.lr = 0.5  (number, above 0; default 1e-06)" in result.output
    assert "Learning rate after the warmup." in result.output
    assert "train.steps" not in result.output
    rows = json.loads(cli.invoke(app, ["config", "optimizer.lr", "--json"]).output)
    assert [row["key"] for row in rows] == ["optimizer.lr"]


def test_settings_are_written_with_comments_and_as_a_schema(cli: CliRunner) -> None:
    assert (
        cli.invoke(app, ["config", "--of", "quickstart", "--out", "mine.yaml"]).output.strip() == "mine.yaml"
    )
    assert load_config("mine.yaml") == load_config("quickstart")
    again = cli.invoke(app, ["config", "--out", "mine.yaml"])
    assert again.exit_code == 2
    assert "exists already" in again.stderr
    assert json.loads(cli.invoke(app, ["config", "--schema"]).output)["title"] == "at2po configuration"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["config", "nosuchword"], "no setting has all of the words"),
        (["config", "--set", "a=1"], "give --of"),
    ],
)
def test_settings_that_cannot_be_shown(cli: CliRunner, arguments: list[str], message: str) -> None:
    result = cli.invoke(app, arguments)
    assert result.exit_code == 2
    assert message in result.stderr


# --- start-up --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["envs", "--json"], ["data", "list"]])
def test_light_commands_import_neither_torch_nor_matplotlib(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from at2po_agent.cli.app import app\n"
        f"result = CliRunner().invoke(app, {arguments!r})\n"
        "assert result.exit_code == 0, result.output\n"
        "print([name for name in ('torch', 'transformers', 'matplotlib', 'jinja2') if name in sys.modules])"
    )
    done = python(code)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_helps_with_examples(cli: CliRunner, command: str) -> None:
    shown = cli.invoke(app, [command, *(["get"] if command == "data" else []), "--help"]).output
    assert f"at2po {command}" in shown.split("Examples:")[1]


def test_the_version_is_that_of_the_distribution(cli: CliRunner) -> None:
    assert cli.invoke(app, ["--version"]).output.startswith("at2po 0.")


def test_without_the_agent_extra_training_names_it(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "sys.argv = ['at2po', 'train', 'quickstart']\n"
        "from at2po_agent.cli.app import main\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 2
    assert "pip install 'at2po[agent]'" in done.stderr
    assert "Traceback" not in done.stderr


# --- errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "quickstrat"], "did you mean quickstart?"),
        (["train", "quickstart", "train.step=3", "rollout.chains=0"], "2 problems"),
        (["train", "quickstart", "nonsense"], "expected key=value"),
        (["train", "quickstart", "--resume"], "no run to resume"),
        (["eval", "quickstart", "--config", "nothing"], "no configuration 'nothing'"),
        (["view", "nowhere"], "nowhere: no trees there"),
        (["plot", "nowhere"], "nowhere: no such folder"),
        (["plot", ".", "--only", "hours"], "no figure named 'hours'"),
        (["data", "get", "nothing"], "There is no data set 'nothing'"),
        (["data", "path", "hotpotqa"], "Fix: at2po data get hotpotqa"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_message(cli: CliRunner, arguments: list[str], message: str) -> None:
    result = cli.invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_a_bug_is_not_dressed_up_as_a_users_error(cli: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("at2po_agent.report.listings.environment_rows", broken)
    result = cli.invoke(app, ["envs"])
    assert isinstance(result.exception, ZeroDivisionError)


def test_a_disk_that_refuses_is_one_message(cli: CliRunner, tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    result = cli.invoke(app, ["view", "a", "--out", "/dev/full"])
    assert result.exit_code == 2
    assert "cannot be written (No space left on device)" in result.stderr


def test_our_warnings_are_one_line_for_the_person_at_the_terminal() -> None:
    code = (
        "import warnings\n"
        "import at2po_agent.cli.app as cli\n"
        "from at2po_env.data import At2poSampleWarning\n"
        "def run(prog_name):\n"
        "    warnings.warn(At2poSampleWarning('a sample'))\n"
        "    warnings.warn('else')\n"
        "cli.app = run\n"
        "cli.main()"
    )
    lines = python(code).stderr.splitlines()
    assert lines[0] == "Warning: a sample"
    assert lines[1].endswith("UserWarning: else")


# --- environments and data -------------------------------------------------------------------------------


def test_environments_are_listed_with_what_they_need(cli: CliRunner, tmp_path: Path) -> None:
    rows = {row["id"]: row for row in json.loads(cli.invoke(app, ["envs", "--json"]).stdout)}
    assert len([name for name in rows if name.startswith("at2po/")]) == 11
    assert rows["at2po/MiniWiki-v0"]["get"] == ""
    assert (rows["at2po/WebShop-v0"]["questions"], rows["at2po/WebShop-v0"]["get"]) == (
        "sample",
        "at2po data get webshop",
    )
    assert rows["at2po/HotpotQA-v0"]["get"] == "at2po data get hotpotqa wiki-18"
    assert not any(name.startswith(("CartPole", "Ant", "phys2d")) for name in rows)
    file = tmp_path / "cache" / "datasets" / "hotpotqa" / "dev.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("{}\n", encoding="utf-8")
    rows = {row["id"]: row for row in json.loads(cli.invoke(app, ["envs", "--json"]).stdout)}
    assert rows["at2po/HotpotQA-v0"]["questions"] == "dev (downloaded)"
    assert rows["at2po/HotpotQA-v0"]["get"] == "at2po data get wiki-18"
    assert "at2po/HotpotQA-v0" in cli.invoke(app, ["envs"]).stdout


def test_data_says_what_there_is_and_where(cli: CliRunner, tmp_path: Path) -> None:
    rows = {row["name"]: row for row in json.loads(cli.invoke(app, ["data", "list", "--json"]).stdout)}
    assert set(rows) > {"hotpotqa", "nq", "wiki-18"}
    assert not rows["hotpotqa"]["complete"]
    assert cli.invoke(app, ["data", "path"]).stdout == f"{tmp_path / 'cache'}\n"


def test_data_is_got_once_and_found_again(cli: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(monkeypatch) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        first = cli.invoke(app, ["data", "get", "bamboogle"])
    assert first.exit_code == 0, first.output
    path = Path(first.stdout.strip())
    assert path.read_bytes() == QUESTIONS
    assert cli.invoke(app, ["data", "path", "bamboogle"]).stdout == first.stdout
    assert "MB" in first.stderr  # no terminal: a plain line instead of a bar


# --- looking at runs -------------------------------------------------------------------------------------


def test_view_writes_the_most_telling_tree(cli: CliRunner, tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "a")
    result = cli.invoke(app, ["view", "runs/a"])
    assert result.stdout == "runs/a/tree.html\n"
    assert "Who founded it?" in (tmp_path / "runs/a/tree.html").read_text(encoding="utf-8")


def test_view_writes_the_tree_that_is_asked_for(cli: CliRunner, tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    file = "a/trees/step_000020.jsonl"
    assert cli.invoke(app, ["view", file, "--question", "q0", "--out", "x.html"]).stdout == "x.html\n"
    html = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert "Who else?" in html
    assert "run a" in html  # found from the file's place
    listed = cli.invoke(app, ["view", "a", "--list"]).stdout
    assert "Who else?" in listed
    assert "Who founded it?" in listed


def test_plot_draws_into_the_first_run_or_the_folder_asked_for(cli: CliRunner, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name)
    result = cli.invoke(app, ["plot", "a", "b", "--only", "exact_match,forks"])
    assert result.stdout == "a/plots/exact_match.png\na/plots/forks.png\n"
    assert (tmp_path / "a/plots/forks.png").read_bytes().startswith(b"\x89PNG")
    again = cli.invoke(app, ["plot", "b", "--only", "forks", "--out", "here", "--format", "svg"])
    assert again.stdout == "here/forks.svg\n"
    assert (tmp_path / "here/forks.svg").read_text(encoding="utf-8").startswith("<?xml")


def test_plot_prints_the_numbers_and_says_what_is_left_out(cli: CliRunner, tmp_path: Path) -> None:
    shutil.rmtree(write_run(tmp_path / "a", steps=2) / "trees")
    result = cli.invoke(app, ["plot", "a", "--json"])
    assert result.exit_code == 0, result.output
    assert "forks is left out: a: no trees there." in result.stderr
    told = json.loads(result.stdout)
    assert told["groups"] == [{"label": "a", "runs": ["a"]}]
    training, greedy = told["figures"]["exact_match"]["numbers"][:2]
    assert (training["kind"], training["step"], training["mean"]) == ("training", [1, 2], [0.01, 0.02])
    assert (greedy["kind"], greedy["mean"], greedy["low"]) == ("greedy", [0.25, 0.75], [None, None])
    assert greedy["costs"]["sampled_tokens"] == [0.0, 2000.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["empty"], "empty: not a run's folder"),
        (["young"], "young: no training step recorded yet. Fix: wait for the first one"),
        (["a", "young"], "young: no training step recorded yet"),
        (["a", "--only", "curve"], "--only: no figure named 'curve'; expected training, exact_match"),
        (["a", "--format", "pdf"], "--format: got 'pdf', expected png or svg"),
        (["a", "--out", "a/config.yaml"], "--out: a/config.yaml is a file, expected a folder"),
        (["a", "--only", "success"], "nothing to plot. success: no run reports success"),
    ],
)
def test_what_cannot_be_plotted_is_one_clear_line(
    cli: CliRunner, tmp_path: Path, arguments: list[str], message: str
) -> None:
    write_run(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "metrics.jsonl").write_text('{"kind": "eval", "mode": "greedy", "step": 0}\n')
    result = cli.invoke(app, ["plot", *arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: {message}")
    assert result.stderr.count("\n") == 1


# --- training --------------------------------------------------------------------------------------------


def test_smoke_only_ever_makes_a_run_smaller() -> None:
    whole = load_config("quickstart")
    smoke = load_config("quickstart", smoke_overrides(whole))
    assert smoke.train.steps < whole.train.steps
    assert smoke.cold_start.steps < whole.cold_start.steps
    assert smoke.eval.questions < whole.eval.questions
    assert smoke.run.name == "quickstart-smoke"
    tiny = Config.model_validate(
        {
            "train": {"steps": 1, "save_trees_every": 1},
            "eval": {"questions": 2},
            "cold_start": {"demonstrations": 9},
        }
    )
    assert smoke_overrides(tiny) == ["run.name=run-smoke"]
    assert smoke_overrides(smoke) == ["run.name=quickstart-smoke"]


def test_a_dry_run_prints_the_plan_and_leaves_nothing(cli: CliRunner, tmp_path: Path) -> None:
    result = cli.invoke(app, ["train", "qwen3-4b-multihop", "run.dry_run=true"])
    assert result.exit_code == 0, result.output
    assert "64 questions x 22 leaves" in result.stderr
    assert not (tmp_path / "runs").exists()


def wait_for(file: Path, text: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not (file.exists() and text in file.read_text(encoding="utf-8")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_run_stopped_by_ctrl_c_is_resumed_and_looked_at(cli: CliRunner, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*AT2PO, "train", "quickstart", *TINY, "train.steps=100000"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    run = tmp_path / "runs" / "quickstart"
    wait_for(run / "metrics.jsonl", '"step": 2', process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "at2po train runs/quickstart --resume" in errors
    assert "Traceback" not in errors
    assert (run / "tree.html").exists()

    (run / "tree.html").unlink()
    done_steps = (run / "metrics.jsonl").read_text(encoding="utf-8").count('"kind": "train"')
    result = cli.invoke(app, ["train", str(run), "--resume", f"train.steps={done_steps + 1}"])
    assert result.exit_code == 0, result.output
    assert "resumed from" in result.stderr
    assert "Exact match on held-out questions" in result.stdout
    assert "Try next    at2po view runs/quickstart --list" in result.stdout
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "learning_curve.png", "tree.html"):
        assert (run / name).exists(), name
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] == done_steps + 1

    # The same questions and the same weights give all the figures that the run itself measured.
    measured = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    evaluated = cli.invoke(app, ["eval", str(run), "--json"])
    assert evaluated.exit_code == 0, evaluated.output
    figures = json.loads(evaluated.stdout)["greedy"]
    assert figures["tokens"] > 0
    assert measured == {"kind": "eval", "mode": "greedy", "step": summary["steps"], **figures}
