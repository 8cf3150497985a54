import contextlib
import io
import json
import os
import re
import resource
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import learners
from helpers.guess_env import GuessEnv, SmallTokenizer
from rich.console import Console
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from at2po_agent import run as run_module
from at2po_agent.agents.agent import Agent
from at2po_agent.agents.model import build_model
from at2po_agent.config.loading import load_config
from at2po_agent.config.sections import Config
from at2po_agent.health import ServiceError
from at2po_agent.learning.learner import TrainingError
from at2po_agent.learning.step import next_clip_scale
from at2po_agent.policies.base import Request, TrainablePolicy
from at2po_agent.policies.hf.policy import HFPolicy
from at2po_agent.report.curves import read_curves
from at2po_agent.report.tables import summary_table
from at2po_agent.run import run_training
from at2po_agent.runs.disk import RunFolderError
from at2po_agent.runs.folder import newest_run, open_run
from at2po_agent.runs.interrupts import TrainingInterrupted
from at2po_agent.runs.progress import Progress
from at2po_agent.tree import Tree
from at2po_agent.types import Generation
from at2po_env.errors import ConfigError, RetrievalError
from at2po_env.retrieval.client import HttpRetriever

SHAPE = replace(learners.SHAPE, layers=1)

# A process that was started in the background ignores SIGINT, so the handlers are not always Python's own.
HANDLERS_BEFORE = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}


def make_agent(config: Config) -> Agent:
    model = build_model(SHAPE, seed=config.run.seed, eos_id=SmallTokenizer.eos_id)
    return Agent(model, HFPolicy(model, SmallTokenizer(), slots=32))


def settings(folder: Path, **changes: Any) -> Config:
    values: dict[str, Any] = {
        "run": {"dir": str(folder), "name": "guess", "seed": 1},
        "env": {"id": "GuessEnv", "held_out": 0},
        "eval": {"questions": 5, "every": 3},
        "rollout": {"chains": 4, "forks": 2, "rounds": 1, "max_turn_tokens": 2, "max_response_tokens": 60},
        "optimizer": {"lr": 1e-2},
        "train": {
            "steps": 6,
            "questions": 4,
            "minibatch_questions": 2,
            "old_log_probs": "sampler",
            "save_every": 2,
            "save_trees_every": 3,
            "save_trees": 2,
        },
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values.setdefault(section, {})[name] = value
    return Config.model_validate(values)


def train(config: Config, **options: Any) -> dict[str, Any]:
    options = {"agent": make_agent, "env": GuessEnv(), "eval_env": GuessEnv(), **options}
    return run_training(config, **options)


def records(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if not key.startswith("seconds")}
        for line in lines
        if line["kind"] == kind
    ]


def final_weights(folder: Path) -> bytes:
    return (folder / "checkpoints" / "step_000006" / "model.safetensors").read_bytes()


class StopAt(Progress):
    """Sends a signal to this process at a given step's n-th leaf, as a person would."""

    def __init__(self, step: int, number: signal.Signals = signal.SIGINT, *, times: int = 1) -> None:
        self.messages: list[str] = []
        self._left, self._number, self._times = step, number, times

    def step(self, record: Mapping[str, object]) -> None:
        if record["step"] == self._left:
            for _ in range(self._times):
                os.kill(os.getpid(), self._number)

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(settings(folder))
    return folder


def test_a_run_leaves_a_complete_folder(whole_run):
    names = {path.name for path in whole_run.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "summary.json", "checkpoints", "trees", "tensorboard"} <= names
    kept = sorted(path.name for path in (whole_run / "trees").iterdir())
    assert kept == ["step_000001.jsonl", "step_000003.jsonl", "step_000006.jsonl"]
    assert (whole_run / "checkpoints" / "latest").read_text() == "step_000006\n"
    assert any((whole_run / "tensorboard").iterdir())


