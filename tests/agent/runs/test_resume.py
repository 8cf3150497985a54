"""Goes on with runs that were stopped at unkind moments; the results are those of a run in one piece."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import learners
from helpers.guess_env import GuessEnv, SmallTokenizer

from at2po_agent.agents.agent import Agent
from at2po_agent.agents.model import build_model
from at2po_agent.config.sections import Config
from at2po_agent.policies.hf.policy import HFPolicy
from at2po_agent.run import run_training
from at2po_agent.runs.checkpoint import CheckpointError
from at2po_agent.runs.progress import Progress
from at2po_agent.tree import Tree
from at2po_env.errors import ConfigError

SHAPE = replace(learners.SHAPE, layers=1)


class Killed(BaseException):
    """Ends a run as a kill does: nothing is tidied up but the lock."""


def train(
    folder: Path,
    *,
    resume: bool = False,
    progress: Any = None,
    lr: float = 1e-2,
    steps: int = 2,
    questions: int = 2,
) -> dict[str, Any]:
    def make_agent(config: Config) -> Agent:
        model = build_model(SHAPE, seed=config.run.seed, eos_id=SmallTokenizer.eos_id)
        return Agent(model, HFPolicy(model, SmallTokenizer(), slots=32))

    config = Config.model_validate(
        {
            "run": {"dir": str(folder), "name": "guess", "seed": 1},
            "env": {"id": "GuessEnv"},
            "eval": {"questions": 3, "every": 1},
            "rollout": {
                "chains": 2,
                "forks": 1,
                "rounds": 1,
                "max_turn_tokens": 2,
                "max_response_tokens": 60,
            },
            "optimizer": {"lr": lr},
            "train": {
                **{
                    "steps": steps,
                    "questions": questions,
                    "minibatch_questions": 1,
                    "old_log_probs": "sampler",
                },
                **{"save_every": 1, "save_trees_every": 1},
            },
        }
    )
    return run_training(
        config, agent=make_agent, env=GuessEnv(), eval_env=GuessEnv(), resume=resume, progress=progress
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in one.items() if not key.startswith("seconds")} for one in found]


def weights(folder: Path) -> bytes:
    return (folder / "checkpoints" / "step_000002" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(folder)
    return folder


class KillAt(Progress):
    """Kills when a phase starts for the n-th time."""

    def __init__(self, phase: str, number: int) -> None:
        self._phase, self._left = phase, number

    def start(self, phase: str, total: int) -> None:
        assert total
        self._left -= phase == self._phase
        if self._left == 0:
            raise Killed


def test_a_run_killed_during_its_first_checkpoint_starts_from_the_beginning(whole_run, tmp_path, monkeypatch):
    folder = tmp_path / "run"

    def killed(*_: object) -> None:
        raise Killed

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(Killed):
        train(folder)
    monkeypatch.undo()
    assert (folder / "checkpoints").is_dir()
    with pytest.raises(ConfigError, match="add --resume"):
        train(folder)
    train(folder, resume=True)
    assert lines(folder) == lines(whole_run)
    assert weights(folder) == weights(whole_run)


@pytest.mark.parametrize(
    ("phase", "number"),
    [
        ("evaluate (greedy)", 2),  # after step 1, before its checkpoint
        ("evaluate (greedy)", 3),  # after training
        ("evaluate (sampled)", 2),  # after training, once the greedy evaluation is written
    ],
)
def test_no_evaluation_is_written_twice(whole_run, tmp_path, phase, number):
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        train(folder, progress=KillAt(phase, number))
    train(folder, resume=True)
    assert lines(folder) == lines(whole_run)
    train(folder, resume=True)  # a finished run has nothing left to do
    assert lines(folder) == lines(whole_run)
    assert weights(folder) == weights(whole_run)


def test_a_finished_run_is_not_evaluated_again(tmp_path):
    folder = tmp_path / "run"
    summary = train(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    heard = KillAt("evaluate (greedy)", 1)
    assert train(folder, resume=True, progress=heard) == summary
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    longer = train(folder, resume=True, steps=3)
    assert longer["steps"] == 3


def test_a_run_cannot_be_resumed_below_the_steps_that_are_done(whole_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    with pytest.raises(ConfigError, match=r"train.steps: got 1, but the run in .* has done 2 steps"):
        train(folder, resume=True, steps=1)
    assert "steps: 2" in (folder / "config.yaml").read_text()


def test_the_shares_of_failed_calls_go_on_counting(tmp_path):
    # One step has too few calls to say anything about a service, four together have enough.
    shape = {"questions": 1, "steps": 4}
    train(tmp_path / "whole", **shape)
    with pytest.raises(Killed):
        train(tmp_path / "broken", progress=KillAt("rollout", 4), **shape)
    train(tmp_path / "broken", resume=True, **shape)
    assert lines(tmp_path / "broken") == lines(tmp_path / "whole")
    steps = [line for line in lines(tmp_path / "whole") if line["kind"] == "train"]
    assert "health/steps" not in steps[0]
    assert "health/steps" in steps[3]


def test_the_version_of_the_weights_goes_on_counting(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        train(folder, steps=3, progress=KillAt("rollout", 3))
    train(folder, steps=3, resume=True)
    kept = (folder / "trees" / "step_000003.jsonl").read_text().splitlines()
    trees = [Tree.from_json(json.loads(line)["tree"]) for line in kept]
    assert {turn.version for tree in trees for turn in tree.turns if turn} == {2}  # two updates came before


def test_the_checkpoint_of_another_run_of_the_same_shape_is_refused(whole_run, tmp_path):
    folder = tmp_path / "run"
    train(folder, lr=0.5)
    shutil.rmtree(folder / "checkpoints")
    shutil.copytree(whole_run / "checkpoints", folder / "checkpoints")
    with pytest.raises(
        CheckpointError, match=r"another configuration[^\0]*optimizer\.lr: was 0\.01, is 0\.5"
    ):
        train(folder, lr=0.5, resume=True)


def test_a_damaged_configuration_does_not_turn_a_run_into_another(whole_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    (folder / "config.yaml").write_text("")
    with pytest.raises(CheckpointError, match="another configuration"):
        train(folder, lr=0.5, resume=True)
    (folder / "config.yaml").write_text("")
    train(folder, resume=True)
    assert "lr: 0.01" in (folder / "config.yaml").read_text()


def test_a_state_that_is_none_of_a_trainer_is_one_clear_error(whole_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    file = folder / "checkpoints" / "step_000002" / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"state": {"step": "two"}}))
    with pytest.raises(CheckpointError, match="no state of a training run"):
        train(folder, resume=True)
