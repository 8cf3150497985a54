"""A BM25 index as a folder: built once, continued after a kill, checked at every opening.

The folder lies beside the corpus (in the cache folder where that is read-only) unless another place is given.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from at2po_env.data.corpus import Corpus
from at2po_env.errors import RetrievalError
from at2po_env.retrieval.bm25.build import Postings, Settings, build
from at2po_env.retrieval.bm25.store import Array, FolderStore
from at2po_env.retrieval.manifest import FIX, HASHED_BYTES, Manifest, build_once, check, home_of, plan

FILES = {"terms.u64": np.uint64, "starts.i64": np.int64, "rows.u32": np.uint32, "weights.f32": np.float32}
IN_MEMORY_BYTES = HASHED_BYTES  # larger indexes are mapped
_TERMS = "lower-case runs of letters and digits"


def settings_digest(settings: Settings) -> str:
    """Return the hex digest of everything beside the corpus that changes results."""
    text = json.dumps([1, _TERMS, settings.k1, settings.b, sorted(settings.stop_words)])
    return hashlib.sha256(text.encode()).hexdigest()


def bm25_plan(corpus: Corpus, settings: Settings) -> Manifest:
    """Return the manifest that the index of `corpus` has."""
    values: dict[str, Any] = {"k1": settings.k1, "b": settings.b, "tokens": _TERMS}
    return plan("bm25", corpus, {**values, "stop_words": sorted(settings.stop_words)})


def build_index(corpus: Corpus, settings: Settings, home: Path | None = None) -> Path:
    """Build the index of `corpus` unless it is there; see `manifest.build_once`.

    Raises:
        RetrievalError: `home` holds something else, or cannot be written.
        DataError: a line of the corpus is not a passage.
    """
    wanted = bm25_plan(corpus, settings)

    def fill(work: Path) -> None:
        build(corpus, settings, FolderStore(work))

    return build_once(home or home_of(corpus, wanted), wanted, fill)


def open_index(folder: Path, corpus: Corpus, settings: Settings) -> Postings:
    """Open the index in `folder` if it is whole and made from this corpus with these settings.

    Raises:
        RetrievalError: it is not; names the file and the fix.
    """
    found = check(folder, bm25_plan(corpus, settings))
    whole = sum(file.bytes for file in found.files.values()) <= IN_MEMORY_BYTES
    try:
        terms, starts, rows, weights = (_open_file(folder / name, whole) for name in FILES)
    except (OSError, ValueError) as error:
        raise RetrievalError(f"{folder}: cannot read the index ({error}). {FIX}") from error
    if len(starts) < 1 or starts[0] != 0 or (np.diff(starts) < 1).any() or starts[-1] > len(rows):
        raise RetrievalError(f"{folder / 'starts.i64'} is damaged: it does not ascend. {FIX}")
    return Postings(terms[: len(starts) - 1], starts, rows, weights)


def _open_file(path: Path, whole: bool) -> Array:
    kind = FILES[path.name]
    return np.fromfile(path, kind) if whole else np.asarray(np.memmap(path, kind, mode="r"))
