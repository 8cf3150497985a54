"""Retrievers by name, opened once per process and shared."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from at2po_env.errors import RetrievalError
from at2po_env.retrieval.base import Retriever
from at2po_env.retrieval.bm25.retriever import Bm25Retriever

KEPT_OPEN = 8

_kinds: dict[str, Callable[..., Retriever]] = {"bm25": Bm25Retriever}
_lazy = {  # imported when asked for, because they need extras or cost time
    "http": "at2po_env.retrieval.client.retriever:HttpRetriever",
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
    **settings: Any,
) -> Retriever:
    """Return the retriever of a corpus; the same unchanged corpus and settings give the same object.

    The `KEPT_OPEN` most recently asked for stay open.

    Args:
        kind: "bm25", "lucene", "dense", "hybrid", "http"; the address of a server, "http://HOST:PORT"; or a
            retriever, which is returned as it is.
        corpus: JSON lines in wiki-18 form; only "http" goes without.
        cache: SQLite file that keeps results and is shared by processes; see `cache.CachedRetriever`.
        **settings: Keywords of the kind; for "bm25" `k1`, `b`, `stop_words`, `index`.

    Raises:
        RetrievalError: unknown kind or setting, or an index that is damaged or does not fit.
        DataError: the corpus is unreadable or has a bad line.
    """
    if not isinstance(kind, str):
        return kind
    if kind.startswith(("http://", "https://")):
        kind, settings = "http", {"url": kind, **settings}
    make = _maker(kind, corpus)
    with _lock:
        key = (kind, *_stamp(corpus), str(cache), *(f"{k}={v!r}" for k, v in sorted(settings.items())))
        if key not in _open:
            try:
                opened = make(corpus, **settings)
                _open[key] = opened if cache is None else _cached(opened, cache)
            except TypeError as error:
                raise RetrievalError(
                    f"The retriever {kind!r} does not take these settings: {error}."
                ) from error
        _open.move_to_end(key)
        while len(_open) > KEPT_OPEN:
            _open.popitem(last=False)
        return _open[key]


def _maker(kind: str, corpus: str | Path | None) -> Callable[..., Retriever]:
    """Return what opens a kind.

    Raises:
        RetrievalError: there is no such kind, or it needs a corpus.
        MissingExtraError: the kind needs an extra that is not installed.
    """
    if kind not in _kinds and kind not in _lazy:
        known = ", ".join(sorted({*_kinds, *_lazy}))
        raise RetrievalError(f"There is no retriever {kind!r}. Fix: use one of {known}.")
    if corpus is None and kind != "http":
        raise RetrievalError(f"The retriever {kind!r} needs a corpus. Fix: give corpus=PATH.")
    if kind not in _kinds:
        module, _, name = _lazy[kind].partition(":")
        _kinds[kind] = getattr(import_module(module), name)
    return _kinds[kind]


def _cached(retriever: Retriever, path: str | Path) -> Retriever:
    # Imported here because most runs keep no cache.
    from at2po_env.retrieval.cache import CachedRetriever

    return CachedRetriever(retriever, path)


def _stamp(corpus: str | Path | None) -> tuple[object, ...]:
    """Return what identifies an unchanged file; a missing one is left for the retriever to complain about."""
    corpus = Path(corpus or "")
    try:
        stat = corpus.stat()
    except OSError:
        return (str(corpus),)
    return str(corpus.resolve()), stat.st_size, stat.st_mtime_ns
