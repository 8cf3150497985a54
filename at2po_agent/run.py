"""Makes a whole run: cold start, evaluation, training, evaluation, summary.

A signal stops it after a whole step, and it can be resumed. With several learners each of them makes the run.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from at2po_agent.agents.agent import Agent, build_agent, build_weights
from at2po_agent.agents.cold_start import cold_start, record_demonstrations
from at2po_agent.agents.model import add_adapters, without_adapters
from at2po_agent.cluster.launch import tell_folder
from at2po_agent.cluster.learners import Learners, join
from at2po_agent.config.sections import Config
from at2po_agent.environments import Env, make_cold_start_env
from at2po_agent.evaluation.metrics import wilson_interval
from at2po_agent.health import LOST, ServiceError
from at2po_agent.policies.base import transcript_of
from at2po_agent.policies.weights import is_adapted
from at2po_agent.runs.checkpoint import list_checkpoints, save_base
from at2po_agent.runs.folder import ReadOnlyFolder, RunFolder, open_run
from at2po_agent.runs.interrupts import InterruptibleProgress, Interrupts, StopRequested, TrainingInterrupted
from at2po_agent.runs.progress import Progress
from at2po_agent.runs.seeding import RunPurpose, run_generator
from at2po_agent.trainer import Trainer
from at2po_env.errors import EnvError

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
        EnvError: Foreign code called `sys.exit`.
        ServiceError: A service stayed away; or more than `health.fail_at` of an evaluation, or of the whole
            training, failed.
    """
    progress = progress or Progress()
    if config.run.dry_run:
        plan = plan_run(config)
        progress.message(describe_plan(config, plan))
        return plan
    with (
        join(config) as (learners, config),
        _open_together(config, learners, resume=resume) as (folder, config),
        Interrupts(folder) as interrupts,
    ):
        started = time.monotonic()
        listener = InterruptibleProgress(
            progress if learners.first else Progress(), interrupts, lambda: learners.may_stop
        )
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        try:
            ready = agent if isinstance(agent, Agent) else (agent or build_agent)(config)
            own = contextlib.nullcontext() if isinstance(agent, Agent) else contextlib.closing(ready.sampler)
            with own:
                trainer = Trainer(
                    config,
                    ready,
                    folder,
                    listener,
                    env=env,
                    eval_env=eval_env,
                    started=started,
                    learners=learners,
                )
                with contextlib.closing(trainer):
                    return _run(config, trainer, folder, listener, learners, resume=resume)
        except SystemExit as error:  # of foreign code; the run would end as if all were well
            raise EnvError(
                f"an environment, an expert or other code of the run called sys.exit({error.code!r}). "
                "Fix: let it raise an error instead"
            ) from error
        except StopRequested as stop:
            learners.together(lambda: None)  # the first may still be writing, and ends last
            command = folder.resume_command
            saved = f"stopped; everything is saved. Go on with: {command}"
            lost = f"stopped before the first checkpoint; start again with: {command}"
            raise TrainingInterrupted(
                saved if list_checkpoints(folder.checkpoints) else lost, folder
            ) from stop


@contextlib.contextmanager
def _open_together(config: Config, learners: Learners, *, resume: bool) -> Iterator[tuple[RunFolder, Config]]:
    """`open_run` on the first learner; the others get its folder to read, and its configuration."""
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(open_run(config, resume=resume)) if learners.first else None
        if opened is not None:
            tell_folder(opened[0])
        config = learners.together(lambda: config if opened is None else opened[1])[0]
        yield opened or (ReadOnlyFolder(Path(str(config.run.dir))), config)


def _run(
    config: Config,
    trainer: Trainer,
    folder: RunFolder,
    progress: Progress,
    learners: Learners,
    *,
    resume: bool,
) -> dict[str, Any]:
    if resume and list_checkpoints(folder.checkpoints):
        finished, *_ = learners.together(
            lambda: folder.finished(config.train.steps) if learners.first else None
        )
        restored = trainer.restore(rewind=finished is None)
        if finished is not None:
            progress.message(f"{folder.path}: the run is finished; a larger train.steps goes on with it")
            trainer.check()
            return {**finished, "folder": str(folder.path)}
        progress.message(f"resumed from {restored.path}, step {trainer.state.step}")
    else:
        folder.rewind_metrics(-1)
        if config.cold_start.steps:
            started = time.monotonic()
            parts = learners.together(
                lambda: _cold_start(config, trainer.agent, progress) if learners.first else {}
            )
            trainer.state.cold_start = {**parts[0], "seconds": time.monotonic() - started}
            trainer.weights_changed()
        own = config.model
        if (
            learners.first
            and is_adapted(trainer.agent.model)
            and (own.path is None or own.random_init or config.cold_start.steps)
        ):
            save_base(folder.path, trainer.agent.model)
        for mode in _modes(config):
            trainer.state.before[mode] = trainer.evaluate(mode).to_json()
        trainer.save()  # the checkpoint of step 0 keeps the cold start and the first evaluation
    trainer.train()
    after = {mode: trainer.evaluate(mode).to_json() for mode in _modes(config)}
    summary = _summary(config, trainer, after)
    folder.write_summary(summary)
    try:
        trainer.check()
    except ServiceError as error:
        error.summary = summary
        raise
    return summary


