"""A whole run: cold start, evaluation, training, evaluation, summary; stopped by a signal and resumed."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch

from at2po_agent.agents.agent import Agent, build_agent
from at2po_agent.agents.cold_start import cold_start, record_demonstrations
from at2po_agent.agents.dry_run import describe_plan, plan_run
from at2po_agent.config.sections import Config
from at2po_agent.environments import Env, make_cold_start_env
from at2po_agent.policies.base import transcript_of
from at2po_agent.runs.folder import RunFolder, open_run
from at2po_agent.runs.interrupts import InterruptibleProgress, Interrupts, StopRequested, TrainingInterrupted
from at2po_agent.runs.progress import NoProgress, Progress
from at2po_agent.runs.seeding import RunPurpose, run_generator
from at2po_agent.trainer import Trainer

MODES = ("greedy", "sampled")
AgentFactory = Callable[[Config], Agent]


def run_training(
    config: Config,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    agent: Agent | AgentFactory | None = None,
    env: Env | None = None,
    eval_env: Env | None = None,
) -> dict[str, Any]:
    """Train from beginning to end, or from the newest checkpoint to the end.

    Args:
        config: The run.
        resume: Go on with the run in `run.dir` (or the newest of this name).
        progress: Listener.
        agent: What learns, or how to make it; None builds it from `config.model`.
        env: The environment that is trained on; None makes the configured one.
        eval_env: The environment of evaluations; None makes the configured one.

    Returns:
        What `summary.json` holds; the plan of `plan_run` for a dry run.

    Raises:
        TrainingInterrupted: A signal stopped the run; a checkpoint is saved unless the message says
            otherwise.
        ConfigError: The folder is taken, or the configuration does not fit it.
        CheckpointError: A checkpoint cannot be written or read.
    """
    progress = progress or NoProgress()
    if config.run.dry_run:
        plan = plan_run(config)
        progress.message(describe_plan(config, plan))
        return plan
    with open_run(config, resume=resume) as (folder, config), Interrupts(folder) as interrupts:
        started = time.monotonic()
        listener = InterruptibleProgress(progress, interrupts)
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        try:
            ready = agent if isinstance(agent, Agent) else (agent or build_agent)(config)
            own = contextlib.nullcontext() if isinstance(agent, Agent) else contextlib.closing(ready)
            with own:
                trainer = Trainer(
                    config, ready, folder, listener, env=env, eval_env=eval_env, started=started
                )
                with contextlib.closing(trainer):
                    return _run(config, trainer, folder, listener, resume=resume)
        except StopRequested as stop:
            raise TrainingInterrupted(_farewell(folder), folder) from stop


def _run(
    config: Config, trainer: Trainer, folder: RunFolder, progress: Progress, *, resume: bool
) -> dict[str, Any]:
    if resume and folder.checkpoints.exists():
        restored = trainer.restore()
        progress.message(f"resumed from {restored.path}, step {trainer.state.step}")
    else:
        folder.rewind_metrics(-1)
        _prepare(config, trainer, progress)
    trainer.train()
    after = {mode: trainer.evaluate(mode).to_json() for mode in _modes(config)}
    summary = _summary(config, trainer, folder, after)
    folder.write_summary(summary)
    return summary


def _prepare(config: Config, trainer: Trainer, progress: Progress) -> None:
    """Cold start and first evaluation; the checkpoint of step 0 keeps both."""
    if config.cold_start.steps:
        started = time.monotonic()
        rng = run_generator(config.run.seed, RunPurpose.COLD_START)
        demonstrations = record_demonstrations(
            make_cold_start_env(config),
            trainer.agent.tokenizer,
            config.cold_start,
            rng=rng,
            progress=progress,
            transcript=transcript_of(trainer.agent.policy),
        )
        figures = cold_start(
            trainer.agent.model, demonstrations, config.cold_start, rng=rng, progress=progress
        )
        trainer.state.cold_start = {**figures, "seconds": time.monotonic() - started}
        trainer.agent.weights_changed()
    for mode in _modes(config):
        trainer.state.before[mode] = trainer.evaluate(mode).to_json()
    trainer.save()


def _modes(config: Config) -> tuple[str, ...]:
    if not config.eval.questions:
        return ()
    return MODES if config.eval.sampled else MODES[:1]


def _summary(config: Config, trainer: Trainer, folder: RunFolder, after: dict[str, Any]) -> dict[str, Any]:
    state = trainer.state
    summary: dict[str, Any] = {
        "name": config.run.name,
        "folder": str(folder.path),
        "algorithm": config.algorithm.preset,
        "steps": state.step,
        "sampled_tokens": state.sampled_tokens,
        "wall_seconds": trainer.seconds,
        "parameters": sum(parameter.numel() for parameter in trainer.agent.model.parameters()),
        "seed": config.run.seed,
        "cold_start": state.cold_start,
    }
    for moment, evaluations in (("before", state.before), ("after", after)):
        for mode, figures in evaluations.items():
            prefix = "" if mode == "greedy" else "sampled_"
            summary |= {
                f"{prefix}{name}_{moment}": figures[name] for name in ("em", "em_low", "em_high", "f1")
            }
    return summary


def _farewell(folder: RunFolder) -> str:
    if folder.checkpoints.exists():
        return f"stopped; everything is saved. Go on with: {folder.resume_command}"
    return f"stopped before the first checkpoint; start again with: {folder.resume_command}"
