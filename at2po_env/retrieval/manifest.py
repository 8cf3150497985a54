"""Describes an index folder, builds it once, and checks it.

A build works in `FOLDER.partial` and moves it to `FOLDER` when it is whole, so that a folder with its final
name is complete. `plan.json` in the partial folder says what is being built; a build that is started again
with the same plan goes on where the last one was killed, one with another plan starts over.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError

from at2po_env.data.cache import beside_or_cached
from at2po_env.data.corpus import Corpus
from at2po_env.errors import DataError, RetrievalError

HASHED_BYTES = 256 * 2**20  # larger files are not hashed at each opening; their size is checked
FIX = "Fix: delete that folder; building the index again makes a new one (at2po index)."


class IndexFile(BaseModel):
    """One file of an index."""

    model_config = ConfigDict(extra="forbid")

    bytes: int
    sha256: str | None = None  # None: made before large files had one


class Manifest(BaseModel):
    """Says of what kind an index is, from which corpus and settings it was built, and which files it has."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    kind: str
    corpus_digest: str
    passages: int
    settings: dict[str, Any]
    files: dict[str, IndexFile] = {}

    @property
    def digest(self) -> str:
        """Hex digest of kind, corpus and settings."""
        text = json.dumps([self.kind, self.corpus_digest, self.settings], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def plan(kind: str, corpus: Corpus, settings: dict[str, Any]) -> Manifest:
    """Return the manifest, without files, of an index that is to be built."""
    return Manifest(kind=kind, corpus_digest=corpus.digest, passages=len(corpus), settings=settings)


def home_of(corpus: Corpus, wanted: Manifest) -> Path:
    """Return where the index lies when no place was given: beside the corpus, or in the cache."""
    name = f"{corpus.path.name}.{wanted.kind}-{corpus.digest[:16]}-{wanted.digest[:8]}"
    return beside_or_cached(corpus.path, name)


def build_once(home: Path, wanted: Manifest, build: Callable[[Path], object]) -> Path:
    """Build an index unless it is there; other processes wait for the result.

    Args:
        home: The finished folder.
        wanted: What to build.
        build: Fills the folder that it is given; finds in it what a killed build with the same plan left.

    Raises:
        RetrievalError: `home` holds something else, or cannot be written.
        DataError: a line of the corpus is not a passage.
    """
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(home.parent / f".{home.name}.lock"):
            if home.exists():
                check(home, wanted, contents=False)
                return home
            work = home.with_name(f"{home.name}.partial")
            left = work / "plan.json"
            if not left.exists() or left.read_text("utf-8") != wanted.model_dump_json():
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir()
                left.write_text(wanted.model_dump_json(), "utf-8")
            try:
                build(work)
            except DataError:  # nothing to go on from: the mended corpus has another digest
                shutil.rmtree(work, ignore_errors=True)
                raise
            left.unlink()
            files = {}
            for path in sorted(work.rglob("*")):
                if path.is_file() and path.name != "manifest.json" and not path.name.endswith(".lock"):
                    name = path.relative_to(work).as_posix()
                    files[name] = IndexFile(bytes=path.stat().st_size, sha256=_sha256(path))
            with (work / "manifest.json").open("w", encoding="utf-8") as file:
                file.write(wanted.model_copy(update={"files": files}).model_dump_json(indent=1))
                file.flush()
                os.fsync(file.fileno())
            work.rename(home)
    except OSError as error:
        raise RetrievalError(
            f"{home}: cannot write the index ({error}). Fix: make room there; the next try goes on where "
            "this one stopped."
        ) from error
    return home


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(home: Path, wanted: Manifest, *, contents: bool = True) -> Manifest:
    """Check that `home` is whole and is what is wanted.

    Args:
        home: The index folder.
        wanted: Kind, corpus and settings that it must have been built with.
        contents: Also hash the files (those up to `HASHED_BYTES`).

    Raises:
        RetrievalError: it is damaged, or something else.
    """
    found = _read(home)
    if found.kind != wanted.kind:
        raise RetrievalError(f"{home} is an index of kind {found.kind!r}, wanted {wanted.kind!r}. {FIX}")
    if (found.corpus_digest, found.passages) != (wanted.corpus_digest, wanted.passages):
        raise RetrievalError(
            f"{home} was built from another corpus ({found.passages} passages, digest "
            f"{found.corpus_digest[:16]}; this one has {wanted.passages}, digest "
            f"{wanted.corpus_digest[:16]}). {FIX}"
        )
    wrong = [
        f"{name} {found.settings.get(name)!r} (wanted {value!r})"
        for name, value in wanted.settings.items()
        if found.settings.get(name) != value
    ]
    if wrong:
        raise RetrievalError(f"{home} was built with other settings: {', '.join(wrong)}. {FIX}")
    for name, file in found.files.items():
        _check_file(home / name, file, hashed_bytes=HASHED_BYTES if contents else -1)
    return found


def _read(home: Path) -> Manifest:
    path = home / "manifest.json"
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise RetrievalError(f"{path}: cannot read the index's manifest ({error.strerror}). {FIX}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise RetrievalError(f"{path} is damaged ({first['loc']}: {first['msg']}). {FIX}") from error


def verify(home: Path) -> Manifest:
    """Read an index whole and compare all of it with its manifest.

    Raises:
        RetrievalError: a file is damaged or missing, or its checksum was never taken.
    """
    found = _read(home)
    for name, file in found.files.items():
        if file.sha256 is None:
            raise RetrievalError(f"{home / name} has no checksum: an earlier version made it. {FIX}")
        _check_file(home / name, file, hashed_bytes=file.bytes)
    return found


def _check_file(path: Path, expected: IndexFile, *, hashed_bytes: int) -> None:
    try:
        size = path.stat().st_size
        if size != expected.bytes:
            raise RetrievalError(f"{path} is damaged: {size} bytes, expected {expected.bytes}. {FIX}")
        if size <= hashed_bytes and expected.sha256 and _sha256(path) != expected.sha256:
            raise RetrievalError(f"{path} is damaged: its content does not match its checksum. {FIX}")
    except OSError as error:
        raise RetrievalError(
            f"{path}: cannot read this part of the index ({error.strerror}). {FIX}"
        ) from error
