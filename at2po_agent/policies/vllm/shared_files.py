"""Removes the files that killed engines have left in shared memory.

The processes of an engine share memory by files in /dev/shm: new weights, and the messages of the workers of
a split model. A process that is killed removes nothing. So the learner notes in a file beside them which
files its engines map. It removes these when an engine has ended; and when an engine is started, those that
learners have noted which have died since. A file that any process still maps is left alone until then.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

SHARED = Path("/dev/shm")


def note_files(key: str, names: Iterable[str], folder: Path = SHARED) -> Path | None:
    """Note files of this process or of its engines.

    Args:
        key: Names the note among those of this process.
        names: Names of files in the folder.
        folder: Where they are.

    Returns:
        The note, for `remove_noted`; None where there is no such folder.
    """
    if not folder.is_dir():
        return None
    pid = os.getpid()
    note = folder / f"at2po-files-{os.getuid()}-{pid}-{_started(pid)}-{key}"
    with contextlib.suppress(OSError):  # a full folder: then these files may stay
        note.write_text(json.dumps(sorted(names)), encoding="utf-8")
    return note


def remove_noted(note: Path) -> bool:
    """Remove the files of a note that no process maps, and the note when none is left.

    Returns:
        Whether all of them are gone.
    """
    try:
        names = json.loads(note.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        names = []
    in_use = mapped_files([int(path.name) for path in Path("/proc").glob("[0-9]*")], note.parent)
    left = {name for name in names if isinstance(name, str) and os.path.basename(name) == name} & in_use
    for name in {str(name) for name in names} - left:
        if os.path.basename(name) == name:
            _unlink_own(note.parent / name)
    if not left:
        _unlink_own(note)
    return not left


def sweep(folder: Path = SHARED) -> None:
    """Remove the files that were noted by processes of this user which have died."""
    for note in folder.glob(f"at2po-files-{os.getuid()}-*"):
        with contextlib.suppress(OSError, ValueError):
            pid, started, _ = note.name.split("-", 3)[3].split("-", 2)
            if note.lstat().st_uid == os.getuid() and not note.is_symlink() and _started(int(pid)) != started:
                remove_noted(note)


def mapped_files(pids: Iterable[int], folder: Path = SHARED) -> set[str]:
    """Names of files in a folder that processes map; processes that cannot be looked into are passed over."""
    names, prefix = set(), f"{folder}/"
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
                path = line.split(maxsplit=5)[5:]
                if path and path[0].startswith(prefix) and not path[0].endswith(" (deleted)"):
                    names.add(path[0].removeprefix(prefix))
    return names


def descendants(pid: int) -> list[int]:
    """A process and all that it has made."""
    found = [pid]
    for parent in found:  # it grows meanwhile
        for path in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += [int(child) for child in path.read_text().split()]
    return found


def _started(pid: int) -> str:
    """When a process began, so that another one with its number is not taken for it; "" if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _unlink_own(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.lstat().st_uid == os.getuid():
            path.unlink()
