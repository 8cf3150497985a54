r"""Corpora in wiki-18 form: JSON lines `{"id", "contents": "\"Title\"\ntext"}`, any number of them.

Row number (from 0) is the passage's index in every search index. The positions of the rows are found in
one pass that also computes the content digest; for files of `KEEP_BYTES` and more both are kept on disk
beside the corpus (in the cache folder where that is read-only) and taken as valid while the corpus keeps
its size and modification time, so that a corpus of many gigabytes is read once and not at each opening.
"""

import hashlib
import json
import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, StrictInt, StrictStr

from at2po_env.data.cache import beside_or_cached
from at2po_env.data.jsonl import bad_line, open_lines, parse_line, read_lines
from at2po_env.data.progress import ProgressBar

Offsets = npt.NDArray[np.uint64]

KEEP_BYTES = 32 * 2**20
CACHED_ROWS = 1 << 14
_CHUNK = 8 * 2**20


class Passage(NamedTuple):
    """One passage of a corpus; `score` is the retriever's, 0.0 when the passage was not ranked."""

    id: str
    title: str
    text: str
    score: float = 0.0

    @property
    def contents(self) -> str:
        """Title and text as they stand in a wiki-18 file, and as encoders and clients get them."""
        return f'"{self.title}"\n{self.text}'


def split_contents(contents: str) -> tuple[str | None, str]:
    """Return the title, or None where there is no title line, and the text of a row's contents."""
    title, newline, text = contents.partition("\n")
    if not newline:
        return None, contents
    return title[1:-1] if len(title) >= 2 and title[0] == title[-1] == '"' else title, text


class CorpusRow(BaseModel):
    """One line of a corpus file."""

    model_config = ConfigDict(extra="ignore", title='{"id": "0", "contents": "\\"Title\\"\\ntext"}')

    id: StrictStr | StrictInt
    contents: StrictStr


class Corpus:
    """Random access to the passages of a corpus file, by row number; immutable and thread safe."""

    def __init__(self, path: str | Path) -> None:
        """Open `path`; rows are checked when they are read.

        Raises:
            DataError: the file is unreadable, empty or starts with a byte order mark.
        """
        self.path = Path(path)
        open_lines(self.path, kind="corpus")
        self.digest, self._offsets = _scan(self.path)
        self._fd = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._fd)
        self._row = lru_cache(CACHED_ROWS)(self._read)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> Passage:
        """Return the passage in `row`.

        Raises:
            IndexError: there is no such row.
            DataError: the line is not a corpus row.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"{self.path} has rows 0 to {len(self) - 1}, not {row}")
        return self._row(row)

    def __iter__(self) -> Iterator[Passage]:
        """Stream all passages in row order in bounded memory."""
        for number, line in read_lines(self.path, kind="corpus"):
            yield _passage(line, self.path, number)

    def line(self, row: int) -> bytes:
        """Return the line of `row`, for files whose rows hold more than a passage."""
        start, end = int(self._offsets[row]), int(self._offsets[row + 1])
        # A positioned read: safe in threads and after a fork of the process, and no crash when the file is
        # cut short.
        return os.pread(self._fd, end - start, start)

    def _read(self, row: int) -> Passage:
        return _passage(self.line(row), self.path, row + 1)


def _passage(line: bytes, path: Path, number: int) -> Passage:
    row = parse_line(CorpusRow, line, path, number)
    title, text = split_contents(row.contents)
    if title is None:
        fix = (
            'write the title in double quotes, a newline (\\n) and the text: "contents": "\\"Title\\"\\ntext"'
        )
        raise bad_line(path, number, "contents has no title line", fix)
    return Passage(str(row.id), title, text)


def _scan(path: Path) -> tuple[str, Offsets]:
    """Return the digest of `path` and the positions of its rows: row i spans offsets[i] to offsets[i + 1].

    Both are taken from what an earlier pass kept, where there is one. Else one process makes a pass while
    others wait, and writes a new folder that then takes its place.
    """
    stat = path.stat()
    if stat.st_size < KEEP_BYTES:
        found: list[bytes] = []
        digest = _find_rows(path, found.append)
        return digest, np.frombuffer(b"".join(found), np.uint64)
    stamp = {"format": 1, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    home = beside_or_cached(path, f"{path.name}.rows")

    def kept() -> tuple[str, Offsets] | None:
        try:
            meta = json.loads((home / "rows.json").read_text("utf-8"))
            offsets = np.memmap(home / "rows.u64", np.uint64, mode="r")
        except (OSError, ValueError):
            return None
        fits = (
            isinstance(meta, dict) and meta.get("stamp") == stamp and len(offsets) == meta.get("rows", -1) + 1
        )
        return (meta["digest"], offsets) if fits else None

    if scan := kept():
        return scan
    home.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{home}.lock"):
        if scan := kept():
            return scan
        new = home.with_name(f"{home.name}.{os.getpid()}.tmp")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        with (new / "rows.u64").open("wb") as file:
            digest = _find_rows(path, file.write)
        rows = (new / "rows.u64").stat().st_size // 8 - 1
        meta = {"stamp": stamp, "digest": digest, "rows": rows}
        (new / "rows.json").write_text(json.dumps(meta), "utf-8")
        shutil.rmtree(home, ignore_errors=True)
        new.rename(home)
    return digest, np.memmap(home / "rows.u64", np.uint64, mode="r")


def _find_rows(path: Path, write: Callable[[bytes], object]) -> str:
    """Write the positions of the rows' starts and the last row's end; return the SHA-256 of the file."""
    sha = hashlib.sha256()
    position = end = 0
    write(np.zeros(1, np.uint64).tobytes())
    with path.open("rb") as file, ProgressBar(f"Reading {path.name}", path.stat().st_size) as advance:
        while chunk := file.read(_CHUNK):
            sha.update(chunk)
            ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + (position + 1)
            write(ends.astype(np.uint64).tobytes())
            position += len(chunk)
            end = int(ends[-1]) if len(ends) else end
            advance(len(chunk))
    if end != position:  # the last line has no line end
        write(np.array([position], np.uint64).tobytes())
    return sha.hexdigest()
