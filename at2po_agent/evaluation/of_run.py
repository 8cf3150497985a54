"""Evaluating what a run has learned, or any model, without training: what `at2po eval` does."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch

from at2po_agent.agents.agent import build_agent
from at2po_agent.config.loading import CONFIG_FILE, load_config
from at2po_agent.config.sections import Config
from at2po_agent.environments import Env, first_tasks, make_eval_env
from at2po_agent.evaluation.evaluate import Evaluation, evaluate
from at2po_agent.policies.base import Policy
from at2po_agent.runs.checkpoint import check_checkpoint, list_checkpoints
from at2po_agent.runs.folder import CHECKPOINTS
from at2po_agent.runs.progress import Progress
from at2po_agent.runs.seeding import RunPurpose, run_seed
from at2po_env.errors import ConfigError

DEFAULT_CONFIG = "qwen3-4b-multihop"


def evaluation_config(target: str, overrides: Sequence[str], config: str | None = None) -> Config:
    """The configuration that evaluates a run's newest checkpoint, one of its checkpoints, or any model.

    Args:
        target: A run's folder, a checkpoint's folder, a model's folder, or a hub name.
        overrides: `key=value` texts; they win.
        config: Where everything but the model comes from; None takes the run's own, or for a model that
            belongs to no run `DEFAULT_CONFIG`.

    Raises:
        ConfigError: The run has no whole checkpoint, or a setting is wrong.
    """
    path = Path(target)
    if (path / CONFIG_FILE).is_file():
        checkpoints = list_checkpoints(path / CHECKPOINTS)
        if not checkpoints:
            raise ConfigError(
                f"{path}: no checkpoint to evaluate yet; train it first: at2po train {path} --resume"
            )
        return _with_model(config or str(path), checkpoints[0], overrides)
    run = path.resolve().parent.parent
    if path.is_dir() and (run / CONFIG_FILE).is_file():
        return _with_model(config or str(run), path, overrides)
    return load_config(
        config or DEFAULT_CONFIG,
        [f"model.path={target}", "model.random_init=false", "model.sampler=hf", *overrides],
    )


def evaluate_config(config: Config, progress: Progress, modes: Sequence[str]) -> dict[str, Evaluation]:
    """Evaluate the model of a configuration on its evaluation questions, in each mode.

    With the settings of a run this gives the figures that the run itself measured.
    """
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    agent = build_agent(config)
    with contextlib.closing(agent.sampler):
        env = make_eval_env(config)
        return {mode: evaluate_mode(config, mode, env, agent.policy, progress) for mode in modes}


def evaluate_mode(
    config: Config,
    mode: str,
    env: Env,
    policy: Policy,
    progress: Progress,
    *,
    phase: str = "",
    temperature: float | None = None,
) -> Evaluation:
    """Ask a policy the first `eval.questions` questions of an environment.

    Args:
        config: Limits, seed, and how many questions there are and run at once.
        mode: `greedy` or `sampled` (temperature 1).
        env: Where they are asked.
        policy: Who answers.
        progress: Listener.
        phase: What it is told; none means `evaluate (MODE)`.
        temperature: Another than the mode's.
    """
    if temperature is None:
        temperature = 0.0 if mode == "greedy" else 1.0
    phase = phase or f"evaluate ({mode})"
    tasks = first_tasks(env, config.eval.questions)
    progress.start(phase, len(tasks))
    result, _ = evaluate(
        tasks,
        env,
        policy,
        config.rollout,
        seed=run_seed(config.run.seed, RunPurpose.EVALUATION),
        temperature=temperature,
        batch=config.eval.batch,
        on_question=lambda: progress.advance(phase),
    )
    progress.finish(phase)
    return result


def _with_model(config: str, checkpoint: Path, overrides: Sequence[str]) -> Config:
    check_checkpoint(checkpoint)
    own = [f"model.path={checkpoint}", "model.random_init=false", "model.tokenizer=null"]
    return load_config(config, [*own, *overrides])
