import errno
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from helpers.kills import killed_at

from at2po_agent.config.loading import config_text, load_config
from at2po_agent.config.sections import Config
from at2po_agent.runs.disk import RunFolderError, replace_file
from at2po_agent.runs.folder import RunFolder, fixed_settings, open_run
from at2po_env.errors import ConfigError


def config_of(folder: Path, *, steps: int = 2, **optimizer: Any) -> Config:
    run = {"dir": str(folder), "name": "guess", "seed": 3}
    return Config.model_validate({"run": run, "train": {"steps": steps}, "optimizer": optimizer})


def start(folder: Path, **changes: Any) -> str:
    """Open a new run, leave it, and return its configuration."""
    with open_run(config_of(folder, **changes)):
        pass
    return (folder / "config.yaml").read_text(encoding="utf-8")


def go_on(folder: Path, **changes: Any) -> None:
    with open_run(config_of(folder, **changes), resume=True):
        pass


def test_a_kill_in_the_middle_of_writing_the_configuration_leaves_it_whole(tmp_path):
    # A real kill: the kernel ends a process that writes more than 100 bytes into a file.
    folder = tmp_path / "run"
    before = start(folder)

    def cut_short() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        go_on(folder, steps=4)

    pid = os.fork()
    if pid == 0:
        try:
            cut_short()
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGXFSZ
    assert (folder / "config.yaml").read_text(encoding="utf-8") == before
    go_on(folder, steps=4)
    assert load_config(folder).train.steps == 4
    assert list(folder.glob(".*.tmp")) == []


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_kill_at_any_step_of_the_write_leaves_the_old_or_the_new_configuration(tmp_path, name, moment):
    folder, number = tmp_path / "run", 1
    old = start(folder)
    new = config_text(config_of(folder, steps=4))
    while killed_at(name, number, moment, lambda: go_on(folder, steps=4)):
        assert (folder / "config.yaml").read_text(encoding="utf-8") in (old, new)
        number += 1
    assert number > 1  # it was killed at least once
    assert (folder / "config.yaml").read_text(encoding="utf-8") == new


def test_whatever_a_killed_process_left_half_written_is_removed(tmp_path):
    folder = tmp_path / "run"
    start(folder)
    (folder / "metrics.jsonl").touch()
    strays = [folder / ".config.yaml.7.tmp", folder / "trees" / ".step_000001.jsonl.7.tmp"]
    strays += [folder / "checkpoints" / ".latest.7.tmp", folder / "checkpoints" / ".step_000001.7.tmp" / "x"]
    for stray in strays:
        stray.parent.mkdir(parents=True, exist_ok=True)
        stray.write_text("half")
    go_on(folder)
    assert list(folder.rglob(".*.tmp")) == []


def test_a_full_disk_is_named_and_leaves_the_configuration_as_it_was(tmp_path):
    folder = tmp_path / "run"
    before = start(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(RunFolderError, match=r"config\.yaml: cannot be written \(File too large\)"):
            go_on(folder, steps=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (folder / "config.yaml").read_text(encoding="utf-8") == before
    assert list(folder.glob(".*.tmp")) == []


def test_a_disk_that_is_read_only_is_one_clear_error(tmp_path, monkeypatch):
    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(FileLock, "acquire", refused)
    with pytest.raises(RunFolderError, match="Read-only file system"):
        start(tmp_path / "run")
    monkeypatch.undo()
    start(tmp_path / "run")
    with RunFolder(tmp_path / "run").path.joinpath("metrics.jsonl").open("w") as stream:
        stream.write('{"step": 9}\n')
    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(RunFolderError, match="Read-only file system"):
        RunFolder(tmp_path / "run").rewind_metrics(1)


def test_a_configuration_that_was_cut_anywhere_is_refused_or_is_the_same(tmp_path):
    folder = tmp_path / "run"
    text = start(folder, lr=4e-4).encode()
    whole = load_config(folder)
    for cut in [*range(0, len(text), 53), *range(len(text) - 60, len(text))]:
        (folder / "config.yaml").write_bytes(text[:cut])
        try:
            assert load_config(folder) == whole
        except ConfigError as error:
            assert "config.yaml" in str(error)  # noqa: PT017  most cuts are refused, some lose nothing


def test_an_empty_configuration_is_refused_with_the_fix(tmp_path):
    folder = tmp_path / "run"
    start(folder)
    (folder / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match=rf"lacks .*train.*at2po train CONFIG run\.dir={folder} --resume"):
        load_config(folder)
    go_on(folder)  # with the configuration that the run was started with it goes on
    assert load_config(folder).train.steps == 2


def test_settings_that_may_change_on_resume_are_not_fixed(tmp_path):
    before = fixed_settings(config_of(tmp_path))
    assert fixed_settings(config_of(tmp_path / "moved", steps=9)) == before
    assert fixed_settings(config_of(tmp_path, lr=0.5)) != before
    assert not any(key.startswith(("train.steps", "run.dir", "served")) for key in before)


def test_metrics_are_cut_to_the_lines_of_the_checkpoint(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        folder.append_metrics({"kind": "train", "step": step})
    assert folder.metrics_lines() == 3
    folder.append_metrics({"kind": "eval", "step": 3})
    with (tmp_path / "metrics.jsonl").open("ab") as stream:
        stream.write(b'{"kind": "tra')  # killed while it wrote
    folder.rewind_metrics(3, 3)
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 3
    assert (tmp_path / "metrics.after_step_000003.jsonl").read_bytes().endswith(b'{"kind": "tra')


@pytest.mark.parametrize("line", [b'{"step": "\xff"}\n', b"[" * 100_000 + b"\n", b"[1]\n", b"7\n"])
def test_a_damaged_line_of_the_metrics_is_set_aside(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line)
    RunFolder(tmp_path).rewind_metrics(1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n'
    assert (tmp_path / "metrics.after_step_000001.jsonl").read_bytes() == line


def test_a_file_is_replaced_whole(tmp_path):
    replace_file(tmp_path / "a", "ä\n")
    replace_file(tmp_path / "a", b"b")
    assert (tmp_path / "a").read_bytes() == b"b"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_start_that_fails_leaves_no_folder_and_one_that_recorded_something_stays(tmp_path):
    with pytest.raises(ConfigError), open_run(config_of(tmp_path / "run")):
        raise ConfigError("the data is missing")
    assert not (tmp_path / "run").exists()
    with pytest.raises(KeyboardInterrupt), open_run(config_of(tmp_path / "stopped")):
        raise KeyboardInterrupt
    assert (tmp_path / "stopped" / "config.yaml").is_file()  # `--resume` starts it again
    begun = open_run(config_of(tmp_path / "begun"))
    folder, _ = begun.__enter__()
    folder.append_metrics({"kind": "eval", "step": 0})
    assert not begun.__exit__(ConfigError, ConfigError("later"), None)
    assert (tmp_path / "begun" / "metrics.jsonl").is_file()
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError), open_run(config_of(tmp_path / "mine")):
        raise ConfigError("the data is missing")
    assert (tmp_path / "mine").is_dir()  # it was there before
