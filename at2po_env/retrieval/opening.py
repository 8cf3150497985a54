"""Opens retrievers by name, once per process, so that all environments share them."""

import threading
from collections import OrderedDict
from importlib import import_module
from pathlib import Path
from typing import Any

from at2po_env.errors import RetrievalError
from at2po_env.retrieval.base import Retriever

KEPT_OPEN = 8

_KINDS = {  # imported when asked for, because they need extras or cost time
    "bm25": "at2po_env.retrieval.bm25.retriever:Bm25Retriever",
    "http": "at2po_env.retrieval.client:HttpRetriever",
    "hybrid": "at2po_env.retrieval.hybrid:HybridRetriever",
    "lucene": "at2po_env.retrieval.lucene.retriever:LuceneRetriever",
    "dense": "at2po_env.retrieval.dense.retriever:DenseRetriever",
}
_open: OrderedDict[tuple[object, ...], Retriever] = OrderedDict()
_lock = threading.RLock()  # a hybrid opens others while it is opened


def open_retriever(
    kind: str | Retriever,
    corpus: str | Path | None = None,
    *,
    cache: str | Path | None = None,
    **options: Any,
) -> Retriever:
    """Return the retriever of a corpus; the same unchanged corpus and options give the same object.

    The `KEPT_OPEN` most recently asked for stay open.

    Args:
        kind: "bm25", "lucene", "dense", "hybrid", "http"; the address of a server, "http://HOST:PORT"; or a
            retriever, which is returned as it is.
        corpus: JSON lines in wiki-18 form; only "http" goes without.
        cache: SQLite file that keeps results and is shared by processes; see `cache.CachedRetriever`.
        **options: Keywords of the kind; for "bm25" `k1`, `b`, `stop_words`, `index`.

    Raises:
        RetrievalError: unknown kind or option, no corpus, or an index that is damaged or does not fit.
        DataError: the corpus is unreadable or has a bad line.
        MissingExtraError: the kind needs an extra that is not installed.
    """
    if not isinstance(kind, str):
        return kind
    if kind.startswith(("http://", "https://")):
        kind, options = "http", {"url": kind, **options}
    if kind not in _KINDS:
        raise RetrievalError(f"There is no retriever {kind!r}. Fix: use one of {', '.join(sorted(_KINDS))}.")
    if corpus is None and kind != "http":
        raise RetrievalError(f"The retriever {kind!r} needs a corpus. Fix: give corpus=PATH.")
    module, _, name = _KINDS[kind].partition(":")
    make = getattr(import_module(module), name)

    path = Path(corpus or "")
    try:
        stat = path.stat()
        stamp: tuple[object, ...] = (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    except OSError:  # left for the retriever to complain about
        stamp = (str(path),)
    with _lock:
        key = (kind, *stamp, str(cache), *(f"{k}={v!r}" for k, v in sorted(options.items())))
        if key not in _open:
            try:
                opened: Retriever = make(corpus, **options)
            except TypeError as error:
                raise RetrievalError(
                    f"The retriever {kind!r} does not take these settings: {error}."
                ) from error
            if cache is not None:
                from at2po_env.retrieval.cache import CachedRetriever

                opened = CachedRetriever(opened, cache)
            _open[key] = opened
        _open.move_to_end(key)
        while len(_open) > KEPT_OPEN:
            _open.popitem(last=False)
        return _open[key]
