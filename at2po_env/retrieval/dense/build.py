"""Turns passages into vectors and an index, in bounded memory, and continues after a kill.

First every passage is encoded and its vector appended to `vectors.f32`; the length of that file says how far
the build got. Then, for kinds other than flat, FAISS trains on a sample and takes the vectors in chunks; the
unfinished index is written every few minutes and knows how many vectors it has.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from at2po_env.data.corpus import Corpus, Passage
from at2po_env.data.progress import progress_bar
from at2po_env.errors import require
from at2po_env.retrieval.dense.encoders import Encoder

VECTORS = "vectors.f32"
INDEX = "index.faiss"
KINDS = ("flat", "ivf", "hnsw", "ivfpq")
_ENCODED_AT_ONCE = 1024
_ADDED_AT_ONCE = 1 << 14
_SAMPLE_BYTES = 400 * 2**20
_CHECKPOINT_S = 300.0
_ROUNDS = 10  # of k-means; more takes minutes per million passages and moves recall little


def passage_text(passage: Passage) -> str:
    """Return what is encoded: the passage as it stands in a wiki-18 file, title line first."""
    return f'"{passage.title}"\n{passage.text}'


def build_dense(work: Path, corpus: Corpus, encoder: Encoder, kind: str, encoded: Path | None) -> None:
    """Build an index in the folder `work`, going on from what a killed build left there.

    Args:
        work: The folder of the unfinished index.
        corpus: The passages.
        encoder: Makes their vectors.
        kind: One of `KINDS`.
        encoded: A file of the vectors, when they have been made before.
    """
    if encoded is None:
        _encode(work / VECTORS, corpus, encoder)
    if kind != "flat":
        _index(encoded or work / VECTORS, work / INDEX, encoder.dimension, kind)
        (work / VECTORS).unlink(missing_ok=True)


def _encode(path: Path, corpus: Corpus, encoder: Encoder) -> None:
    row_bytes = 4 * encoder.dimension
    done = path.stat().st_size // row_bytes if path.exists() else 0
    with (
        path.open("ab") as file,
        progress_bar("Encoding", len(corpus), unit="passages") as advance,
    ):
        advance(done)
        file.truncate(done * row_bytes)  # a killed build may have left part of a row
        for start in range(done, len(corpus), _ENCODED_AT_ONCE):
            rows = range(start, min(start + _ENCODED_AT_ONCE, len(corpus)))
            file.write(encoder.encode_passages([passage_text(corpus[row]) for row in rows]).tobytes())
            file.flush()
            os.fsync(file.fileno())
            advance(len(rows))


def recipe(kind: str, dimension: int, passages: int) -> str:
    """Return FAISS' description of an index; the number of cells grows with the square root of the corpus.

    Vectors are kept in half precision, at which scores change by about 1e-3 of the score.
    """
    if kind == "hnsw":
        return "HNSW32_SQfp16"
    cells = 2 ** round(np.log2(2 * np.sqrt(max(passages, 1))))
    cells = max(1, min(cells, _sample_size(dimension, passages) // 39))  # 39: FAISS' least per cell
    if kind == "ivf":
        return f"IVF{cells},SQfp16"
    bits = 8 if passages >= 39 * 256 else 4
    # Product quantisation cuts a vector into equal pieces, here of about 8 numbers.
    pieces = next(count for count in range(max(dimension // 8, 1), 0, -1) if dimension % count == 0)
    return f"IVF{cells},PQ{pieces}x{bits}"


def _sample_size(dimension: int, passages: int) -> int:
    return min(passages, _SAMPLE_BYTES // (4 * dimension))


def _index(vectors: Path, path: Path, dimension: int, kind: str) -> None:
    faiss = require("faiss", "dense")
    total = vectors.stat().st_size // (4 * dimension)
    index = faiss.read_index(str(path)) if path.exists() else _new(faiss, vectors, dimension, kind)
    saved = time.monotonic()
    with progress_bar("Indexing", total, unit="vectors") as advance:
        advance(index.ntotal)
        for chunk in read_vectors(vectors, dimension, start=index.ntotal):
            index.add(chunk)
            advance(len(chunk))
            if time.monotonic() - saved > _CHECKPOINT_S and index.ntotal < total:
                _write(faiss, index, path)
                saved = time.monotonic()
    _write(faiss, index, path)


def _new(faiss: Any, vectors: Path, dimension: int, kind: str) -> Any:
    total = vectors.stat().st_size // (4 * dimension)
    index = faiss.index_factory(dimension, recipe(kind, dimension, total), faiss.METRIC_INNER_PRODUCT)
    if kind == "hnsw":
        index.hnsw.efConstruction = 80
    if not index.is_trained:
        cells = faiss.downcast_index(index)
        cells.cp.niter = _ROUNDS
        size = min(_sample_size(dimension, total), max(39 * cells.nlist, 39 * 256))
        rows = np.sort(np.random.default_rng(0).choice(total, min(size, total), replace=False))
        index.train(_read_rows(vectors, dimension, rows))
    return index


def read_vectors(path: Path, dimension: int, *, start: int = 0) -> Iterator[npt.NDArray[np.float32]]:
    """Yield the vectors from row `start` on, in chunks, without mapping the file into memory."""
    with path.open("rb") as file:
        file.seek(4 * dimension * start)
        while data := file.read(4 * dimension * _ADDED_AT_ONCE):
            yield np.frombuffer(data, np.float32).reshape(-1, dimension)


def _read_rows(path: Path, dimension: int, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    sample = np.empty((len(rows), dimension), np.float32)
    with path.open("rb") as file:
        for at, row in enumerate(rows.tolist()):
            file.seek(4 * dimension * row)
            sample[at] = np.frombuffer(file.read(4 * dimension), np.float32)
    return sample


def _write(faiss: Any, index: Any, path: Path) -> None:
    new = path.with_name(f"{path.name}.new")
    faiss.write_index(index, str(new))
    new.replace(path)
