"""Where data lies on this machine: paths given, the cache, or the sample that ships with the package."""

import hashlib
import os
import stat
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """Return the folder of what at2po keeps on this machine: `AT2PO_CACHE`, else the user's cache."""
    given = os.environ.get("AT2PO_CACHE")
    return Path(given).expanduser() if given else Path(platformdirs.user_cache_dir("at2po", appauthor=False))


def beside_or_cached(path: Path, name: str) -> Path:
    """Return where the derived file or folder `name` of `path` lies, or is to be made.

    Beside `path` when it is there already or when that folder can be written to; otherwise in the cache
    folder. A folder without any write permission counts as read-only even for root.
    """
    beside = path.parent / name
    if beside.exists() or _writable(path.parent):
        return beside
    key = hashlib.sha256(str(path.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return cache_dir() / "indexes" / key / name


def _writable(folder: Path) -> bool:
    mode = folder.stat().st_mode
    return bool(mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH)) and os.access(folder, os.W_OK)
