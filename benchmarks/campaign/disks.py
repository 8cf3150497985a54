"""Takes the disk of a training run away, and looks at how the run ends and what a resume makes of it.

A run on a bad disk ends at its end, or with one of our errors and without a traceback. When the disk is well
again, a resume makes what a run in one piece has made, bit for bit.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import random
import resource
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.campaign.runner import Try
from benchmarks.campaign.runs import (
    DONE,
    REFUSED,
    Watch,
    finish,
    in_child,
    prepare,
    train,
    wait_for,
    wounds,
)


@contextlib.contextmanager
def broken_disks(folder: Path) -> Iterator[Try]:
    """Runs whose disk fills up, becomes read-only or fails, and which go on when it is well again.

    By turns: a tmpfs that is too small or read-only, where mounting is allowed (else a limit on the size of
    files takes its place); a limit on the size of files; errors put in place of an operation on a file.
    """
    reference, events = prepare(folder)
    files, mounted, said = list(events), own_mounts(), folder / "said"
    (folder / "how.txt").write_text("tmpfs" if mounted else "limits on the size of files, no tmpfs")
    disk = folder / "disk"
    disk.mkdir(exist_ok=True)

    def attempt(rng: random.Random, number: int) -> str:
        way, run = number % 3, (disk if number % 3 == 0 and mounted else folder) / "run"
        shutil.rmtree(run, ignore_errors=True)
        if way == 0 and mounted:
            size = rng.choice((0, 4, 16, rng.randrange(64), rng.randrange(600)))
            story = f"a tmpfs of {size} kB"
            mount(disk, f"size={size + 4}k")
            try:
                status = wait_for(in_child(lambda: train(run), said))
                what = _told(status, said)
                if not what and rng.random() < 0.5:
                    mount(disk, "size=64m", flags=_REMOUNT | _READ_ONLY)
                    story += ", then read-only"
                    status = wait_for(in_child(lambda: train(run), said))
                    what = "it ran on a read-only disk" if status == DONE else _told(status, said)
                mount(disk, "size=64m", flags=_REMOUNT)
                what = what or wounds(run) or finish(run, reference, said)
            finally:
                _libc.umount2(os.fsencode(disk), 2)
            return f"{story}: {what}" if what else ""
        if way < 2:
            limit = rng.choice((0, rng.randrange(3_000), rng.randrange(40_000)))
            story, status = (
                f"files of {limit} bytes",
                wait_for(in_child(lambda: _train_limited(run, limit), said)),
            )
        else:
            file = rng.choice(files)
            code = rng.choice((errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT))
            position, stays = rng.randrange(len(events[file])), rng.random() < 0.5
            story = f"{errno.errorcode[code]} at event {position} of {file}{' and after' if stays else ''}"
            status = wait_for(in_child(lambda: _train_failing(run, file, position, code, stays=stays), said))
        what = _told(status, said) or wounds(run) or finish(run, reference, said)
        return f"{story}: {what}" if what else ""

    yield attempt


def _told(status: int, said: Path) -> str:
    """What is wrong with how a run ended on a bad disk: it ends well, or with one of our errors."""
    if status in (DONE, REFUSED):
        return ""
    return f"it ended with {status}: {said.read_text()[-600:] if said.exists() else ''}"


def _train_limited(run: Path, limit: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    train(run)


def _train_failing(run: Path, file: str, position: int, code: int, *, stays: bool) -> None:
    """Train with an error of the disk in place of an operation, and of all after it if it stays."""
    seen = 0

    def strike(event_file: str, name: str, moment: str, path: str) -> None:
        nonlocal seen
        seen += event_file == file
        frees = name in ("unlink", "remove", "rmdir") and code != errno.EROFS
        if (
            moment == "before"
            and not frees
            and (seen > position if stays else event_file == file and seen in (position, position + 1))
        ):
            raise OSError(code, os.strerror(code), path)

    Watch(run, strike)
    train(run)


_libc = ctypes.CDLL(None, use_errno=True)
_NEW_MOUNTS, _NEW_USERS = 0x20000, 0x10000000
_READ_ONLY, _REMOUNT, _PRIVATE = 1, 32, 0x4000 | 0x40000


def own_mounts() -> bool:
    """Give this process mounts of its own, if the system allows it; they go with the process."""
    if sys.platform != "linux":
        return False
    user, group = os.getuid(), os.getgid()
    if _libc.unshare(_NEW_MOUNTS if user == 0 else _NEW_MOUNTS | _NEW_USERS) != 0:
        return False
    try:
        if user != 0:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
            Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        _call_mount(b"none", b"/", None, _PRIVATE, None)
    except OSError:
        return False
    return True


def mount(path: Path, options: str, *, flags: int = 0) -> None:
    """Mount a tmpfs, or change one."""
    _call_mount(b"tmpfs", os.fsencode(path), b"tmpfs", flags, options.encode())


def _call_mount(source: bytes, target: bytes, kind: bytes | None, flags: int, options: bytes | None) -> None:
    if _libc.mount(source, target, kind, ctypes.c_ulong(flags), options) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fsdecode(target))
