"""Finds data on this machine: a given path, else the cache, else the sample that ships with the package.

The network is never used here; `at2po data get NAME` fills the cache.
"""

import hashlib
import os
import stat
import warnings
from pathlib import Path

import platformdirs

from at2po_env.data.catalog import CORPORA, WIKI_18, qa_set
from at2po_env.data.jsonl import require_regular
from at2po_env.errors import DataError

SAMPLE = Path(__file__).parent / "sample"
_NOT_REAL = "It shows that things run and measures nothing."


class At2poSampleWarning(UserWarning):
    """The small sample that ships with at2po stands in for a data set or a corpus."""


def cache_dir() -> Path:
    """Return the folder in which at2po keeps files on this machine: `AT2PO_CACHE`, else the user's cache."""
    given = os.environ.get("AT2PO_CACHE")
    return Path(given).expanduser() if given else Path(platformdirs.user_cache_dir("at2po", appauthor=False))


def resolve_dataset(name: str, split: str | None = None, dataset: str | Path | None = None) -> Path:
    """Return the question file to use.

    Args:
        name: A question set, by its FlashRAG name or the name in its environment id.
        split: "train", "dev" or "test"; `None` is "train" where there is one, else "test".
        dataset: A FlashRAG file (whatever `split` says), or a folder with `SPLIT.jsonl` or
            `NAME/SPLIT.jsonl`.

    Returns:
        `dataset` when given; else the file in the cache; else the sample (the same for all splits).

    Warns:
        At2poSampleWarning: the sample is used.

    Raises:
        DataError: unknown name or split, or no such file.
    """
    qa = qa_set(name)
    if dataset is not None and not Path(dataset).is_dir():
        return _existing(Path(dataset), "dataset")
    if split is None:
        split = "train" if "train" in qa.splits else "test"
    if split not in qa.splits:
        raise DataError(f"{qa.title} has no split {split!r}. Fix: use one of {', '.join(qa.splits)}.")
    if dataset is not None:
        folder = Path(dataset)
        for path in (folder / f"{split}.jsonl", folder / qa.name / f"{split}.jsonl"):
            if path.is_file():
                return path
        raise DataError(
            f"{folder} has neither {split}.jsonl nor {qa.name}/{split}.jsonl. Fix: give dataset= the file."
        )
    cached = cache_dir() / qa.file(split).target
    if cached.is_file():
        return cached
    _warn(
        f"{qa.title} {split}: using the 12 questions that ship with at2po, because no dataset= was given and "
        f"{cached} does not exist. {_NOT_REAL} Fix: `at2po data get {qa.name}`, or give dataset=PATH."
    )
    return SAMPLE / f"{qa.name}.jsonl"


def resolve_corpus(name: str, corpus: str | Path | None = None) -> Path:
    """Return the corpus file to search for the questions of `name` (all seven sets use wiki-18).

    Args:
        name: A question set or a corpus.
        corpus: JSON lines in wiki-18 form.

    Returns:
        `corpus` when given; else the file in the cache; else the sample.

    Warns:
        At2poSampleWarning: the sample is used.

    Raises:
        DataError: unknown name, or no such file.
    """
    if name not in CORPORA:
        qa_set(name)
        name = WIKI_18
    if corpus is not None:
        return _existing(Path(corpus), "corpus")
    cached = cache_dir() / CORPORA[name].target
    if cached.is_file():
        return cached
    _warn(
        f"{name}: using the few passages that ship with at2po, because no corpus= was given and "
        f"{cached} does not exist. {_NOT_REAL} Fix: `at2po data get {name}` (14 GB), or give corpus=PATH."
    )
    return SAMPLE / "corpus.jsonl"


def _existing(path: Path, keyword: str) -> Path:
    if not path.exists():
        raise DataError(f"{path}: there is no such file. Fix: give {keyword}= the path of a JSON lines file.")
    require_regular(path, kind=keyword)
    return path


def _warn(message: str) -> None:
    warnings.warn(At2poSampleWarning(message), stacklevel=3)


def beside_or_cached(path: Path, name: str) -> Path:
    """Return where the derived file or folder `name` of `path` lies, or is to be made.

    Beside `path` when it is there already or when that folder can be written to; otherwise in the cache
    folder. A folder without any write permission counts as read-only even for root, and nothing is written
    into the installed package.
    """
    beside = path.parent / name
    mode = path.parent.stat().st_mode
    writable = mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH) and os.access(path.parent, os.W_OK)
    shipped = SAMPLE.resolve() in path.resolve().parents
    if beside.exists() or (writable and not shipped):
        return beside
    key = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    return cache_dir() / "indexes" / key / name