def test_every_step_writes_one_line_with_what_happened(whole_run):
    steps = records(whole_run)
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    for record in steps:
        assert {"reward", "em", "f1", "loss", "grad_norm", "entropy", "learning_rate", "tool_errors"} <= set(
            record
        )
        assert record["leaves"] == 4 * 6
        outcomes = sum(value for key, value in record.items() if key.startswith("outcome/"))
        assert outcomes == record["leaves"]
    tokens = [record["sampled_tokens"] for record in steps]
    assert tokens == sorted(tokens)
    assert tokens[-1] == sum(record["step_tokens"] for record in steps)
    assert all(0 < record["step_tool_calls"] <= record["tool_calls"] for record in steps)
    assert any(record["step_tool_calls"] < record["tool_calls"] for record in steps)  # forks share some
    assert all(record["update_norm"] > 0 for record in steps)
    evaluations = [(record["step"], record["mode"]) for record in records(whole_run, "eval")]
    assert evaluations == [(0, "greedy"), (0, "sampled"), (3, "greedy"), (6, "greedy"), (6, "sampled")]


def test_tensorboard_reads_the_scalars(whole_run):
    (file,) = (whole_run / "tensorboard").iterdir()
    events = list(LegacyEventFileLoader(str(file)).Load())
    assert events[0].file_version == "brain.Event:2"
    read = {(e.step, value.tag): value.simple_value for e in events for value in e.summary.value}
    for record in records(whole_run):
        assert read[record["step"], "train/reward"] == pytest.approx(record["reward"], rel=1e-6, abs=1e-6)
    assert {(0, "eval/sampled/em"), (3, "eval/greedy/em"), (6, "eval/greedy/em")} <= set(read)


def test_the_summary_says_what_changed(whole_run):
    summary = json.loads((whole_run / "summary.json").read_text())
    assert {"em_before", "em_after", "sampled_em_before", "sampled_em_after", "wall_seconds"} <= set(summary)
    assert summary["steps"] == 6
    assert summary["sampled_tokens"] == records(whole_run)[-1]["sampled_tokens"]
    assert summary["wall_seconds"] > 0


def test_kept_trees_can_be_read_back_with_their_credit(whole_run):
    lines = (whole_run / "trees" / "step_000003.jsonl").read_text().splitlines()
    assert len(lines) == 2
    for line in lines:
        entry = json.loads(line)
        tree = Tree.from_json(entry["tree"])
        assert len(tree.leaves()) == 6
        assert len(entry["values"]) == len(entry["advantages"]) == len(tree)
        assert entry["golden_answers"] == [tree.task_id]
        assert entry["question"].endswith("?")
        assert entry["step"] == 3


def test_the_same_seed_gives_the_same_run(whole_run, tmp_path):
    train(settings(tmp_path / "run"))
    assert records(tmp_path / "run") == records(whole_run)
    assert final_weights(tmp_path / "run") == final_weights(whole_run)


def test_another_seed_gives_another_run(whole_run, tmp_path):
    train(settings(tmp_path / "run", run__seed=2))
    assert final_weights(tmp_path / "run") != final_weights(whole_run)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [1, 4])
def test_a_stopped_run_goes_on_bit_for_bit(whole_run, tmp_path, number, step):
    folder = tmp_path / "run"
    with pytest.raises(TrainingInterrupted, match=f"at2po train {folder} --resume") as stopped:
        train(settings(folder), progress=StopAt(step, number))
    assert stopped.value.folder == folder
    assert stopped.value.resume_command in str(stopped.value)
    assert len(records(folder)) == step
    assert not (folder / "summary.json").exists()
    listener = StopAt(99)
    summary = train(settings(folder), resume=True, progress=listener)
    assert f"step {step}" in listener.messages[0]
    assert summary["steps"] == 6
    assert records(folder) == records(whole_run)
    assert records(folder, "eval") == records(whole_run, "eval")
    assert final_weights(folder) == final_weights(whole_run)


