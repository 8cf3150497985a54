"""Saves and loads checkpoints: safetensors and JSON, complete or absent, never half there.

A checkpoint is a folder `step_000020` with the model (as transformers saves it, so that the folder is a model
path), the tokenizer, `optimizer.safetensors`, and `state.json`, which lists every file with size and digest
and holds a digest of the run's configuration. It is written into a temporary folder, synced, and renamed.
Nothing is unpickled, nothing valid is overwritten.

Of a model with adapters it holds the adapters alone, as peft saves them. What they were trained on is the
model that the run started from, or, where the run made or changed that, its folder `base` (`save_base`).

This module does not know the meaning of the state; the trainer does.
"""

import contextlib
import copy
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from at2po_agent.policies.weights import adapter_weights, base_weights, is_adapted, named_weights
from at2po_agent.runs.disk import replace_file, sync
from at2po_env.errors import At2poError

FORMAT_VERSION = 1
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
ADAPTER = "adapter_model.safetensors"


class CheckpointError(At2poError):
    """A checkpoint could not be written or read; the message names the file and the fix."""


@runtime_checkable
class Savable(Protocol):
    """Writes itself into a folder, as tokenizers of transformers do."""

    def save_pretrained(self, save_directory: str) -> Any:
        """Write all files that loading needs."""


class Restored(NamedTuple):
    """A loaded checkpoint: its folder, and the state of the trainer."""

    path: Path
    state: dict[str, Any]


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tokenizer: Savable | None,
    state: Mapping[str, Any],
    keep: int,
    config: Mapping[str, str],
) -> Path:
    """Write the checkpoint of a step and drop the oldest beyond `keep`.

    Args:
        folder: The run's `checkpoints` folder.
        step: Training steps that are done.
        model: Its weights are saved.
        optimizer: Its state is saved.
        tokenizer: Saved beside the weights; None saves none.
        state: JSON values of the trainer.
        keep: How many checkpoints remain.
        config: Settings that a resumed run has to keep, as texts by key; their digest is saved.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: The disk is full or refuses; earlier checkpoints are as they were.
    """
    target = folder / f"step_{step:06d}"
    temporary = folder / f".{target.name}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".step_*.tmp"):  # a process that was killed left it
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir()
        _write_files(temporary, step, model, optimizer, tokenizer, state, config)
        if target.exists():  # broken, or of a step that is done again: keep it beside
            number = 1
            while (aside := target.with_name(f"{target.name}.replaced-{number}")).exists():
                number += 1
            target.rename(aside)
        temporary.rename(target)
        sync(folder)
        replace_file(folder / "latest", target.name + "\n")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _cannot_write(target, error) from error
    earlier = [path for path in list_checkpoints(folder) if path.name < target.name]
    for old in earlier[keep - 1 :]:
        deleted = folder / f".{old.name}.deleted.tmp"  # half deleted it must not count as a checkpoint
        with contextlib.suppress(OSError):
            old.rename(deleted)
            shutil.rmtree(deleted)
    return target


def base_folder(checkpoint: Path) -> Path:
    """Where the run of a checkpoint keeps the model under its adapters, if it made or changed that model."""
    return checkpoint.absolute().parent.parent / "base"


def save_base(run: Path, model: nn.Module) -> None:
    """Write the model under the adapters of a run into the run's folder, whole or not at all.

    Raises:
        CheckpointError: The disk is full or refuses.
    """
    target = run / "base"
    temporary = run / f".{target.name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir()
        weights = {name: tensor.contiguous() for name, tensor in base_weights(model).items()}
        save_file(weights, temporary / MODEL, metadata={"format": "pt"})
        model.config.save_pretrained(str(temporary))  # type: ignore[union-attr, operator]  # transformers'
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        if target.exists():  # of a start that was stopped before its first checkpoint
            shutil.rmtree(target)
        temporary.rename(target)
        sync(run)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _cannot_write(target, error) from error


def list_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints of a run, the newest first, whether or not they are whole."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.glob("step_*") if path.name[5:].isdigit()), reverse=True)


