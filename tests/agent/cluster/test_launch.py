"""Several learners end together, whatever ends one of them, and leave one message and nothing else behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from multiprocessing import active_children
from pathlib import Path

import pytest
from helpers.guess_runs import guess_config, guess_run, killed_learner, metrics
from helpers.launched_work import go_wrong, leave

from at2po_agent.cluster.launch import launch
from at2po_agent.cluster.learners import LearnerError

pytestmark = pytest.mark.timeout(900)
AT2PO = [sys.executable, "-c", "from at2po_agent.cli.app import main; main()"]
TINY = [
    *("env.kwargs.worlds=2", "eval.questions=0", "cold_start.steps=2", "cold_start.demonstrations=20"),
    *("cold_start.env_kwargs.worlds=2", "rollout.chains=2", "rollout.forks=1", "rollout.rounds=1"),
    *("rollout.max_turn_tokens=8", "train.questions=2", "train.minibatch_questions=2", "train.save_every=0"),
    *("model.hidden_size=32", "model.layers=1", "model.ffn_size=32", "run.threads=1"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("error", LearnerError, r"^questions\.jsonl: line 3 is no JSON$"),
        ("bug", RuntimeError, r"learner 1 failed:\n[^\0]*ZeroDivisionError: a bug"),
        ("kill", LearnerError, r"^learner 1 was ended by SIGKILL .* then start it again$"),
    ],
)
def test_the_learner_that_fails_ends_all_and_is_named(how: str, kind: type[Exception], message: str) -> None:
    started = time.monotonic()
    with pytest.raises(kind, match=message):
        launch(2, go_wrong, how)
    assert time.monotonic() - started < 120  # the other one sleeps for ten minutes
    assert active_children() == []


@pytest.mark.slow
def test_an_exit_code_of_the_learners_is_that_of_the_launch() -> None:
    assert launch(2, leave, 7) == 7


@pytest.mark.slow
def test_a_learner_that_is_killed_costs_no_more_than_its_step(tmp_path: Path) -> None:
    config = guess_config(tmp_path / "run", learners=2)
    fix = re.escape(f"go on with: at2po train {tmp_path / 'run'} --resume")
    with pytest.raises(LearnerError, match=f"^learner 1 was ended by SIGKILL .*{fix}$"):
        launch(2, killed_learner, config)
    assert active_children() == []
    guess_run(guess_config(tmp_path / "run"), resume=True)
    assert [line["step"] for line in metrics(tmp_path / "run") if line["kind"] == "train"] == [1, 2]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def runs(pid: int) -> bool:
    """Whether there is such a process, and not only its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def started(folder: Path, *more: str) -> subprocess.Popen[str]:
    """Begin a run, and wait until its first step is done."""
    process = subprocess.Popen(
        [*AT2PO, "train", "quickstart", *TINY, "train.steps=100000", f"run.dir={folder}", *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if (folder / "metrics.jsonl").is_file() and metrics(folder):
            return process
        time.sleep(0.2)
    process.kill()
    raise AssertionError(process.communicate())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_ctrl_c_stops_all_learners_after_a_checkpoint(tmp_path: Path) -> None:
    process = started(tmp_path / "run", "cluster.learners=2")
    learners = children(process.pid)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert errors.count(f"everything is saved. Go on with: at2po train {tmp_path / 'run'} --resume") == 1
    assert "Traceback" not in errors
    assert len(learners) >= 2
    deadline = time.monotonic() + 60  # multiprocessing has a helper that ends a moment after its parent
    while left := [pid for pid in learners if runs(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    done = max(line["step"] for line in metrics(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == f"step_{done:06d}\n"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the system tells a process of its parent's death")
def test_learners_end_when_the_process_that_launched_them_is_killed(tmp_path: Path) -> None:
    code = (
        "from at2po_agent.cluster.launch import launch\n"
        "from helpers.launched_work import wait\n"
        f"launch(2, wait, {str(tmp_path)!r})"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    deadline = time.monotonic() + 240
    while not all((tmp_path / name).is_file() for name in "01"):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(0.5)  # until the ids are written
    learners = [int((tmp_path / name).read_text()) for name in "01"]
    assert all(runs(pid) for pid in learners)
    process.kill()
    process.wait()
    while any(runs(pid) for pid in learners):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_torchrun_starts_learners_too(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = ["train", "quickstart", *TINY, "train.steps=1", f"run.dir={tmp_path / 'run'}"]
    done = subprocess.run(
        [*torchrun, "--no-python", *AT2PO, *run], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Run folder") == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 1
    assert "learners: 2" in (tmp_path / "run" / "config.yaml").read_text()