def test_a_second_signal_stops_at_once(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(TrainingInterrupted, match="stopped at once") as stopped:
        train(settings(folder), progress=StopAt(3, times=2))
    assert stopped.value.resume_command == f"at2po train {folder} --resume"
    assert (folder / "checkpoints" / "latest").read_text() == "step_000002\n"
    train(settings(folder), resume=True)


def test_signals_are_as_before_after_a_run(whole_run):
    assert whole_run.exists()
    assert {number: signal.getsignal(number) for number in HANDLERS_BEFORE} == HANDLERS_BEFORE


def test_a_killed_run_goes_on_from_its_checkpoint_bit_for_bit(whole_run, tmp_path, monkeypatch):
    # killed while step 6 was under way: the newest checkpoint is of step 4, and metrics know step 5 already
    folder = tmp_path / "run"
    monkeypatch.setattr(run_module.Trainer, "save", _no_save_after(run_module.Trainer.save, 4))
    with pytest.raises(RuntimeError, match="killed"):
        train(settings(folder), progress=_Killed(5))
    monkeypatch.undo()
    assert [record["step"] for record in records(folder)] == [1, 2, 3, 4, 5]
    train(settings(folder), resume=True)
    assert records(folder) == records(whole_run)
    assert final_weights(folder) == final_weights(whole_run)
    assert (folder / "metrics.after_step_000004.jsonl").exists()


class _Killed(Progress):
    def __init__(self, step: int) -> None:
        self._step = step

    def step(self, record: Mapping[str, object]) -> None:
        if record["step"] == self._step:
            raise RuntimeError("killed")


def _no_save_after(save: Any, step: int) -> Any:
    def limited(trainer: Any) -> None:
        if trainer.state.step <= step:
            save(trainer)

    return limited


def test_a_checkpoint_cut_short_is_passed_over(whole_run, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(TrainingInterrupted):
        train(settings(folder), progress=StopAt(5))
    file = folder / "checkpoints" / "step_000005" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    listener = StopAt(99)
    train(settings(folder), resume=True, progress=listener)
    assert str(file) in listener.messages[0]
    assert "step 4" in listener.messages[1]
    assert records(folder) == records(whole_run)
    assert final_weights(folder) == final_weights(whole_run)


def test_two_runs_cannot_share_a_folder(tmp_path):
    config = settings(tmp_path / "run")
    with open_run(config), pytest.raises(ConfigError, match="another run is using this folder"):
        train(config)


def test_a_new_run_does_not_overwrite_an_old_one(whole_run):
    before = final_weights(whole_run)
    with pytest.raises(ConfigError, match=r"holds a run already; add --resume"):
        train(settings(whole_run))
    assert final_weights(whole_run) == before


def test_without_a_folder_a_run_takes_a_free_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = settings(tmp_path)
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": None})})
    assert newest_run("guess") is None
    for name in ("guess", "guess-2", "guess-3"):
        with open_run(config) as (folder, filled):
            assert str(folder.path) == filled.run.dir == f"runs/{name}"
    assert newest_run("guess") == Path("runs/guess-3")
    with open_run(config, resume=True) as (folder, _):
        assert folder.path == Path("runs/guess-3")


def test_a_disk_that_refuses_is_one_clear_error_and_the_run_can_go_on(whole_run, tmp_path):
    # a real refusal: no file of this process may grow beyond what metrics.jsonl has after the third step
    folder = tmp_path / "run"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class FullAfterThree(Progress):
        def step(self, record: Mapping[str, object]) -> None:
            if record["step"] == 3:
                size = (folder / "metrics.jsonl").stat().st_size
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))

    try:
        with pytest.raises(RunFolderError, match=r"metrics\.jsonl: cannot be written .*--resume"):
            train(settings(folder), progress=FullAfterThree())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    train(settings(folder), resume=True)
    assert records(folder) == records(whole_run)
    assert final_weights(folder) == final_weights(whole_run)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunFolderError, match="file/run: cannot be written"):
        train(settings(tmp_path / "file" / "run"))


def test_resuming_needs_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no run to resume"):
        train(settings(tmp_path / "nothing"), resume=True)
    with pytest.raises(ConfigError, match="no run to resume"):
        train(Config(), resume=True)


