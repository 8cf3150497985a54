"""One file out of a gzip, also where the gzip holds a tar archive (as that of the wiki-18 corpus does)."""

import gzip
import os
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from at2po_env.data.progress import Advance, progress_bar
from at2po_env.errors import DataError

_CHUNK = 2**20


def unpack(archive: Path, target: Path) -> None:
    """Write the file in `archive` to `target`, in bounded memory; `target` appears when it is whole.

    Raises:
        DataError: the archive is damaged, holds no file, or there is no room.
    """
    new = target.with_name(f"{target.name}.tmp")
    try:
        with _member(archive) as source, new.open("wb") as out:
            while chunk := source.read(_CHUNK):
                out.write(chunk)
    except (gzip.BadGzipFile, EOFError, zlib.error, tarfile.TarError) as error:
        new.unlink(missing_ok=True)
        raise DataError(f"{archive} is damaged ({error}). Fix: delete it and get it again.") from error
    except OSError as error:
        new.unlink(missing_ok=True)
        fix = "make room, or set AT2PO_CACHE to a folder with room"
        raise DataError(f"{target}: cannot unpack {archive.name} ({error.strerror}). Fix: {fix}.") from error
    os.replace(new, target)


class _Counted:
    """A file that reports how many bytes were read from it."""

    def __init__(self, file: IO[bytes], advance: Advance) -> None:
        self._file, self._advance = file, advance

    def read(self, size: int = -1) -> bytes:
        chunk = self._file.read(size)
        self._advance(len(chunk))
        return chunk


@contextmanager
def _member(archive: Path) -> Iterator[IO[bytes]]:
    with gzip.open(archive) as file:
        is_tar = file.read(512)[257:262] == b"ustar"
    with (
        archive.open("rb") as raw,
        progress_bar(f"Unpacking {archive.name}", archive.stat().st_size) as advance,
    ):
        counted = _Counted(raw, advance)
        if not is_tar:
            with gzip.GzipFile(fileobj=cast(IO[bytes], counted)) as whole:
                yield cast(IO[bytes], whole)
            return
        with tarfile.open(fileobj=cast(IO[bytes], counted), mode="r|gz") as tar:
            for member in tar:
                if content := tar.extractfile(member):
                    yield content
                    return
            raise tarfile.TarError("it holds no file")
