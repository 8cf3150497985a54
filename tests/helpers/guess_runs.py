"""Runs of a tiny model on guesses, by one process or by several, which import this module to begin."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import distributed

from at2po_agent.agents.agent import Agent
from at2po_agent.agents.model import ModelShape, build_model
from at2po_agent.cluster.launch import launch
from at2po_agent.cluster.learners import rank
from at2po_agent.config.presets import PRESETS
from at2po_agent.config.sections import Config
from at2po_agent.policies.hf.policy import HFPolicy
from at2po_agent.run import run_training
from at2po_agent.runs.progress import Progress
from at2po_agent.tree import Tree
from helpers.guess_env import GuessEnv, SmallTokenizer

SHAPE = ModelShape(
    vocab_size=len(SmallTokenizer.alphabet),
    hidden_size=16,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=8,
    ffn_size=16,
    init_std=0.3,
)


def guess_config(folder: Path | str, *, learners: int = 1, preset: str = "at2po", **changes: Any) -> Config:
    """Two steps of two minibatches of four questions; `changes` replace whole sections' settings."""
    parts = PRESETS[preset]
    settings: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder), "name": "guess", "seed": 1},
        "env": {"id": "GuessEnv"},
        "eval": {"questions": 3},
        "algorithm": parts.algorithm(),
        "rollout": {
            **parts.rollout,
            **parts.shape(6),
            "max_turn_tokens": 3,
            "max_response_tokens": 60,
        },
        "optimizer": {"lr": 1e-3},
        "train": {
            **{"steps": 2, "questions": 8, "minibatch_questions": 4, "micro_batch_tokens": 200},
            **{"save_every": 1, "save_trees_every": 1, "save_trees": 8, "keep_checkpoints": 3},
        },
        "model": {},
        "cluster": {"learners": learners},
    }
    for section, values in changes.items():
        settings[section] |= values
    return Config.model_validate(settings)


def guess_run(
    config: Config, resume: bool = False, progress: Progress | None = None, env: GuessEnv | None = None
) -> dict[str, Any]:
    """Make the run in this process, which may be one of several learners."""

    def make_agent(config: Config) -> Agent:
        model = build_model(SHAPE, seed=config.run.seed, eos_id=SmallTokenizer.eos_id)
        return Agent(model, HFPolicy(model, SmallTokenizer(), slots=32))

    return run_training(
        config,
        agent=make_agent,
        env=env or GuessEnv(),
        eval_env=GuessEnv(),
        resume=resume,
        progress=progress,
    )


def learner(jobs: Sequence[tuple[Config, bool]]) -> None:
    """Several runs of one learner: a configuration each, and whether it is resumed."""
    distributed.init_process_group("gloo")  # for all of them
    for config, resume in jobs:
        guess_run(config, resume)
    distributed.destroy_process_group()


class FatalEnv(GuessEnv):
    """Kills the second learner in the second step of the run in a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if rank() == 1 and any(line["kind"] == "train" for line in metrics(self._folder)):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


def killed_learner(config: Config) -> None:
    """One learner of a run whose second learner is killed."""
    guess_run(config, env=FatalEnv(Path(str(config.run.dir))))


def learners_run(*jobs: tuple[Config, bool]) -> int:
    """Make runs with as many processes as they have learners, the same for all."""
    return launch(jobs[0][0].cluster.learners, learner, jobs)


def trees(folder: Path, step: int) -> list[Tree]:
    """The trees that a run kept of a step."""
    lines = (folder / "trees" / f"step_{step:06d}.jsonl").read_text().splitlines()
    return [Tree.from_json(json.loads(line)["tree"]) for line in lines]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The figures of a run, without the times."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in one.items() if not key.startswith("seconds")} for one in found]
