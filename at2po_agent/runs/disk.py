"""Writes files so that they are whole or as they were, whatever stops the process."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from at2po_env.errors import At2poError


class RunFolderError(At2poError):
    """A file of a run's folder cannot be written or read."""


@contextlib.contextmanager
def disk_refusals(path: Path) -> Iterator[None]:
    """Turn an error of the disk into one message that names the file and the fix.

    Raises:
        RunFolderError: In place of any OSError of the block.
    """
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"{path}: cannot be written ({error.strerror or error}); free some space or choose "
            "another run.dir, then go on with --resume from the newest checkpoint"
        ) from error


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file beside its place, sync it, and rename it: a kill leaves the old file or the new one.

    Raises:
        OSError: The disk refuses; the old file is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
