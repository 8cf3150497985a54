"""Kills a training run, and compares what a resume makes of it with a run in one piece, bit for bit.

The run is as small as one can be that writes every file: a model of one layer that is trained for two
steps in a fifth of a second, and evaluated. It is forked off a process that has imported everything.

A kill is aimed: a run of the reference counts what happens to each file that it writes (opened, written by
safetensors, synced, renamed, deleted), and a try strikes before, after or in the middle of one of these. In
the middle of a write the kernel strikes, which ends a process whose file outgrows a limit.
"""

from __future__ import annotations

import builtins
import contextlib
import gc
import io
import json
import os
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from at2po_agent.agents.agent import Agent
from at2po_agent.agents.model import ModelShape, build_model, train_tokenizer
from at2po_agent.config.loading import load_config
from at2po_agent.config.sections import Config
from at2po_agent.policies.hf.policy import HFPolicy
from at2po_agent.run import run_training
from at2po_agent.runs.checkpoint import check_checkpoint, list_checkpoints
from at2po_agent.runs.interrupts import TrainingInterrupted
from at2po_env import ToolEnv
from at2po_env.errors import At2poError
from benchmarks.campaign.runner import Try

DONE, REFUSED, STOPPED, CRASHED = 0, 3, 4, 5
"""How a run ended: at its end, with one of our errors, on a signal, with any other exception."""
STEPS = 2


def make_env() -> ToolEnv:
    """An environment in which every text earns something, so that there is always something to learn."""

    def note(word: str) -> str:
        """Write a word down.

        Args:
            word: Any word.
        """
        return word

    return ToolEnv(
        tools=[note],
        tasks=[{"question": f"Say {word}", "golden_answers": [word]} for word in ("yes", "no", "tea", "ink")],
        prompt="{question}: ",
        reward=lambda ending: zlib.crc32(ending.response.encode("utf-8", "replace")) % 5 / 4,
        on_malformed="notice",
        max_turns=2,
    )


def train(folder: Path) -> None:
    """Start the run of a folder, or go on with it, as a person would."""

    def make_agent(config: Config) -> Agent:
        tokenizer = train_tokenizer(["Say yes: no: tea, ink"] * 9, vocab_size=280)
        shape = ModelShape(
            vocab_size=len(tokenizer), hidden_size=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn_size=16
        )
        model = build_model(shape, seed=config.run.seed, eos_id=tokenizer.eos_id)
        return Agent(model, HFPolicy(model, tokenizer, slots=32))

    config = Config.model_validate(
        {
            "run": {"dir": str(folder), "name": "campaign", "seed": 1, "threads": 1},
            "env": {"id": "campaign"},
            "eval": {"questions": 1, "every": 1},
            "rollout": {
                **{"chains": 2, "forks": 1, "rounds": 1},
                **{"max_turn_tokens": 3, "max_response_tokens": 400},
            },
            "optimizer": {"lr": 1e-2},
            "train": {
                **{"steps": STEPS, "questions": 2, "minibatch_questions": 1, "old_log_probs": "sampler"},
                **{"save_every": 1, "save_trees_every": 1, "keep_checkpoints": 2},
            },
        }
    )
    resume = (folder / "config.yaml").is_file()
    run_training(config, agent=make_agent, env=make_env(), eval_env=make_env(), resume=resume)