def _summary(config: Config, trainer: Trainer, after: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What `summary.json` holds, from the evaluations after training and what the trainer knows."""
    state = trainer.state
    summary: dict[str, Any] = {
        "name": config.run.name,
        "folder": str(trainer.folder.path),
        "algorithm": config.algorithm.preset,
        "steps": state.step,
        "sampled_tokens": state.sampled_tokens,
        "wall_seconds": trainer.seconds,
        "parameters": sum(parameter.numel() for parameter in trainer.agent.model.parameters()),
        "trained_parameters": sum(parameter.numel() for parameter in _learning(trainer.agent.model)),
        "seed": config.run.seed,
        "cold_start": state.cold_start,
        "held_out_questions": trainer.split.held_out,
        "failures": {name: failed for name, (failed, _) in state.failures.items()},
        "failures_in_evaluations": {
            name: sum(
                one.get("failures", {}).get(name, 0) for one in (*state.before.values(), *after.values())
            )
            for name in (*LOST.values(), "retrieval", "tools")
        },
    }
    for one in after.values():
        summary |= {"evaluated_questions": one["questions"], "seen_questions": one["seen"]}
    for moment, evaluations in (("before", state.before), ("after", after)):
        for mode, figures in evaluations.items():
            prefix = "" if mode == "greedy" else f"{mode}_"
            for name in ("em", "em_low", "em_high", "f1", "reward"):
                summary[f"{prefix}{name}_{moment}"] = figures[name]
            summary["metrics"] = sorted({*summary.get("metrics", ()), *figures["metrics"]})
            for name, value in figures["metrics"].items():
                summary[f"{prefix}{name}_{moment}"] = value
            if "success" in figures["metrics"]:
                low, high = wilson_interval(figures["metrics"]["success"], figures["questions"])
                summary[f"{prefix}success_low_{moment}"] = low
                summary[f"{prefix}success_high_{moment}"] = high
    return summary


def _cold_start(config: Config, agent: Agent, progress: Progress) -> dict[str, float]:
    rng = run_generator(config.run.seed, RunPurpose.COLD_START)
    demonstrations = record_demonstrations(
        make_cold_start_env(config),
        agent.tokenizer,
        config.cold_start,
        rng=rng,
        progress=progress,
        transcript=transcript_of(agent.policy),
    )
    with without_adapters(agent.model) as model:
        return cold_start(model, demonstrations, config.cold_start, rng=rng, progress=progress)


def _modes(config: Config) -> tuple[str, ...]:
    if not config.eval.questions:
        return ()
    return MODES if config.eval.sampled else MODES[:1]


def plan_run(config: Config) -> dict[str, Any]:
    """Count what a run would need, with the model on torch's meta device: nothing is allocated.

    Returns:
        parameters and trained_parameters; weights_gb, gradients_gb and optimizer_gb (two moments); leaves
        and most tokens of a step (responses at their limit, prompts included, prefixes once per leaf);
        updates of a step; steps.
    """
    model = build_weights(config.model, seed=0, vocab_size=config.model.vocab_size, device="meta")
    if config.model.lora is not None:
        model = add_adapters(model, config.model.lora, seed=0)
    learning = _learning(model)
    weights_gb, learning_gb = (
        round(sum(one.numel() * one.element_size() for one in parameters) / 1e9, 2)
        for parameters in (list(model.parameters()), learning)
    )
    train, rollout = config.train, config.rollout
    leaves = train.questions * rollout.leaves
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained_parameters": sum(parameter.numel() for parameter in learning),
        "weights_gb": weights_gb,
        "gradients_gb": learning_gb,
        "optimizer_gb": 2 * learning_gb,
        "leaves_per_step": leaves,
        "most_tokens_per_step": leaves * (rollout.max_prompt_tokens + rollout.max_response_tokens),
        "updates_per_step": train.epochs * max(1, train.questions // train.minibatch_questions),
        "steps": train.steps,
    }


def _learning(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def describe_plan(config: Config, plan: dict[str, Any]) -> str:
    """The plan as a few lines for a person."""
    memory = plan["weights_gb"] + plan["gradients_gb"] + plan["optimizer_gb"]
    shape, questions, algorithm = config.rollout, config.train.questions, config.algorithm
    share = f", {plan['trained_parameters']:,} of them in adapters that learn" if config.model.lora else ""
    lines = [
        f"model      {plan['parameters']:,} parameters in {config.model.dtype}{share}",
        f"memory     {memory:,.1f} GB for weights, gradients and AdamW; activations and sampler come on top",
        f"one step   {questions} questions x {shape.leaves} leaves = {plan['leaves_per_step']:,} "
        f"episodes, at most {plan['most_tokens_per_step']:,} tokens, {plan['updates_per_step']} updates",
        f"algorithm  {algorithm.preset}: {shape.expansion} / {algorithm.credit} / {algorithm.loss}",
        f"the run    {plan['steps']:,} steps on {config.env.id}",
        "dry run: nothing was allocated, nothing was written",
    ]
    return "\n".join(lines)
