"""Where a BM25 build keeps what it has counted and the postings it makes: in memory, or in a folder."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Block = npt.NDArray[np.uint32]  # [3, n]: term, row, frequency; sorted by term, then row


class Part(NamedTuple):
    """Some passages, counted."""

    block: Block
    lengths: npt.NDArray[np.uint32]  # terms of each passage
    terms: list[str]  # those that no part before had; their ids go on from there


class Store(Protocol):
    """Where a build keeps its parts and its result."""

    def put(self, part: Part) -> None:
        """Keep a part."""

    def parts(self) -> Iterator[Part]:
        """Return the parts in the order in which they came, those of a build that was killed first."""

    def array(self, name: str, dtype: type[np.generic], length: int) -> Array:
        """Return a writable array of the result."""

    def finish(self) -> None:
        """Drop the parts: the result is whole."""


class MemoryStore:
    """Keeps everything in memory."""

    def __init__(self) -> None:
        self._parts: list[Part] = []

    def put(self, part: Part) -> None:
        """Keep a part."""
        self._parts.append(part)

    def parts(self) -> Iterator[Part]:
        """Return the parts in the order in which they came."""
        return iter(self._parts)

    def array(self, name: str, dtype: type[np.generic], length: int) -> Array:  # noqa: ARG002
        """Return a new array."""
        return np.zeros(length, dtype)

    def finish(self) -> None:
        """Drop the parts."""
        self._parts.clear()


class FolderStore:
    """Keeps parts and result as files of one folder; the system pages them out under memory pressure.

    A part is moved into place when it is whole, so that what a killed build left is what it had finished.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        while self._path(self._count).exists():
            self._count += 1

    def _path(self, number: int) -> Path:
        return self._folder / f"part-{number}.npz"

    def put(self, part: Part) -> None:
        """Write a part."""
        new = self._folder / "part.new"
        terms = np.frombuffer("\n".join(part.terms).encode("utf-8", "surrogatepass"), np.uint8)
        with new.open("wb") as file:
            np.savez(file, block=part.block, lengths=part.lengths, terms=terms)
            file.flush()
            os.fsync(file.fileno())
        new.rename(self._path(self._count))
        self._count += 1

    def parts(self) -> Iterator[Part]:
        """Read each part."""
        for number in range(self._count):
            with np.load(self._path(number)) as saved:
                text = saved["terms"].tobytes().decode("utf-8", "surrogatepass")
                yield Part(saved["block"], saved["lengths"], text.split("\n") if text else [])

    def array(self, name: str, dtype: type[np.generic], length: int) -> Array:
        """Return a new memory-mapped file (of at least one item: an empty file cannot be mapped)."""
        path, size = self._folder / name, max(length, 1) * np.dtype(dtype).itemsize
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, not a crash at the first write
                os.posix_fallocate(file.fileno(), 0, size)
            file.truncate(size)
        return np.memmap(path, dtype, mode="r+")[:length]

    def finish(self) -> None:
        """Drop the parts, the last one first: what a kill leaves can be gone on from."""
        (self._folder / "part.new").unlink(missing_ok=True)
        for number in reversed(range(self._count)):
            self._path(number).unlink()
        self._count = 0