def in_child(act: Callable[[], object], said: Path | None = None) -> int:
    """Fork, do something, and return the process id; the status says how it ended."""
    pid = os.fork()
    if pid:
        return pid
    status, what = DONE, ""
    try:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        act()
    except TrainingInterrupted:
        status = STOPPED
    except At2poError as error:
        status, what = REFUSED, f"{type(error).__name__}: {error}"
    except BaseException:  # noqa: BLE001  the process ends here
        status, what = CRASHED, traceback.format_exc(limit=-4)
    with contextlib.suppress(BaseException):
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
        if said is not None:
            os.close(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
            said.write_text(what, encoding="utf-8", errors="replace")
    os._exit(status)


def wait_for(pid: int) -> int:
    """The status of a child: its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# Events of files ------------------------------------------------------------------------------------------

_FILES = (
    ("config.yaml", "config"),
    ("metrics", "metrics"),
    ("summary.json", "summary"),
    ("model.safetensors", "weights"),
    ("optimizer.safetensors", "optimizer"),
    ("state.json", "state"),
    ("latest", "latest"),
    ("tfevents", "tensorboard"),
    ("trees", "trees"),
    ("tokenizer", "tokenizer"),
    ("step_", "checkpoint"),
)


def file_of(path: str) -> str:
    """Name the file of a run that a path belongs to."""
    name = path.removesuffix(f".{os.getpid()}.tmp")
    return next((file for part, file in _FILES if part in name), "other")


class Watch:
    """Sees what this process does to the files of a folder, and calls `strike` at each event.

    Args:
        folder: Paths outside it are not seen.
        strike: Called with the file, the operation, the moment ("before" or "after") and the path. What it
            raises takes the place of the operation.
    """

    def __init__(self, folder: Path, strike: Callable[[str, str, str, str], None]) -> None:
        self._folder, self._strike, self._inside = str(folder), strike, False
        for name in ("fsync", "rename", "replace", "unlink", "remove", "rmdir", "mkdir"):
            self._wrap(os, name)
        self._wrap(safetensors.torch, "serialize_file")
        self._wrap(io, "open")
        builtins.open = io.open

    def _wrap(self, holder: Any, name: str) -> None:
        real = getattr(holder, name)

        def watched(*values: Any, **options: Any) -> Any:
            path = self._path(name, values, options)
            if self._inside or not path.startswith(self._folder) or path.endswith(".lock"):
                return real(*values, **options)
            self._inside = True
            try:
                self._strike(file_of(path), name, "before", path)
                self._inside = False
                result = real(*values, **options)
                self._inside = True
                self._strike(file_of(path), name, "after", path)
            finally:
                self._inside = False
            return result

        setattr(holder, name, watched)

    @staticmethod
    def _path(name: str, values: tuple[Any, ...], options: dict[str, Any]) -> str:
        """The path that an operation is about; "" for one that writes nothing."""
        if name == "open":
            mode = str(options.get("mode", values[1] if len(values) > 1 else "r"))
            return (
                os.path.abspath(values[0])
                if set(mode) & set("wax+") and not isinstance(values[0], int)
                else ""
            )
        if name == "fsync":
            return os.readlink(f"/proc/self/fd/{values[0]}")
        path = os.fspath(values[1] if name == "serialize_file" else values[0])
        if options.get("dir_fd") is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{options['dir_fd']}"), path)
        return os.path.abspath(path)


def census(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Run to the end in a child, and list the events (operation, moment) of each file."""
    found, list_file = folder / "run", folder / "events.json"
    events: dict[str, list[tuple[str, str]]] = {}

    def act() -> None:
        Watch(found, lambda file, name, moment, _: events.setdefault(file, []).append((name, moment)))
        train(found)
        list_file.write_text(json.dumps(events))

    status = wait_for(in_child(act, folder / "said"))
    if status != DONE:
        raise RuntimeError(f"the reference ended with {status}: {(folder / 'said').read_text()}")
    return {file: [tuple(event) for event in own] for file, own in json.loads(list_file.read_text()).items()}


# Comparing --------------------------------------------------------------------------------------------------


def _untimed(record: dict[str, Any]) -> dict[str, Any]:
    """A record without its times and places."""
    timed = ("seconds", "wall_seconds", "folder")
    return {
        key: _untimed(value) if isinstance(value, dict) else value
        for key, value in record.items()
        if not key.startswith(timed) and key not in ("files", "config", "optimizer")
    }


def results(run: Path, part: str) -> Any:
    """A part of what a run has made, but for times."""
    newest = run / "checkpoints" / f"step_{STEPS:06d}"
    if part == "state":
        return _untimed(json.loads((newest / "state.json").read_text()))
    if part == "summary":
        return _untimed(json.loads((run / "summary.json").read_text()))
    if part == "metrics":
        return [_untimed(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]
    if part == "trees":
        return {path.name: zlib.crc32(path.read_bytes()) for path in sorted((run / "trees").iterdir())}
    if part == "strays":
        return [path.name for path in run.rglob(".*.tmp")]
    return zlib.crc32((newest / f"{part}.safetensors").read_bytes())


PARTS = ("model", "optimizer", "summary", "state", "metrics", "trees", "strays")


def differences(run: Path, reference: Path, parts: tuple[str, ...] = PARTS) -> str:
    """What a run has made otherwise than the reference."""
    wrong = [part for part in parts if results(run, part) != results(reference, part)]
    return f"differs from a run in one piece: {', '.join(wrong)}" if wrong else ""


def wounds(run: Path) -> str:
    """What a run that was struck has left that may never be there; "" if all is well."""
    try:
        for path in list_checkpoints(run / "checkpoints"):
            check_checkpoint(path)
        if (run / "config.yaml").exists():
            load_config(run)
        if (run / "summary.json").exists():
            json.loads((run / "summary.json").read_text())
        for path in (run / "trees").glob("*.jsonl"):
            [json.loads(line) for line in path.read_text().splitlines()]
        if (run / "metrics.jsonl").exists():
            [json.loads(line) for line in (run / "metrics.jsonl").read_text().split("\n")[:-1]]
    except (At2poError, ValueError) as error:
        return f"left behind: {type(error).__name__}: {error}"
    return ""


def finish(run: Path, reference: Path, said: Path) -> str:
    """Go on to the end, and compare; returns what went wrong."""
    status = wait_for(in_child(lambda: train(run), said))
    if status != DONE:
        return f"the resume ended with {status}: {said.read_text()[-600:] if said.exists() else ''}"
    return differences(run, reference)


def prepare(folder: Path) -> tuple[Path, dict[str, list[tuple[str, str]]]]:
    """The run in one piece, with the events of its files; made once for a folder."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=folder) as warm:  # a child then has everything at hand
        train(Path(warm) / "run")
    gc.collect()
    gc.freeze()
    home = folder / "reference"
    if not (home / "events.json").is_file():
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        census(home)
    events = json.loads((home / "events.json").read_text())
    return home / "run", {file: [tuple(event) for event in own] for file, own in sorted(events.items())}


# Kills ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def kills(folder: Path) -> Iterator[Try]:
    """Runs that are killed, by turns at every event of every file, and at random moments."""
    reference, events = prepare(folder)
    files = list(events)

    def attempt(rng: random.Random, number: int) -> str:
        run, said = folder / "run", folder / "said"
        shutil.rmtree(run, ignore_errors=True)
        place, lot = number // (len(files) + 1), number % (len(files) + 1)
        if lot < len(files):
            file = files[lot]
            position, how = place // 3 % len(events[file]), ("kill", "cut", "stop")[place % 3]
            status = wait_for(in_child(lambda: _train_struck(run, file, position, how, rng), said))
            story = f"{how} at event {position} of {file}"
        else:
            status, story = _killed_at_random(run, said, rng)
        if status == CRASHED:
            return f"{story}: {said.read_text()[-600:]}"
        if rng.random() < 0.3:  # it is killed once more
            again = in_child(lambda: train(run))
            time.sleep(rng.uniform(0.0, 0.15))
            os.kill(again, signal.SIGKILL)
            wait_for(again)
        what = wounds(run) or finish(run, reference, said)
        return f"{story}: {what}" if what else ""

    yield attempt


def _train_struck(run: Path, file: str, position: int, how: str, rng: random.Random) -> None:
    """Train until an event of a file, and be killed, be cut short while writing it, or be told to stop."""
    seen, at = 0, rng.choice((0, 1, rng.randrange(200), rng.randrange(20_000)))

    def strike(event_file: str, name: str, _: str, path: str) -> None:
        nonlocal seen
        seen += event_file == file
        if event_file != file or seen != position + 1:
            return
        if how == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        elif how == "cut" and name in ("open", "serialize_file"):
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            size = os.path.getsize(path) if os.path.exists(path) else 0
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + at, hard))
        else:
            os.kill(os.getpid(), signal.SIGKILL)

    Watch(run, strike)
    train(run)


def _killed_at_random(run: Path, said: Path, rng: random.Random) -> tuple[int, str]:
    """Train and be killed, told to stop, or frozen while another process takes the folder."""
    how = rng.choice(("SIGKILL", "SIGKILL", "SIGTERM", "SIGINT", "SIGSTOP"))
    pid, moment = in_child(lambda: train(run), said), rng.uniform(0.0, 0.25)
    time.sleep(moment)
    os.kill(pid, getattr(signal, how))
    story = f"{how} after {moment:.3f} s"
    if how == "SIGSTOP":
        other = wait_for(in_child(lambda: train(run), said))
        if other == CRASHED:
            return CRASHED, f"{story}, another process in the same folder"
        os.kill(pid, signal.SIGCONT)
    return wait_for(pid), story
