"""Opens the folder of a run for one process at a time, and writes its files."""

import contextlib
import glob
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from at2po_agent.config.loading import CONFIG_FILE, config_text, flatten, load_config
from at2po_agent.config.sections import Config
from at2po_agent.runs.checkpoint import changes, list_checkpoints
from at2po_agent.runs.disk import disk_refusals, replace_file, sync
from at2po_env.errors import ConfigError

METRICS_FILE, SUMMARY_FILE, LOCK_FILE = "metrics.jsonl", "summary.json", ".lock"
FIRST_ERROR = "first_error.txt"
CHECKPOINTS, TREES, TENSORBOARD = "checkpoints", "trees", "tensorboard"
RUNS = Path("runs")
MAY_CHANGE = (
    *("train.steps", "train.save_", "train.keep_", "train.micro_batch_tokens", "eval."),
    *("cluster.", "health.", "run.dir", "run.name", "run.threads", "run.dry_run"),
)
"""Beginnings of the settings that a resumed run may change; any other would make it another run."""


class RunFolder:
    """Writes the files of a run; `open_run` makes it and holds the lock.

    Args:
        path: The folder.
        changed: Whether the configuration is another than that of the run before.
    """

    def __init__(self, path: Path, *, changed: bool = True) -> None:
        self.path = path
        self._changed = changed

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / CHECKPOINTS

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's event files."""
        return self.path / TENSORBOARD

    @property
    def resume_command(self) -> str:
        """The command that goes on with the run."""
        return f"at2po train {self.path} --resume"

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl."""
        line = json.dumps(record, allow_nan=False) + "\n"
        with (
            disk_refusals(self.path / METRICS_FILE),
            (self.path / METRICS_FILE).open("a", encoding="utf-8") as stream,
        ):
            stream.write(line)

    def metrics_lines(self) -> int:
        """Count the lines of metrics.jsonl, once they are on the disk."""
        file = self.path / METRICS_FILE
        if not file.exists():
            return 0
        with disk_refusals(file):
            sync(file)
            return file.read_bytes().count(b"\n")

    def rewind_metrics(self, step: int, lines: int | None = None) -> None:
        """Move the lines that will be written again into a file of their own.

        Args:
            step: Step of the checkpoint that the run goes on from; -1 for the beginning.
            lines: Lines that were there when it was saved; None keeps the lines of its step and of earlier
                ones (an older release does not tell how many there were).
        """
        file = self.path / METRICS_FILE
        if not file.exists():
            return
        with disk_refusals(file):
            written = file.read_bytes().splitlines(keepends=True)
            if lines is None:
                kept = [line for line in written if _is_up_to(line, step)]
                dropped = [line for line in written if not _is_up_to(line, step)]
            else:
                kept, dropped = written[:lines], written[lines:]
            if not dropped:
                return
            with (self.path / f"metrics.after_step_{max(0, step):06d}.jsonl").open("ab") as stream:
                stream.writelines(dropped)
            replace_file(file, b"".join(kept))

    def write_trees(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Keep trees of a step, one JSON object per line."""
        folder = self.path / TREES
        lines = [json.dumps(record, allow_nan=False) + "\n" for record in records]
        with disk_refusals(folder):
            folder.mkdir(exist_ok=True)
            replace_file(folder / f"step_{step:06d}.jsonl", "".join(lines))

    def keep_first_error(self, traceback: str) -> Path | None:
        """Keep the first traceback of an environment that raised.

        Returns:
            The file; None where it was there already.
        """
        file = self.path / FIRST_ERROR
        if file.exists():
            return None
        with disk_refusals(file):
            replace_file(file, traceback)
        return file

    def finished(self, steps: int) -> dict[str, Any] | None:
        """Read the summary of a run that has nothing left to do; None where it has.

        Args:
            steps: The training steps of the run.
        """
        file = self.path / SUMMARY_FILE
        if self._changed or not file.is_file():
            return None
        try:
            summary: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return summary if summary["steps"] == steps else None
        except (ValueError, KeyError, TypeError, RecursionError):
            return None

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json."""
        with disk_refusals(self.path / SUMMARY_FILE):
            replace_file(self.path / SUMMARY_FILE, json.dumps(summary, indent=2, allow_nan=False) + "\n")


class ReadOnlyFolder(RunFolder):
    """The folder as all learners but the first have it: they read it, and leave writing to that one."""

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Write nothing."""

    def rewind_metrics(self, step: int, lines: int | None = None) -> None:
        """Move nothing."""

    def write_trees(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Write nothing."""

    def keep_first_error(self, traceback: str) -> Path | None:
        """Keep nothing."""

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write nothing."""


@contextlib.contextmanager
def open_run(config: Config, *, resume: bool = False) -> Iterator[tuple[RunFolder, Config]]:
    """Take a folder for a run, and hold its lock until the end of the block.

    Args:
        config: `run.dir` names the folder; none takes a free one for a new run, and the newest for a resumed
            one.
        resume: Whether the folder holds a run to go on with.

    Yields:
        The folder, and the configuration with `run.dir` filled in.

    An exception in the block removes a new folder in which nothing was recorded yet; an interrupt does not.

    Raises:
        ConfigError: Another process uses the folder; a new run would meet an old one; a resumed run has no
            folder or was started with other settings.
    """
    path = _choose_folder(config, resume=resume)
    new = not path.exists()
    lock = FileLock(str(path / LOCK_FILE))
    with disk_refusals(path):
        path.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(
                f"{path}: another run is using this folder; wait for it, stop it, or choose another run.dir"
            ) from error
    try:
        config = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(path)})})
        if resume:
            _check_same_run(path, config)
            done = max((int(one.name[5:]) for one in list_checkpoints(path / CHECKPOINTS)), default=0)
            if done > config.train.steps:
                raise ConfigError(
                    f"train.steps: got {config.train.steps}, but the run in {path} has done {done} steps "
                    f"already. Fix: give at least {done}, or start a new run in another run.dir"
                )
        elif (path / METRICS_FILE).exists() or (path / CHECKPOINTS).exists():
            raise ConfigError(
                f"{path}: holds a run already; add --resume to go on with it, or choose another run.dir"
            )
        file, text = path / CONFIG_FILE, config_text(config)
        with disk_refusals(file):
            for place in (path, path / TREES, path / CHECKPOINTS):
                for stray in place.glob(".*.tmp"):  # a process that was killed left it
                    if stray.is_dir():
                        shutil.rmtree(stray)
                    else:
                        stray.unlink()
            changed = not file.is_file() or file.read_bytes() != text.encode()
            if changed:
                replace_file(file, text)
        yield RunFolder(path, changed=changed), config
    except Exception:
        if new:  # a start that failed leaves nothing behind
            with contextlib.suppress(OSError):
                _remove_unused(path)
        raise
    finally:
        lock.release()