def load_newest(
    folder: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    report: Callable[[str], None],
    config: Mapping[str, str] | None = None,
) -> Restored:
    """Fill model and optimizer from the newest checkpoint that is whole.

    Args:
        folder: The run's `checkpoints` folder.
        model: Receives the weights.
        optimizer: Receives its state; None leaves it out.
        report: Told, for each broken checkpoint that is passed over, which file is broken and what to do.
        config: Settings that the checkpoint must have been saved with; None takes any.

    Raises:
        CheckpointError: No checkpoint is whole, or the newest one belongs to another configuration.
    """
    found = list_checkpoints(folder)
    for path in found:
        try:
            check_checkpoint(path)
        except CheckpointError as error:
            report(f"{error}; going on from the checkpoint before it")
            continue
        saved = None if config is None else _read_state(path, "")["config"]
        if config is not None and saved is not None and saved["sha256"] != config_digest(config):
            differences = "\n".join(changes(saved["values"], config))
            raise CheckpointError(
                f"{path}: belongs to another configuration than this run; move the folder away, or undo:\n"
                f"{differences}"
            )
        return load_checkpoint(path, model=model, optimizer=optimizer)
    what = "all of its checkpoints are broken" if found else "it holds no checkpoint"
    raise CheckpointError(f"cannot resume from {folder}: {what}; start a new run in another run.dir")


def check_checkpoint(path: Path) -> dict[str, Any]:
    """Read `state.json` and compare every file that it lists.

    Returns:
        The trainer's state.

    Raises:
        CheckpointError: A file is missing, cut short or changed.
    """
    fix = f"delete the folder {path} or restore the file"
    body = _read_state(path, fix)
    for name, expected in body["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing; {fix}")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(
                f"{file}: cut short or changed, {size} bytes instead of {expected['bytes']}; {fix}"
            )
        if _describe(file)["sha256"] != expected["sha256"]:
            raise CheckpointError(f"{file}: its content has changed since it was saved; {fix}")
    return dict(body["state"])


def _read_state(path: Path, fix: str) -> dict[str, Any]:
    """Read the members of `state.json`, and check that each has its shape."""
    file = path / STATE
    shapes = {"version": int, "step": int, "state": dict, "optimizer": dict, "files": dict}
    try:
        body = json.loads(file.read_bytes())
        wrong = [name for name, shape in shapes.items() if not isinstance(body[name], shape)]
        wrong += [
            f"optimizer.{key}" for key, entry in body["optimizer"].items() if not isinstance(entry, dict)
        ]
        wrong += [
            f"files.{name}" for name, entry in body["files"].items() if entry.keys() != {"bytes", "sha256"}
        ]
        config = body.setdefault("config", None)  # an older release saved none
        if config is not None and not (
            isinstance(config["sha256"], str) and isinstance(config["values"], dict)
        ):
            wrong.append("config")
        if wrong:
            raise ValueError(f"another shape of {', '.join(wrong)}")
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}; {fix}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: not the JSON that a checkpoint ends with ({error}); {fix}") from error
    if body["version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{file}: format version {body['version']}, expected {FORMAT_VERSION}; "
            "resume with the release that wrote it"
        )
    return dict(body)