def test_a_resumed_run_may_be_longer_but_not_another_one(tmp_path):
    folder = tmp_path / "run"
    train(settings(folder, train__steps=2))
    with pytest.raises(ConfigError, match=r"optimizer\.lr: was 0\.01, is 0\.02"):
        train(settings(folder, optimizer__lr=0.02), resume=True)
    assert train(settings(folder, train__steps=4), resume=True)["steps"] == 4
    assert load_config(folder).train.steps == 4


def test_a_finished_run_can_be_resumed_and_does_nothing_again(tmp_path):
    folder = tmp_path / "run"
    first = train(settings(folder, train__steps=2))
    again = train(settings(folder, train__steps=2), resume=True)
    assert again["em_after"] == first["em_after"]
    assert len(records(folder)) == 2


def test_a_step_in_which_every_environment_failed_is_an_error(tmp_path):
    class Down(GuessEnv):
        def step(self, action: str) -> Any:
            raise ConnectionError(f"no server for {action!r}")

    with pytest.raises(TrainingError, match="failed in every branch of a step: ConnectionError: no server"):
        train(settings(tmp_path / "run", eval__questions=0, health__pause_at=None), env=Down())


class Outage(Progress):
    """The environment's server is down from a step on; it is back some time after the run has paused."""

    def __init__(self, folder: Path, after_step: int, back_after_s: float) -> None:
        self.messages: list[str] = []
        self.newest_checkpoint = ""
        self._folder, self._after_step, self._back_after_s = folder, after_step, back_after_s
        self._down_until = 0.0

    @property
    def down(self) -> bool:
        return time.monotonic() < self._down_until

    def step(self, record: Mapping[str, object]) -> None:
        if record["step"] == self._after_step:
            self._down_until = float("inf")

    def message(self, text: str) -> None:
        self.messages.append(text)
        if text.startswith("paused"):
            self._down_until = time.monotonic() + self._back_after_s

    def advance(self, phase: str, amount: int = 1, **values: float) -> None:
        del phase, amount, values
        if self.messages and not self.newest_checkpoint:
            self.newest_checkpoint = (self._folder / "checkpoints" / "latest").read_text()

    def env(self) -> GuessEnv:
        outage = self

        class Served(GuessEnv):
            def step(self, action: str) -> Any:
                if outage.down:
                    raise ConnectionError("no server")
                return super().step(action)

        return Served()


def test_a_step_whose_server_died_is_collected_again_when_it_is_back(whole_run, tmp_path):
    folder = tmp_path / "run"
    outage = Outage(folder, after_step=3, back_after_s=0.3)
    config = settings(folder, health__probe_every_s=0.1)
    summary = train(config, env=outage.env(), progress=outage)
    assert outage.newest_checkpoint == "step_000003\n"  # save_every is 2: the pause saved it
    shown, paused, back = outage.messages
    assert "Traceback" in shown
    assert re.match(r"paused: 100% of steps fail \(ConnectionError: no server\)", paused)
    assert "answer again" in back
    assert summary["steps"] == 6
    assert records(folder) == records(whole_run)  # nothing of the outage was trained on
    assert final_weights(folder) == final_weights(whole_run)


def test_a_run_whose_server_stays_away_stops_and_can_be_resumed(whole_run, tmp_path):
    folder = tmp_path / "run"
    outage = Outage(folder, after_step=3, back_after_s=float("inf"))
    config = settings(folder, health__probe_every_s=0.1, health__give_up_after_s=0.35)
    with pytest.raises(ServiceError, match=f"(?s)steps fail.*0.35 s.*Fix: .*at2po train {folder} --resume"):
        train(config, env=outage.env(), progress=outage)
    assert [record["step"] for record in records(folder)] == [1, 2, 3]
    assert not (folder / "summary.json").exists()
    train(settings(folder), resume=True)  # the settings of the pause may change
    assert records(folder) == records(whole_run)
    assert final_weights(folder) == final_weights(whole_run)


