"""FAISS indexes from files: mapped where possible, on GPUs where wanted."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from at2po_env.errors import MissingExtraError, RetrievalError, require
from at2po_env.retrieval.dense.flat import FlatSearch
from at2po_env.retrieval.manifest import FIX


def open_faiss(path: Path, *, gpu: bool, nprobe: int, ef_search: int, threads: int | None) -> Any:
    """Open a FAISS file; what returns has `search(queries, topk)`, `d` and `ntotal`.

    Raises:
        RetrievalError: it is damaged, or no index.
    """
    faiss = require("faiss", "dense")
    try:
        index = _read(faiss, path)
    except RuntimeError as error:
        raise RetrievalError(f"{path} is damaged or no FAISS index ({str(error)[-120:]}). {FIX}") from error
    if gpu:
        return on_gpus(index)
    if isinstance(index, faiss.IndexFlat) and index.metric_type == faiss.METRIC_INNER_PRODUCT:
        matrix = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(index.ntotal, index.d)
        return FlatSearch(matrix, threads=threads, owner=index)
    inner = faiss.downcast_index(index)
    if hasattr(inner, "nprobe"):
        inner.nprobe = nprobe
    if hasattr(inner, "hnsw"):
        inner.hnsw.efSearch = ef_search
    return index


def _read(faiss: Any, path: Path) -> Any:
    """Map the file; cells of an inverted file are mapped by another way than everything else."""
    for flags in ("IO_FLAG_MMAP_IFC", "IO_FLAG_MMAP"):
        flag = getattr(faiss, flags, None)  # the first is missing before FAISS 1.11
        if flag is None:
            continue
        try:
            index = faiss.read_index(str(path), flag)
        except RuntimeError:
            continue
        if hasattr(faiss.downcast_index(index), "invlists") == (flags == "IO_FLAG_MMAP"):
            return index
    return faiss.read_index(str(path))


def matrix_on_gpus(matrix: npt.NDArray[np.float32]) -> Any:
    """Put vectors on all GPUs."""
    index = require("faiss", "dense").IndexFlatIP(matrix.shape[1])
    index.add(np.ascontiguousarray(matrix))
    return on_gpus(index)


def on_gpus(index: Any) -> Any:
    """Spread an index over all GPUs, in shards of half precision.

    Raises:
        MissingExtraError: this FAISS knows no GPUs.
        RetrievalError: there are none.
    """
    faiss = require("faiss", "faiss-gpu")
    if not hasattr(faiss, "GpuMultipleClonerOptions"):
        raise MissingExtraError(
            "this FAISS was built without GPUs. Fix: pip uninstall faiss-cpu; pip install 'at2po[faiss-gpu]'"
        )
    if not faiss.get_num_gpus():
        raise RetrievalError("gpu=True, and FAISS sees no GPU. Fix: leave gpu out, or make one visible.")
    options = faiss.GpuMultipleClonerOptions()
    options.shard, options.useFloat16 = True, True
    return faiss.index_cpu_to_all_gpus(index, options)