def load_checkpoint(
    path: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> Restored:
    """Fill model and optimizer from one checkpoint.

    Raises:
        CheckpointError: It is not whole, or belongs to another model.
    """
    state = check_checkpoint(path)
    try:
        _fill_weights(model, path)
        if optimizer is not None:
            scalars = _read_state(path, "")["optimizer"]
            _fill_optimizer(optimizer, load_file(path / OPTIMIZER), scalars)
    except (SafetensorError, RuntimeError, ValueError, KeyError, FileNotFoundError) as error:
        raise CheckpointError(
            f"{path}: its weights do not fit this model ({error}); "
            "resume with the configuration it was saved with"
        ) from error
    return Restored(path, state)


def config_digest(config: Mapping[str, str]) -> str:
    """Compute the digest of some settings; their order does not matter."""
    return hashlib.sha256(json.dumps(sorted(config.items())).encode()).hexdigest()


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """List the settings that differ, a line each."""
    return [
        f"  {key}: was {before.get(key, 'unset')}, is {now.get(key, 'unset')}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def _write_files(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tokenizer: Savable | None,
    state: Mapping[str, Any],
    config: Mapping[str, str],
) -> None:
    adapted, base = is_adapted(model), base_folder(folder)
    named = adapter_weights(model) if adapted else named_weights(model)
    weights = {name: tensor.contiguous() for name, tensor in named.items()}
    save_file(weights, folder / (ADAPTER if adapted else MODEL), metadata={"format": "pt"})
    if adapted:
        about: Any = copy.copy(model.peft_config["default"])  # type: ignore[index]  # peft's
        about.inference_mode = True
        if base.is_dir():
            about.base_model_name_or_path = str(base)
        about.save_pretrained(str(folder))  # and no config.json, or transformers would not look for a base
    settings = None if adapted else getattr(model, "config", None)
    if isinstance(settings, Savable):
        settings.save_pretrained(str(folder))
    if tokenizer is not None:
        try:
            tokenizer.save_pretrained(str(folder))
        except Exception as error:
            # The library of tokenizers tells errors of the disk in words: "No space left ... (os error 28)".
            number = re.search(r"\(os error (\d+)\)", str(error))
            if isinstance(error, OSError) or number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error
    tensors, scalars = _split_optimizer(optimizer)
    save_file(tensors, folder / OPTIMIZER)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    # A check of the checkpoint covers the model under its adapters too.
    described = [*names, *([os.path.relpath(base / MODEL, folder)] if adapted and base.is_dir() else [])]
    body = {
        "version": FORMAT_VERSION,
        "step": step,
        "state": dict(state),
        "config": {"sha256": config_digest(config), "values": dict(config)},
        "optimizer": scalars,
        "files": {name: _describe(folder / name) for name in described},
    }
    (folder / STATE).write_text(json.dumps(body, indent=1, allow_nan=False), encoding="utf-8")
    for name in [*names, STATE]:
        sync(folder / name)
    sync(folder)


def _fill_weights(model: nn.Module, path: Path) -> None:
    """Fill a model from the folder of a checkpoint: the adapters and what is under them, or all weights."""
    if not is_adapted(model):
        _fill_model(model, load_file(path / MODEL), path / MODEL)
        return
    base = base_folder(path) / MODEL
    if base.is_file():
        inner = base_weights(model)
        _copy_weights(inner, load_file(base), base)
    _copy_weights(adapter_weights(model), load_file(path / ADAPTER), path / ADAPTER)


def _copy_weights(own: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Copy tensors into those of the same names, which are all."""
    missing = [name for name in own if name not in tensors or tensors[name].shape != own[name].shape]
    foreign = [name for name in tensors if name not in own]
    if missing or foreign:
        raise ValueError(f"{file.name} lacks {missing[:3]} and has foreign {foreign[:3]}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def _fill_model(model: nn.Module, tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    own = model.state_dict()
    filled = {(own[name].data_ptr(), own[name].shape) for name in tensors if name in own}
    missing = [name for name, tensor in own.items() if (tensor.data_ptr(), tensor.shape) not in filled]
    foreign = [name for name in tensors if name not in own]
    if missing or foreign:
        raise ValueError(f"{file.name} lacks {missing[:3]} and has foreign {foreign[:3]}")
    model.load_state_dict(tensors, strict=False)


def _split_optimizer(
    optimizer: torch.optim.Optimizer,
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{key}"] = value.detach().contiguous()
            else:
                scalars.setdefault(str(index), {})[key] = value
    return tensors, scalars


def _fill_optimizer(
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, torch.Tensor],
    scalars: Mapping[str, Mapping[str, Any]],
) -> None:
    entries: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in scalars.items()}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        entries.setdefault(int(index), {})[key] = tensor
    current = optimizer.state_dict()
    optimizer.load_state_dict({"state": entries, "param_groups": current["param_groups"]})


def _describe(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _cannot_write(target: Path, error: Exception) -> CheckpointError:
    full = getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error).lower()
    why = "the disk is full" if full else str(error)
    fix = "free some space" if full else "check the folder"
    earlier = [path.name for path in list_checkpoints(target.parent) if path != target]
    intact = f"{earlier[0]} is intact" if earlier else "there is no earlier checkpoint"
    return CheckpointError(f"{target}: cannot write the checkpoint, {why}; {intact}; {fix} and resume")
