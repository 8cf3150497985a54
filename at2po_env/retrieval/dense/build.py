"""Turns passages into vectors and an index, in bounded memory, and continues after a kill.

First every passage is encoded and its vector appended to `vectors.f32`; the length of that file says how far
the build got. Then, for kinds other than flat, FAISS trains on a sample and takes the vectors in chunks; the
unfinished index is written every few minutes and knows how many vectors it has.
"""

import os
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from at2po_env.data.corpus import Corpus
from at2po_env.data.progress import ProgressBar
from at2po_env.errors import require
from at2po_env.retrieval.dense.encoders import Encoder
from at2po_env.retrieval.manifest import Manifest, build_once, check, home_of, plan

VECTORS = "vectors.f32"
INDEX = "index.faiss"
KINDS = ("flat", "ivf", "hnsw", "ivfpq")
_ENCODED_AT_ONCE = 1024
_ADDED_AT_ONCE = 1 << 14
_SAMPLE_BYTES = 400 * 2**20
_CHECKPOINT_S = 300.0
_ROUNDS = 10  # of k-means; more takes minutes per million passages and moves recall little


def dense_plan(corpus: Corpus, encoder: Encoder, kind: str) -> Manifest:
    """Return the manifest that a dense index of `corpus` has; `kind` is one of `KINDS`."""
    return plan(f"dense-{kind}", corpus, {"encoder": encoder.name, "dimension": encoder.dimension})


def build(corpus: Corpus, encoder: Encoder, kind: str, home: Path | None = None) -> Path:
    """Build a dense index unless it is there; see `manifest.build_once`.

    The vectors of a flat index beside the corpus, when there is one of the same encoder, are used again.
    """
    wanted, flat = dense_plan(corpus, encoder, kind), dense_plan(corpus, encoder, "flat")

    def fill(work: Path) -> None:
        known, vectors = home_of(corpus, flat), work / VECTORS
        if kind != "flat" and known.exists():
            check(known, flat)
            vectors = known / VECTORS
        else:
            _encode(vectors, corpus, encoder)
        if kind != "flat":
            _index(vectors, work / INDEX, encoder.dimension, kind)
            (work / VECTORS).unlink(missing_ok=True)

    return build_once(home or home_of(corpus, wanted), wanted, fill)


def _encode(path: Path, corpus: Corpus, encoder: Encoder) -> None:
    row_bytes = 4 * encoder.dimension
    done = path.stat().st_size // row_bytes if path.exists() else 0
    with path.open("ab") as file, ProgressBar("Encoding", len(corpus), unit="passages") as advance:
        advance(done)
        file.truncate(done * row_bytes)  # a killed build may have left part of a row
        for start in range(done, len(corpus), _ENCODED_AT_ONCE):
            rows = range(start, min(start + _ENCODED_AT_ONCE, len(corpus)))
            file.write(encoder.encode_passages([corpus[row].contents for row in rows]).tobytes())
            file.flush()
            os.fsync(file.fileno())
            advance(len(rows))


def _index(vectors: Path, path: Path, dimension: int, kind: str) -> None:
    """Put the vectors of a file into the FAISS index `path`."""
    faiss = require("faiss", "dense")
    row_bytes = 4 * dimension
    total = vectors.stat().st_size // row_bytes

    def write() -> None:
        new = path.with_name(f"{path.name}.new")
        faiss.write_index(index, str(new))
        new.replace(path)

    with vectors.open("rb") as file, ProgressBar("Indexing", total, unit="vectors") as advance:

        def read(row: int, count: int) -> npt.NDArray[np.float32]:  # without mapping the file into memory
            file.seek(row_bytes * row)
            return np.frombuffer(file.read(row_bytes * count), np.float32).reshape(-1, dimension)

        if path.exists():
            index = faiss.read_index(str(path))
        else:
            index = faiss.index_factory(dimension, recipe(kind, dimension, total), faiss.METRIC_INNER_PRODUCT)
            if kind == "hnsw":
                index.hnsw.efConstruction = 80
            if not index.is_trained:
                cells = faiss.downcast_index(index)
                cells.cp.niter = _ROUNDS
                size = min(_sample_size(dimension, total), max(39 * cells.nlist, 39 * 256), total)
                rows = np.sort(np.random.default_rng(0).choice(total, size, replace=False))
                sample = np.empty((size, dimension), np.float32)
                for at, row in enumerate(rows.tolist()):
                    sample[at] = read(row, 1)
                index.train(sample)
        advance(index.ntotal)
        saved = time.monotonic()
        while len(chunk := read(index.ntotal, _ADDED_AT_ONCE)):
            index.add(chunk)
            advance(len(chunk))
            if time.monotonic() - saved > _CHECKPOINT_S and index.ntotal < total:
                write()
                saved = time.monotonic()
    write()


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