def _remove_unused(path: Path) -> None:
    """Remove a folder that holds nothing of a run but its configuration."""
    if {file.name for file in path.iterdir()} <= {CONFIG_FILE, LOCK_FILE}:
        shutil.rmtree(path)


def newest_run(name: str) -> Path | None:
    """The folder of runs/NAME, runs/NAME-2 ... with the highest number; None when there is none."""
    runs = _numbered_runs(name)
    return runs[max(runs)] if runs else None


def _numbered_runs(name: str) -> dict[int, Path]:
    """The folders runs/NAME (1), runs/NAME-2 ... by number."""
    runs = {}
    for path in RUNS.glob(f"{glob.escape(name)}*"):
        rest = path.name.removeprefix(name)
        if path.is_dir() and re.fullmatch(r"(-\d+)?", rest):
            runs[int(rest[1:] or 1)] = path
    return runs


def _choose_folder(config: Config, *, resume: bool) -> Path:
    if config.run.dir is not None:
        path = Path(config.run.dir)
        if resume and not (path / CONFIG_FILE).is_file():
            raise ConfigError(
                f"{path}: no run to resume there (no {CONFIG_FILE}); leave --resume out to start one"
            )
        return path
    if not resume:
        number = max(_numbered_runs(config.run.name), default=0) + 1
        return RUNS / (config.run.name if number == 1 else f"{config.run.name}-{number}")
    newest = newest_run(config.run.name)
    if newest is None:
        raise ConfigError(f"runs/{config.run.name}: no run to resume; leave --resume out, or name its folder")
    return newest


def fixed_settings(config: Config) -> dict[str, str]:
    """Return the settings that a resumed run has to keep: JSON texts by dotted key.

    A learning rate that falls towards the end of the run fixes `train.steps` too.
    """
    values = dict(flatten(config.model_dump(mode="json", exclude={"served"})))
    kept = [key for key in values if not key.startswith(MAY_CHANGE)]
    kept += ["train.steps"] if config.optimizer.schedule != "constant" else []
    return {key: json.dumps(values[key]) for key in kept}


def _check_same_run(path: Path, config: Config) -> None:
    try:
        before = fixed_settings(load_config(path))
    except ConfigError:
        return  # the file is damaged; the digest in the checkpoints tells whether `config` is the run's
    if changed := changes(before, fixed_settings(config)):
        raise ConfigError(
            f"{path}: cannot be resumed with other settings; start a new run in another run.dir, or undo:\n"
            + "\n".join(changed)
        )


def _is_up_to(line: bytes, step: int) -> bool:
    """Tell whether a line is whole and of a step up to `step`; a last line cut short is not."""
    try:
        record = json.loads(line)
        return bool(record["step"] <= step)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
