"""Retrievers by name, opened once per process and shared."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from at2po_env.errors import RetrievalError
from at2po_env.retrieval.base import Retriever
from at2po_env.retrieval.bm25 import Bm25Retriever

KEPT_OPEN = 8

_kinds: dict[str, Callable[..., Retriever]] = {"bm25": Bm25Retriever}
_open: OrderedDict[tuple[object, ...], Retriever] = OrderedDict()
_lock = threading.Lock()


def open_retriever(kind: str | Retriever, corpus: str | Path, **settings: Any) -> Retriever:
    """Return the retriever of a corpus; the same unchanged corpus and settings give the same object.

    The `KEPT_OPEN` most recently asked for stay open.

    Args:
        kind: "bm25", or a retriever, which is returned as it is.
        corpus: JSON lines in wiki-18 form.
        **settings: Keywords of the kind; for "bm25" `k1`, `b`, `stop_words`, `index`.

    Raises:
        RetrievalError: unknown kind or setting, or an index that is damaged or does not fit.
        DataError: the corpus is unreadable or has a bad line.
    """
    if not isinstance(kind, str):
        return kind
    if kind not in _kinds:
        raise RetrievalError(f"There is no retriever {kind!r}. Fix: use one of {', '.join(sorted(_kinds))}.")
    with _lock:
        key = (kind, *_stamp(Path(corpus)), *sorted(settings.items()))
        if key not in _open:
            try:
                _open[key] = _kinds[kind](corpus, **settings)
            except TypeError as error:
                raise RetrievalError(
                    f"The retriever {kind!r} does not take these settings: {error}."
                ) from error
        _open.move_to_end(key)
        while len(_open) > KEPT_OPEN:
            _open.popitem(last=False)
        return _open[key]


def _stamp(corpus: Path) -> tuple[object, ...]:
    """Return what identifies an unchanged file; a missing one is left for the retriever to complain about."""
    try:
        stat = corpus.stat()
    except OSError:
        return (str(corpus),)
    return str(corpus.resolve()), stat.st_size, stat.st_mtime_ns
