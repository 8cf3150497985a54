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
from at2po_env.retrieval.base import CorpusRetriever, check_search
from at2po_env.retrieval.dense.build import INDEX, KINDS, VECTORS, build, dense_plan
from at2po_env.retrieval.dense.encoders import Encoder, SentenceEncoder
from at2po_env.retrieval.dense.search import FlatSearch, matrix_on_gpus, open_faiss
from at2po_env.retrieval.manifest import FIX, check


class DenseRetriever(CorpusRetriever):
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

    _corpus: Corpus

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
        dimension, size = self.encoder.dimension, len(self)
        vectors: Path | None = None
        if index is not None and Path(index).is_file():
            file, identity = Path(index), Path(index).name
        else:
            wanted = dense_plan(self._corpus, self.encoder, index_kind)
            home = build(self._corpus, self.encoder, index_kind) if index is None else Path(index)
            files = check(home, wanted).files
            file, identity = home / INDEX, wanted.digest
            if VECTORS in files:
                vectors = home / VECTORS
                if files[VECTORS].bytes != 4 * size * dimension:
                    raise RetrievalError(f"{vectors} is damaged: it is not {size} x {dimension}. {FIX}")
        if vectors is not None:
            matrix = np.memmap(vectors, np.float32, mode="r", shape=(size, dimension)).view(np.ndarray)
            self._search: Any = matrix_on_gpus(matrix) if gpu else FlatSearch(matrix, threads=threads)
        else:
            self._search = open_faiss(file, gpu=gpu, threads=threads, nprobe=nprobe, ef_search=ef_search)
            if (self._search.d, self._search.ntotal) != (dimension, size):
                raise RetrievalError(
                    f"{file} does not fit: it has {self._search.ntotal} vectors of length {self._search.d}; "
                    f"the corpus has {size} passages and the encoder gives length {dimension}. Fix: give the "
                    "corpus and the encoder that it was built with."
                )
        how = f"{index_kind} {identity} {nprobe} {ef_search} {gpu}"
        text = f"dense {self._corpus.digest} {self.encoder.name} {how}"
        self.digest = hashlib.sha256(text.encode()).hexdigest()

    def __repr__(self) -> str:
        return f"DenseRetriever({str(self._corpus.path)!r}, encoder={self.encoder.name!r})"

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
                [
                    self._corpus[row]._replace(score=score)
                    for row, score in zip(*found, strict=True)
                    if row >= 0
                ]
                for found in zip(rows.tolist(), scores.tolist(), strict=True)
            ]
        except (DataError, IndexError, RuntimeError) as error:
            raise RetrievalError(
                f"{self!r}: the corpus or its index was damaged while in use ({error})."
            ) from error