def test_prompts_that_are_all_too_long_are_an_error(tmp_path):
    with pytest.raises(TrainingError, match="max_prompt_tokens"):
        train(settings(tmp_path / "run", rollout__max_prompt_tokens=3, eval__questions=0))


def test_the_learning_rate_warms_up_linearly(tmp_path):
    train(settings(tmp_path / "run", optimizer__warmup_steps=4, eval__questions=0))
    rates = [record["learning_rate"] for record in records(tmp_path / "run")]
    assert rates == [0.01 * share for share in (0.25, 0.5, 0.75, 1.0, 1.0, 1.0)]


# 6 steps; the rate would be 0 at step 7, and falls from the last step of the warmup on, at least from step 1.
# linear, warmup 2: lr from step 2 on, then a fifth less each step, (7 - s) / (7 - 2).
# cosine, no warmup: (1 + cos(pi (s - 1) / 6)) / 2, where cos takes 1, sqrt(3)/2, 1/2, 0, -1/2, -sqrt(3)/2.
@pytest.mark.parametrize(
    ("schedule", "warmup", "shares"),
    [
        ("linear", 2, [0.5, 1.0, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", 0, [1.0, 0.5 + 3**0.5 / 4, 0.75, 0.5, 0.25, 0.5 - 3**0.5 / 4]),
    ],
)
def test_a_falling_learning_rate_ends_with_the_run_and_resumes_bit_for_bit(
    tmp_path, schedule, warmup, shares
):
    falling = {"optimizer__schedule": schedule, "optimizer__warmup_steps": warmup, "eval__questions": 0}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(settings(whole, **falling))
    assert [record["learning_rate"] for record in records(whole)] == pytest.approx([0.01 * x for x in shares])
    with pytest.raises(TrainingInterrupted):
        train(settings(stopped, **falling), progress=StopAt(3))
    with pytest.raises(ConfigError, match=r"train\.steps: was 6, is 8"):  # it would be another curve
        train(settings(stopped, **falling, train__steps=8), resume=True)
    train(settings(stopped, **falling), resume=True)
    assert records(stopped) == records(whole)
    assert final_weights(stopped) == final_weights(whole)


def test_recomputed_log_probs_agree_with_the_sampler(whole_run, tmp_path):
    train(settings(tmp_path / "run", train__old_log_probs="recompute", train__steps=1, eval__questions=0))
    recomputed, sampled = records(tmp_path / "run")[0], records(whole_run)[0]
    assert recomputed["loss"] == pytest.approx(sampled["loss"], abs=1e-4)
    assert recomputed["grad_norm"] == pytest.approx(sampled["grad_norm"], rel=1e-2)


class Lagging(TrainablePolicy):
    """Samples with the current weights and says that they are older."""

    def __init__(self, inner: HFPolicy, versions: int) -> None:
        self.tokenizer = inner.tokenizer
        self._inner, self._versions = inner, versions

    @property
    def version(self) -> int:
        return self._inner.version + self._versions

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        return self._inner.generate(requests)

    def weights_changed(self) -> None:
        self._inner.weights_changed()


@pytest.mark.parametrize("versions", [0, 2])
def test_stale_turns_are_counted_and_kept_with_their_version(tmp_path, versions):
    def agent(config: Config) -> Agent:
        plain = make_agent(config)
        return Agent(plain.model, Lagging(plain.policy, versions))

    train(settings(tmp_path / "run", train__steps=3, eval__questions=0), agent=agent)
    for record in records(tmp_path / "run"):
        assert record["staleness"] == versions
        assert record["stale_turns"] == (record["nodes"] if versions else 0)
    kept = (tmp_path / "run" / "trees" / "step_000003.jsonl").read_text().splitlines()
    turns = [turn for line in kept for turn in Tree.from_json(json.loads(line)["tree"]).turns if turn]
    assert {turn.version for turn in turns} == {2}  # two updates before the third step


def test_failing_retrieval_shows_in_the_metrics(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    dead = HttpRetriever(url=url, retries=0, timeout_s=5)

    class Searching(GuessEnv):
        def step(self, action: str) -> Any:
            with contextlib.suppress(RetrievalError):
                dead.search([action], 1)
            return super().step(action)

    changes = {"train__steps": 2, "eval__questions": 0, "health__pause_at": None}
    with pytest.raises(ServiceError, match=r"training: 100% failed \(retrieval \d+\)"):
        train(settings(tmp_path / "run", **changes), env=Searching())
    for record in records(tmp_path / "run"):
        assert record["retrieval/requests"] == record["retrieval/failures"] >= record["nodes"]
    plain = tmp_path / "plain"
    train(settings(plain, train__steps=1, eval__questions=0))
    assert not [key for key in records(plain)[0] if key.startswith("retrieval/")]


def test_dynamic_sampling_trains_on_questions_whose_leaves_differ(tmp_path):
    changes = {"algorithm__keep": "informative", "train__steps": 2, "eval__questions": 0}
    train(settings(tmp_path / "run", **changes))
    for record in records(tmp_path / "run"):
        assert 4 <= record["questions"] <= 12  # asked in rounds of 4, at most 3 times
        informative = round(record["questions"] * (1 - record["groups_without_signal"]))
        assert record["trained_questions"] == min(4, informative)
    plain = tmp_path / "plain"
    train(settings(plain, **(changes | {"algorithm__keep": "all"})))
    assert records(plain)[0]["trained_questions"] == records(plain)[0]["questions"] == 4
    assert records(plain)[0]["loss"] != records(tmp_path / "run")[0]["loss"]


def with_resampling(share: float | None, **more: Any) -> dict[str, Any]:
    return {"rollout__max_turn_tokens": 8, "rollout__resampling": {"enabled": True, "share": share, **more}}


def test_the_threshold_of_a_share_follows_the_policy_and_survives_a_stop(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(settings(whole, **with_resampling(0.3)))
    steps = records(whole)
    assert "resampling/threshold" not in steps[0]  # nothing is known before the first step
    assert steps[0]["resampling/share"] == 0.0
    assert all(step["resampling/threshold"] > 0 for step in steps[1:])
    assert 0 < sum(step["resampling/share"] for step in steps[1:]) / 5 < 0.8
    with pytest.raises(TrainingInterrupted):
        train(settings(stopped, **with_resampling(0.3)), progress=StopAt(3))
    train(settings(stopped, **with_resampling(0.3)), resume=True)
    assert final_weights(stopped) == final_weights(whole)
    key = "resampling/threshold"
    assert [step.get(key) for step in records(stopped)] == [step.get(key) for step in steps]


@pytest.mark.parametrize(("threshold", "often"), [(0.0, "never"), (9.0, r"in \d+% of the turns")])
def test_an_intervention_that_fires_never_or_nearly_always_is_reported_once(tmp_path, threshold, often):
    progress = StopAt(99)
    more = {"threshold": threshold, "attempts": 1}
    train(settings(tmp_path, train__steps=2, **with_resampling(None, **more)), progress=progress)
    (said,) = [text for text in progress.messages if "rollout.resampling" in text]
    assert re.search(f"fires {often} in step 1", said)
    assert "share=0.15" in said


def test_the_bounds_of_a_clip_share_follow_it_and_survive_a_stop(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    shared = {"algorithm__clip_share": 0.2, "train__epochs": 3}
    train(settings(whole, **shared))
    steps = records(whole)
    assert steps[0]["clip_scale"] == 1.0
    for before, after in pairwise(steps):  # where nothing was learnt, nothing was clipped
        scale = next_clip_scale(before["clip_scale"], before.get("clip_fraction", 0.2), 0.2)
        assert after["clip_scale"] == pytest.approx(scale)
    # The published bounds of 3e-3 clip far more than a fifth at this rate.
    assert steps[0]["clip_fraction"] > 0.3
    last = [step["clip_fraction"] for step in steps if "clip_fraction" in step][-1]
    assert abs(last - 0.2) < abs(steps[0]["clip_fraction"] - 0.2)
    with pytest.raises(TrainingInterrupted):
        train(settings(stopped, **shared), progress=StopAt(3))
    train(settings(stopped, **shared), resume=True)
    assert final_weights(stopped) == final_weights(whole)


def test_a_step_without_any_informative_question_changes_nothing(tmp_path):
    class Indifferent(GuessEnv):
        def step(self, action: str) -> Any:
            observation, _, terminated, truncated, info = super().step(action)
            return observation, 0.0, terminated, truncated, info

    config = settings(
        tmp_path / "run",
        algorithm__keep="informative",
        train__steps=1,
        eval__questions=0,
        train__save_every=1,
    )
    train(config, env=Indifferent())
    (record,) = records(tmp_path / "run")
    assert (record["questions"], record["trained_questions"], record["updates"]) == (12, 0, 0)
    names = ("step_000000", "step_000001")
    first, last = (tmp_path / "run" / "checkpoints" / name / "model.safetensors" for name in names)
    assert first.read_bytes() == last.read_bytes()


def test_an_evaluation_that_was_stopped_is_made_after_resuming(whole_run, tmp_path):
    class StopInEvaluation(Progress):
        def __init__(self) -> None:
            self.steps = 0

        def step(self, record: Mapping[str, object]) -> None:
            self.steps = int(str(record["step"]))

        def start(self, phase: str, total: int) -> None:
            if self.steps == 3 and phase == "evaluate (greedy)" and total:
                os.kill(os.getpid(), signal.SIGINT)

    folder = tmp_path / "run"
    with pytest.raises(TrainingInterrupted):
        train(settings(folder), progress=StopInEvaluation())
    assert [record["step"] for record in records(folder, "eval")] == [0, 0]
    train(settings(folder), resume=True)
    assert records(folder, "eval") == records(whole_run, "eval")
    assert final_weights(folder) == final_weights(whole_run)


def test_a_run_stopped_before_its_first_checkpoint_starts_again(whole_run, tmp_path):
    class StopAtOnce(Progress):
        def start(self, phase: str, total: int) -> None:
            if phase == "evaluate (sampled)" and total:
                os.kill(os.getpid(), signal.SIGINT)

    folder = tmp_path / "run"
    with pytest.raises(TrainingInterrupted, match="before the first checkpoint"):
        train(settings(folder), progress=StopAtOnce())
    train(settings(folder), resume=True)
    assert records(folder, "eval") == records(whole_run, "eval")


def test_more_epochs_make_more_updates(tmp_path):
    train(settings(tmp_path / "run", train__epochs=3, train__steps=1, eval__questions=0))
    assert records(tmp_path / "run")[0]["updates"] == 6


def test_checkpointed_activations_give_the_same_step(whole_run, tmp_path):
    train(settings(tmp_path / "run", train__gradient_checkpointing=True, train__steps=1, eval__questions=0))
    assert records(tmp_path / "run")[0]["grad_norm"] == pytest.approx(
        records(whole_run)[0]["grad_norm"], rel=1e-4
    )


def test_an_agent_learns_what_is_rewarded(tmp_path):
    # At first 10 of 29 characters are digits (any other has reward -1); with digits alone it is at least 0.
    config = settings(
        tmp_path / "run", train__steps=20, train__questions=8, optimizer__lr=0.03, eval__questions=0
    )
    train(config)
    rewards = [record["reward"] for record in records(tmp_path / "run")]
    assert sum(rewards[:3]) / 3 < -0.3
    assert sum(rewards[-3:]) / 3 > 0.05


def test_a_dry_run_allocates_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listener = StopAt(99)
    plan = run_training(load_config("qwen3-4b-multihop", ["run.dry_run=true"]), progress=listener)
    # Qwen3-4B: 4.02 G parameters, as its model card says; fp32 weights 16 GB, AdamW's moments twice that
    assert plan["parameters"] == 4_022_468_096
    assert (plan["weights_gb"], plan["optimizer_gb"]) == (16.09, 32.18)
    assert plan["leaves_per_step"] == 64 * 22
    assert plan["updates_per_step"] == 8
    assert "4,022,468,096 parameters" in listener.messages[0]
    assert list(tmp_path.iterdir()) == []


def test_threads_are_set(tmp_path):
    before = torch.get_num_threads()
    try:
        train(settings(tmp_path / "run", run__threads=1, train__steps=0, eval__questions=0))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


# --- which questions are trained on and asked ---------------------------------------------------------------


def test_questions_that_are_asked_are_not_trained_on(tmp_path):
    config = settings(
        tmp_path / "run", env__held_out=0.3, train__steps=3, train__save_trees=9, train__save_trees_every=1
    )
    summary = train(config)
    trained = {
        Tree.from_json(json.loads(line)["tree"]).task_id
        for file in (tmp_path / "run" / "trees").iterdir()
        for line in file.read_text().splitlines()
    }
    held_out = summary["held_out_questions"]
    assert 1 <= held_out < 9
    assert len(trained) <= 10 - held_out
    assert (summary["evaluated_questions"], summary["seen_questions"]) == (min(5, held_out), 0)
    assert {record["seen"] for record in records(tmp_path / "run", "eval")} == {0}
    # A resume that would train on them is refused, as it would be another run.
    longer = settings(tmp_path / "run", env__held_out=0.3, train__steps=4, eval__questions=0)
    with pytest.raises(ConfigError, match=f"trained on {10 - held_out} questions, and would go on with 10"):
        train(longer, resume=True)


def test_questions_that_are_both_asked_and_trained_on_are_said_to_be(whole_run):
    summary = json.loads((whole_run / "summary.json").read_text())
    assert (summary["evaluated_questions"], summary["seen_questions"]) == (5, 5)
    shown = io.StringIO()
    Console(file=shown, width=120).print(summary_table(summary))
    assert "Exact match on 5 questions, all of them trained on" in shown.getvalue()
    assert "held-out" not in shown.getvalue()
    assert read_curves(whole_run).asked == "5 questions, all of them trained on"


# --- what broke must not look like a bad model --------------------------------------------------------------


class Heard(Progress):
    """Keeps the messages."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


def test_failures_of_the_training_are_counted_and_fail_the_run_at_its_end(tmp_path):
    config = settings(tmp_path / "run", eval__questions=0, health__pause_at=None, train__steps=3)
    heard = Heard()
    with pytest.raises(ServiceError, match=r"training: \d+% failed \(env_error \d+\)") as failed:
        train(config, env=GuessEnv(broken_guess=5), progress=heard)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert failed.value.summary == summary
    assert summary["failures"]["env_error"] == sum(
        record.get("outcome/env_error", 0) for record in records(tmp_path / "run")
    )
    traceback = (tmp_path / "run" / "first_error.txt").read_text()
    assert traceback.startswith("Traceback")
    assert "RuntimeError: the server is down" in traceback
    assert len([text for text in heard.messages if "Traceback" in text]) == 1
    shown = io.StringIO()
    Console(file=shown, width=120).print(summary_table(summary))
    assert f"failures: training env_error {summary['failures']['env_error']}" in shown.getvalue()


def test_an_evaluation_in_which_the_environment_breaks_ends_the_run_at_once(tmp_path):
    class NoReward(GuessEnv):
        def step(self, action):
            _, _, terminated, truncated, _ = answer = super().step(action)
            if terminated or truncated:
                raise ZeroDivisionError("of the reward function")
            return answer

    config = settings(tmp_path / "run", health__pause_at=None)
    with pytest.raises(ServiceError, match=r"evaluation \(greedy\) after step 0: 100% failed"):
        train(config, env=NoReward(), eval_env=NoReward())
    assert [record["failures"]["env_error"] for record in records(tmp_path / "run", "eval")] == [5]
    assert not records(tmp_path / "run", "train")
    assert "ZeroDivisionError" in (tmp_path / "run" / "first_error.txt").read_text()
    train(config, resume=True)  # mended
    assert [record["failures"]["env_error"] for record in records(tmp_path / "run", "eval")] == [0] * 5
