"""Writes a checkpoint of a run as a plain Hugging Face folder, which loads without at2po.

The folder holds the weights in shards of safetensors, the model's and the generation's configuration, the
tokenizer with the chat template of the run, a model card with the run's figures, and the run's configuration.
It is written beside its place, synced and renamed, so that a kill leaves no folder that looks whole.

This module knows no hub.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from transformers import GenerationConfig

from at2po_agent.agents.model import load_model
from at2po_agent.config.loading import CONFIG_FILE, config_text, load_config
from at2po_agent.config.sections import Config
from at2po_agent.report.run_folder import check_run_folder, read_metrics
from at2po_agent.report.tables import command_line
from at2po_agent.runs.checkpoint import check_checkpoint, list_checkpoints
from at2po_agent.runs.disk import sync
from at2po_agent.runs.folder import CHECKPOINTS
from at2po_agent.transcripts.tokenizer import HFTokenizer
from at2po_env.errors import At2poError, ConfigError

CARD, SETTINGS = "README.md", "training_config.yaml"
MAX_SHARD_SIZE = "5GB"


class ExportError(At2poError):
    """A checkpoint cannot be exported, or the exported folder cannot be pushed."""


class Exported(NamedTuple):
    """A checkpoint and the folder that it was written to."""

    folder: Path
    checkpoint: Path


def export_run(
    run: Path,
    out: Path | None = None,
    *,
    step: int | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
    replace: bool = False,
) -> Exported:
    """Write a checkpoint as a folder that `AutoModelForCausalLM` and `AutoTokenizer` of transformers load.

    Args:
        run: The run's folder.
        out: The folder to write; None takes RUN/export/step_000020.
        step: Which checkpoint; None takes the newest.
        max_shard_size: Most bytes of one file of weights, such as 5GB or 200KB.
        replace: Whether an earlier export in `out` may be replaced.

    Raises:
        ExportError: There is something else in `out`, or the disk refuses.
        ConfigError: The run has no such checkpoint, or `max_shard_size` is no size.
        CheckpointError: The checkpoint is damaged.
        DataError: `run` is no run's folder.
    """
    config = load_config(check_run_folder(run) / CONFIG_FILE)
    checkpoint = _find_checkpoint(run, step)
    target = out or run / "export" / checkpoint.name
    _check_target(target, replace=replace)
    state = check_checkpoint(checkpoint)
    model: Any = load_model(checkpoint, dtype=config.model.dtype)
    tokenizer = HFTokenizer.load(checkpoint).hf
    with _written_whole(target) as folder:
        model.generation_config = _generation_config(config, tokenizer)
        try:
            model.save_pretrained(folder, max_shard_size=max_shard_size)
        except ValueError as error:
            raise ConfigError(
                f"--max-shard-size: got {max_shard_size!r}, expected bytes such as 5GB or 200KB ({error})"
            ) from error
        tokenizer.save_pretrained(folder)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        card = model_card(config, checkpoint, state, read_metrics(run), parameters=parameters)
        (folder / CARD).write_text(card, encoding="utf-8")
        (folder / SETTINGS).write_text(config_text(config), encoding="utf-8")
    return Exported(target, checkpoint)


def _find_checkpoint(run: Path, step: int | None) -> Path:
    found = list_checkpoints(run / CHECKPOINTS)
    if not found:
        raise ConfigError(f"{run}: no checkpoint to export yet; train it first: at2po train {run} --resume")
    chosen = [path for path in found if step is None or int(path.name[5:]) == step]
    if not chosen:
        steps = ", ".join(str(int(path.name[5:])) for path in reversed(found))
        raise ConfigError(f"--step: {run} has no checkpoint of step {step}; it has those of {steps}")
    return chosen[0]


def _check_target(target: Path, *, replace: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir() or not (target / SETTINGS).is_file():
        raise ExportError(f"{target}: is no earlier export and is left as it is. Fix: choose another --out")
    if not replace:
        raise ExportError(f"{target}: holds an export already. Fix: add --replace, or choose another --out")


@contextlib.contextmanager
def _written_whole(target: Path) -> Iterator[Path]:
    """Give a folder beside the target, and put it in the target's place when the block is done."""
    temporary, old = (target.with_name(f".{target.name}.{os.getpid()}.{kind}.tmp") for kind in ("new", "old"))
    try:
        for leftover in target.parent.glob(f".{target.name}.*.tmp"):  # a process that was killed left it
            shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise ExportError(
            f"{target}: cannot be written ({error.strerror or error}). Fix: free some space, or choose "
            "another --out"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _generation_config(config: Config, tokenizer: Any) -> GenerationConfig:
    """Sampling as in training, up to the token that ends a turn."""
    rollout = config.rollout
    sampling = {"temperature": rollout.temperature, "top_p": rollout.top_p} if rollout.temperature else {}
    return GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=bool(sampling),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )


