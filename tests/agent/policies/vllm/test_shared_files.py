"""Files in shared memory that killed processes leave behind: found by their notes, and removed."""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.guess_env import CharTokenizer

from at2po_agent.policies.vllm import process
from at2po_agent.policies.vllm.shared_files import (
    SHARED,
    descendants,
    mapped_files,
    note_files,
    remove_noted,
    sweep,
)
from at2po_env.errors import PolicyError

MAPS = """
import mmap, os, sys, time
for path in sys.argv[1:]:
    with open(path, "wb") as file:
        file.write(b"x" * 4096)
    held = mmap.mmap(os.open(path, os.O_RDWR), 4096)
print("ready", flush=True)
time.sleep(100)
"""
NOTES = """
import sys, time
from pathlib import Path
from at2po_agent.policies.vllm.shared_files import note_files
note_files("engine-0", sys.argv[2:], Path(sys.argv[1]))
print("ready", flush=True)
time.sleep(100)
"""


def started(program: str, *words: object) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, words)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def kill(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.wait()
    assert child.stdout is not None
    child.stdout.close()


def test_files_of_a_killed_process_are_removed_once_nobody_maps_them(tmp_path: Path) -> None:
    engine = started(MAPS, tmp_path / "psm_1")
    names = mapped_files(descendants(os.getpid()), tmp_path)  # of a child, found through its parent
    assert names == {"psm_1"}
    note = note_files("engine-0", names, tmp_path)
    assert note is not None
    assert not remove_noted(note)  # it is in use
    kill(engine)
    assert (tmp_path / "psm_1").exists()  # a killed process removes nothing
    assert remove_noted(note)
    assert list(tmp_path.iterdir()) == []
    assert remove_noted(note)  # again does no harm


def test_the_next_start_removes_what_a_killed_learner_has_noted(tmp_path: Path) -> None:
    for name in ("psm_1", "psm_2", "mine", "other"):
        (tmp_path / name).write_bytes(b"x" * 4096)
    learner, living = started(NOTES, tmp_path, "psm_1", "psm_2"), started(NOTES, tmp_path, "mine")
    with (tmp_path / "psm_2").open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        sweep(tmp_path)
        assert (tmp_path / "psm_1").exists()  # both learners live
        kill(learner)
        sweep(tmp_path)
        assert not (tmp_path / "psm_1").exists()
        assert (tmp_path / "psm_2").exists()  # a process maps it
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir() if "at2po" not in path.name} == {"mine", "other"}
    kill(living)
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"other"}


@pytest.mark.parametrize("text", ["", "{", '["../kept"]', '["/etc/hostname"]', "[1, null]", '{"kept": 1}'])
def test_a_note_removes_nothing_outside_its_folder(tmp_path: Path, text: str) -> None:
    (tmp_path / "kept").write_text("x")
    folder = tmp_path / "shared"
    folder.mkdir()
    (folder / f"at2po-files-{os.getuid()}-1-0-x").write_text(text)
    (folder / f"at2po-files-{os.getuid()}-no").write_text(json.dumps(["kept"]))
    sweep(folder)
    assert (tmp_path / "kept").exists()


def test_a_note_of_another_process_with_the_same_number_is_stale(tmp_path: Path) -> None:
    (tmp_path / "psm_1").write_text("x")
    (tmp_path / f"at2po-files-{os.getuid()}-{os.getpid()}-12-engine-0").write_text('["psm_1"]')
    sweep(tmp_path)  # this process did not begin at 12
    assert list(tmp_path.iterdir()) == []


def pretend(connection: Any, spec: Any, tokenizer: Any) -> None:
    """Stands in for an engine: maps shared memory, as the workers of a split model do, and waits."""
    path = Path(spec.model)
    path.write_bytes(b"x" * 4096)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        connection.send_bytes(process.Wire(tokenizer).dumps(("reply", (True, "ready"))))
        time.sleep(100)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs /dev/shm")
def test_a_killed_engine_leaves_no_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "serve", pretend)
    path = SHARED / f"psm_at2po_test_{os.getpid()}"
    config = SimpleNamespace(start_timeout_s=120.0, stall_timeout_s=60.0, threads=0)
    spec: Any = SimpleNamespace(model=str(path), config=config, devices=None)
    engine = process.RemoteEngine(spec, CharTokenizer(), number=0)
    try:
        engine.wait_ready()
        assert path.exists()
        assert engine.process.pid is not None
        os.kill(engine.process.pid, signal.SIGKILL)
        with pytest.raises(PolicyError, match="was killed by SIGKILL"):
            engine.end()
        assert not path.exists()
        assert not list(SHARED.glob(f"at2po-files-{os.getuid()}-{os.getpid()}-*"))
    finally:
        engine.close()
        path.unlink(missing_ok=True)
