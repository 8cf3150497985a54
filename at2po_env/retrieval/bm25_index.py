"""A BM25 index as a folder: built once under a lock, moved into place whole, checked at every opening.

The folder lies beside the corpus (in the cache folder where that is read-only) and is named
`CORPUS.bm25-<first 16 digits of the corpus digest>-<first 8 digits of the settings digest>`.
"""

import hashlib
import json
import os
import shutil
from glob import escape
from pathlib import Path
from typing import Literal

import numpy as np
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError

from at2po_env.data.cache import beside_or_cached
from at2po_env.data.corpus import Corpus
from at2po_env.errors import RetrievalError
from at2po_env.retrieval.bm25_build import Array, FolderStore, Postings, Settings, build

FILES = {"terms.u64": np.uint64, "starts.i64": np.int64, "rows.u32": np.uint32, "weights.f32": np.float32}
IN_MEMORY_BYTES = 256 * 2**20  # larger indexes are mapped, and their content is not hashed at each opening
_TERMS = "lower-case runs of letters and digits"


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    bytes: int
    sha256: str


class Manifest(BaseModel):
    """What an index folder says about itself."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    kind: Literal["bm25"] = "bm25"
    corpus_digest: str
    passages: int
    k1: float
    b: float
    tokens: str = _TERMS
    stop_words: list[str]
    files: dict[str, _File]


def settings_digest(settings: Settings) -> str:
    """Return the hex digest of everything beside the corpus that changes results."""
    text = json.dumps([1, _TERMS, settings.k1, settings.b, sorted(settings.stop_words)])
    return hashlib.sha256(text.encode()).hexdigest()


def index_home(corpus: Corpus, settings: Settings) -> Path:
    """Return the folder of the index of `corpus`."""
    name = f"{corpus.path.name}.bm25-{corpus.digest[:16]}-{settings_digest(settings)[:8]}"
    return beside_or_cached(corpus.path, name)


def open_or_build(corpus: Corpus, settings: Settings) -> Postings:
    """Open the index of `corpus`, building it when there is none; other processes wait for the result.

    Raises:
        RetrievalError: the index there is damaged or of another corpus, or a new one cannot be written.
        DataError: a line of the corpus is not a passage.
    """
    home = index_home(corpus, settings)
    if not home.exists():
        try:
            _build(home, corpus, settings)
        except OSError as error:
            fix = "make room, or set AT2PO_CACHE to a folder with room and make the corpus folder read-only"
            raise RetrievalError(f"{home}: cannot write the index ({error}). Fix: {fix}.") from error
    return open_index(home, corpus, settings)


def _build(home: Path, corpus: Corpus, settings: Settings) -> None:
    home.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(home.parent / f".{home.name}.lock"):
        if home.exists():
            return
        for left_by_a_killed_build in home.parent.glob(f"{escape(home.name)}.*.tmp"):
            shutil.rmtree(left_by_a_killed_build)
        new = home.with_name(f"{home.name}.{os.getpid()}.tmp")
        new.mkdir()
        try:
            build(corpus, settings, FolderStore(new), total=len(corpus))
            _write_manifest(new, corpus, settings)
            new.rename(home)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def _write_manifest(folder: Path, corpus: Corpus, settings: Settings) -> None:
    manifest = Manifest(
        corpus_digest=corpus.digest,
        passages=len(corpus),
        k1=settings.k1,
        b=settings.b,
        stop_words=sorted(settings.stop_words),
        files={
            name: _File(bytes=(folder / name).stat().st_size, sha256=_sha256(folder / name)) for name in FILES
        },
    )
    (folder / "manifest.json").write_text(manifest.model_dump_json(indent=1), "utf-8")


def open_index(folder: Path, corpus: Corpus, settings: Settings) -> Postings:
    """Open the index in `folder` if it is whole and made from this corpus with these settings.

    Raises:
        RetrievalError: it is not; names the file and the fix.
    """
    manifest = _read_manifest(folder)
    if (manifest.corpus_digest, manifest.passages) != (corpus.digest, len(corpus)):
        made = f"{manifest.passages} passages, digest {manifest.corpus_digest[:16]}"
        raise RetrievalError(
            f"{folder} does not fit {corpus.path}: it was built from another corpus ({made}; this one has "
            f"{len(corpus)} passages, digest {corpus.digest[:16]}). Fix: give the corpus that it was "
            "built from, or delete the folder."
        )
    made_with = Settings(manifest.k1, manifest.b, frozenset(manifest.stop_words))
    if made_with != settings or manifest.tokens != _TERMS:
        raise RetrievalError(
            f"{folder} was built with other settings (k1 {manifest.k1}, b {manifest.b}). {_FIX}"
        )
    whole = sum(file.bytes for file in manifest.files.values()) <= IN_MEMORY_BYTES
    terms, starts, rows, weights = (_open_file(folder / name, manifest, whole) for name in FILES)
    if len(starts) < 1 or starts[0] != 0 or (np.diff(starts) < 1).any() or starts[-1] > len(rows):
        raise RetrievalError(f"{folder / 'starts.i64'} is damaged: it does not ascend. {_FIX}")
    return Postings(terms[: len(starts) - 1], starts, rows, weights)


_FIX = "Fix: delete that folder; the next opening builds it again from the corpus."


def _read_manifest(folder: Path) -> Manifest:
    path = folder / "manifest.json"
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise RetrievalError(
            f"{path}: cannot read the index's manifest ({error.strerror}). {_FIX}"
        ) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise RetrievalError(
            f"{path} is damaged ({first['loc'] or 'JSON'}: {first['msg']}). {_FIX}"
        ) from error


def _open_file(path: Path, manifest: Manifest, whole: bool) -> Array:
    try:
        expected, size = manifest.files[path.name], path.stat().st_size
        if size != expected.bytes:
            raise RetrievalError(f"{path} is damaged: {size} bytes, expected {expected.bytes}. {_FIX}")
        if whole and _sha256(path) != expected.sha256:
            raise RetrievalError(f"{path} is damaged: its content does not match its checksum. {_FIX}")
        kind = FILES[path.name]
        return np.fromfile(path, kind) if whole else np.asarray(np.memmap(path, kind, mode="r"))
    except (OSError, KeyError) as error:
        raise RetrievalError(f"{path}: cannot read this part of the index ({error!r}). {_FIX}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