def model_card(
    config: Config,
    checkpoint: Path,
    state: Mapping[str, Any],
    metrics: list[dict[str, Any]],
    *,
    parameters: int,
) -> str:
    """Write the model card: what was trained, on what, with which figures and by which commands.

    Args:
        config: The run's configuration.
        checkpoint: The folder of the checkpoint.
        state: What its `state.json` holds of the trainer.
        metrics: The records of the run's metrics.jsonl.
        parameters: Of the model.
    """
    step, own, run = state["step"], config.model, checkpoint.parent.parent
    local = own.path is None or own.random_init or Path(own.path).exists()
    about = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    tags = {"tags": ["at2po", config.algorithm.preset]}
    base = {} if local else {"base_model": own.path}
    start = f"a new {own.architecture} model" if own.path is None or own.random_init else f"`{own.path}`"
    cold = f" after a cold start of {config.cold_start.steps:,} steps" if config.cold_start.steps else ""
    after = {
        record["mode"]: record
        for record in metrics
        if record["kind"] == "eval" and record["step"] == step and step > 0
    }
    facts = {
        "Start": start + cold,
        "Algorithm": f"`{config.algorithm.preset}` (expansion `{config.rollout.expansion}`, credit "
        f"`{config.algorithm.credit}`, loss `{config.algorithm.loss}`)",
        "Environment": f"`{config.env.id}`",
        "Training steps": f"{step:,}",
        "Sampled tokens": f"{state['sampled_tokens']:,}",
        "Parameters": f"{parameters:,}",
        "Seed": f"{config.run.seed}",
    }
    return "\n".join(
        [
            f"---\n{yaml.safe_dump({**about, **base, **tags}, sort_keys=False)}---\n",
            f"# {config.run.name}\n",
            f"This model was trained with at2po {version('at2po')}, an agent that acts over many turns. Load "
            "it with `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`.\n",
            *_table(("", ""), facts.items()),
            "",
            "## Evaluation\n",
            *_evaluation(config, state["before"], after),
            "",
            "## How it was made\n",
            "```console",
            f"$ {command_line('at2po', 'train', SETTINGS)}    # the file lies in this folder",
            f"$ {command_line('at2po', 'export', run, '--step', str(step))}",
            "```\n",
        ]
    )


def _evaluation(config: Config, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    if not before and not after:
        return ["The run did not evaluate at this step."]
    rows = []
    for mode in dict.fromkeys((*before, *after)):
        measured = [moment[mode] for moment in (before, after) if mode in moment]
        names = [("exact match", "em"), ("F1", "f1"), ("reward", "reward")]
        for title, key in names + [(name, name) for name in measured[0]["metrics"]]:
            cells = [_figure(moment.get(mode), key) for moment in (before, after)]
            rows.append((f"{title}, {mode}", *cells, f"{measured[-1]['questions']:,}"))
    where = f"`{config.eval.id or config.env.id}`, one episode per question, 95% intervals by Wilson."
    return [where, "", *_table(("", "before", "after", "questions"), rows)]


def _figure(evaluation: Mapping[str, Any] | None, key: str) -> str:
    if evaluation is None:
        return "-"
    if key == "em":
        return f"{evaluation['em']:.3f} ({evaluation['em_low']:.3f} to {evaluation['em_high']:.3f})"
    return f"{evaluation['metrics'].get(key, evaluation.get(key)):.3f}"


def _table(titles: tuple[str, ...], rows: Any) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (titles, ("---",) * len(titles), *rows)]
