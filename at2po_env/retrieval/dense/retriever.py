"""Searches by meaning: passages and queries become vectors, which are compared by inner product.

Kinds of index: "flat" is exact; "ivf" looks into some of many cells; "hnsw" walks a graph of neighbours;
"ivfpq" keeps a few bytes per passage. An index that is built here lies beside the corpus, is mapped and not
read into memory, and is checked at every opening. A FAISS file made elsewhere (the published `e5_Flat.index`)
opens by its path; row numbers of the corpus are its ids.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from at2po_env.data.corpus import Corpus, Passage
from at2po_env.errors import DataError, RetrievalError
from at2po_env.retrieval.base import check_search
from at2po_env.retrieval.dense.build import INDEX, KINDS, VECTORS, build_dense
from at2po_env.retrieval.dense.encoders import Encoder, SentenceEncoder
from at2po_env.retrieval.dense.search import FlatSearch, matrix_on_gpus, open_faiss
from at2po_env.retrieval.manifest import FIX, Manifest, build_once, check, home_of, plan


class DenseRetriever:
    """Vector search over a corpus; immutable and thread safe.

    Args:
        corpus: JSON lines in wiki-18 form.
        encoder: A name (see `encoders.encoder_spec`) or an `Encoder`.
        index_kind: "flat", "ivf", "hnsw" or "ivfpq".
        index: Folder of an index built before, or a FAISS file; default: beside the corpus, built when
            missing.
        gpu: Search on all GPUs, in shards of half precision; needs the extra "faiss-gpu".
        nprobe: Cells that "ivf" and "ivfpq" look into.
        ef_search: Candidates that "hnsw" keeps while it walks.
        threads: How many share a flat search.
        device: The device that the encoder runs on.
        max_tokens: Cut longer texts; default: what the encoder's family uses.
    """

    def __init__(
        self,
        corpus: str | Path,
        *,
        encoder: str | Encoder = "e5",
        index_kind: str = "flat",
        index: str | Path | None = None,
        gpu: bool = False,
        nprobe: int = 32,
        ef_search: int = 64,
        threads: int | None = None,
        device: str | None = None,
        max_tokens: int | None = None,
    ) -> None:
        if index_kind not in KINDS:
            raise RetrievalError(
                f"There is no dense index {index_kind!r}. Fix: use one of {', '.join(KINDS)}."
            )
        self._corpus = Corpus(corpus)
        self.encoder = (
            SentenceEncoder(encoder, device=device, max_tokens=max_tokens)
            if isinstance(encoder, str)
            else encoder
        )
        self._gpu, self._threads = gpu, threads
        self._tuning = {"nprobe": nprobe, "ef_search": ef_search}
        if index is not None and Path(index).is_file():
            self._search, identity = self._open_file(Path(index)), Path(index).name
        else:
            wanted = dense_plan(self._corpus, self.encoder, index_kind)
            home = Path(index) if index is not None else build(self._corpus, self.encoder, index_kind)
            self._search, identity = self._open_folder(home, wanted), wanted.digest
        how = f"{index_kind} {identity} {nprobe} {ef_search} {gpu}"
        text = f"dense {self._corpus.digest} {self.encoder.name} {how}"
        self._digest = hashlib.sha256(text.encode()).hexdigest()

    def __repr__(self) -> str:
        return f"DenseRetriever({str(self._corpus.path)!r}, encoder={self.encoder.name!r})"

    def __deepcopy__(self, memo: object) -> "DenseRetriever":
        return self

    def __len__(self) -> int:
        """Return the number of passages."""
        return len(self._corpus)

    @property
    def digest(self) -> str:
        """Digest of the corpus, the encoder, the index and how it is searched."""
        return self._digest

    def search(self, queries: Sequence[str], topk: int) -> list[list[Passage]]:
        """Return for each query the `topk` nearest passages; `score` is the inner product.

        Raises:
            RetrievalError: the index or the corpus was damaged while it was open.
        """
        check_search(queries, topk)
        if not queries:
            return []
        vectors = self.encoder.encode_queries(list(queries))
        try:
            scores, rows = self._search.search(vectors, min(topk, len(self)))
            return [
                [self._passage(row, score) for row, score in zip(*found, strict=True) if row >= 0]
                for found in zip(rows.tolist(), scores.tolist(), strict=True)
            ]
        except (DataError, IndexError, RuntimeError) as error:
            raise RetrievalError(
                f"{self!r}: the corpus or its index was damaged while in use ({error})."
            ) from error

    def _passage(self, row: int, score: float) -> Passage:
        return self._corpus[row]._replace(score=score)

    def _open_folder(self, home: Path, wanted: Manifest) -> Any:
        found = check(home, wanted)
        if VECTORS in found.files:
            shape = (wanted.passages, self.encoder.dimension)
            if found.files[VECTORS].bytes != 4 * shape[0] * shape[1]:
                raise RetrievalError(f"{home / VECTORS} is damaged: it is not {shape[0]} x {shape[1]}. {FIX}")
            matrix = np.memmap(home / VECTORS, np.float32, mode="r", shape=shape).view(np.ndarray)
            return matrix_on_gpus(matrix) if self._gpu else FlatSearch(matrix, threads=self._threads)
        return self._open_file(home / INDEX)

    def _open_file(self, path: Path) -> Any:
        index = open_faiss(path, gpu=self._gpu, threads=self._threads, **self._tuning)
        if (index.d, index.ntotal) != (self.encoder.dimension, len(self)):
            raise RetrievalError(
                f"{path} does not fit: it has {index.ntotal} vectors of length {index.d}; the corpus has "
                f"{len(self)} passages and the encoder gives length {self.encoder.dimension}. Fix: give the "
                "corpus and the encoder that it was built with."
            )
        return index


def dense_plan(corpus: Corpus, encoder: Encoder, kind: str) -> Manifest:
    """Return the manifest that a dense index of `corpus` has."""
    return plan(f"dense-{kind}", corpus, {"encoder": encoder.name, "dimension": encoder.dimension})


def build(corpus: Corpus, encoder: Encoder, kind: str, home: Path | None = None) -> Path:
    """Build a dense index unless it is there; see `manifest.build_once`.

    The vectors of a flat index beside the corpus, when there is one of the same encoder, are used again.
    """
    wanted, flat = dense_plan(corpus, encoder, kind), dense_plan(corpus, encoder, "flat")

    def fill(work: Path) -> None:
        known = home_of(corpus, flat)
        if kind == "flat" or not known.exists():
            build_dense(work, corpus, encoder, kind, None)
        else:
            check(known, flat)
            build_dense(work, corpus, encoder, kind, known / VECTORS)

    return build_once(home or home_of(corpus, wanted), wanted, fill)
