"""A shop: products, goals and search of one set, in the folder into which the original's files are converted.

Opening maps the index of the rows and reads nothing else, so that a shop of 1.18 million products opens in
seconds and needs little memory. Every environment of a process shares one shop for the same files.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from at2po_env.data import Corpus
from at2po_env.data.cache import beside_or_cached
from at2po_env.errors import DataError
from at2po_env.forking import Shared
from at2po_env.retrieval import Retriever, open_retriever
from at2po_envs.webshop.goals import KINDS, Goals, GoalTable, Kind, count_goals
from at2po_envs.webshop.products import Product, Sources, convert, find_sources, read_product

FORMAT = 1
RESULTS = 50
"""How many products a search finds at most."""


class Shop(Shared):
    """The products, goals and search of one set; immutable and thread safe.

    Args:
        folder: What `build` made.
        name: What to call it in errors.

    Attributes:
        noted: How many items of the original's files were left out or mended, by reason.
        goal_counts: Number of goals of each kind.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        meta = json.loads((folder / "shop.json").read_text("utf-8"))
        self.noted: Mapping[str, int] = meta["noted"]
        self.goal_counts: Mapping[str, int] = meta["goals"]
        self._folder = folder
        self._rows = Corpus(folder / "products.jsonl")
        self._ids = np.load(folder / "ids.npy", mmap_mode="r")  # sorted
        self._row_of_id = np.load(folder / "id-rows.npy", mmap_mode="r")
        self.product = lru_cache(maxsize=4096)(self._read)

    def __len__(self) -> int:
        """Return the number of products."""
        return len(self._rows)

    def _read(self, row: int) -> Product:
        try:
            return read_product(self._rows.line(row))
        except (ValueError, KeyError, TypeError) as error:
            where = f"{self._folder / 'products.jsonl'}, line {row + 1}"
            raise DataError(
                f"{where}: damaged ({error}). Fix: delete the folder; it is made again at the next start."
            ) from error

    def find_row(self, asin: str) -> int | None:
        """Return the row of a product id, None where there is no such product."""
        key = asin.encode("utf-8", "surrogatepass")
        at = int(np.searchsorted(self._ids, key))
        return int(self._row_of_id[at]) if at < len(self._ids) and self._ids[at] == key else None

    def find(self, asin: str) -> Product | None:
        """Return the product with an id, None where there is none."""
        row = self.find_row(asin)
        return None if row is None else self.product(row)

    def goals(self, kind: Kind, split: str) -> Goals:
        """Return the goals of a kind and split."""
        table = GoalTable.open(self._folder, kind)
        return Goals(table, kind, split, product=self.product, find_row=self.find_row, name=self.name)

    def searcher(self, retriever: str | Retriever, options: Mapping[str, Any] | None = None) -> Searcher:
        """Return the search of the shop's products."""
        opened = open_retriever(retriever, self._folder / "products.jsonl", **(options or {}))
        return Searcher(self, opened)


class Searcher(Shared):
    """Finds products by a retriever; remembers the last queries, as pages are often shown again."""

    def __init__(self, shop: Shop, retriever: Retriever) -> None:
        self.retriever = retriever
        self._shop = shop
        self.find = lru_cache(maxsize=4096)(self._find)

    def _find(self, query: str) -> tuple[int, ...]:
        """Return the rows of at most `RESULTS` products, best first."""
        (passages,) = self.retriever.search([query], RESULTS)
        rows = (self._shop.find_row(passage.id) for passage in passages)
        return tuple(row for row in rows if row is not None)


_open: dict[tuple[str, str], Shop] = {}


def open_shop(dataset: str | Path) -> Shop:
    """Open the shop of a folder with the original's files; the first opening converts them.

    The converted folder lies beside the files, in the cache folder where those are read-only. It is made anew
    when one of the files changes.

    Raises:
        DataError: A file is missing or damaged, or there is no room.
    """
    sources = find_sources(dataset)
    stamp = json.dumps({"format": FORMAT, "sources": sources.stamp}, sort_keys=True)
    key = (str(sources.items.resolve()), stamp)
    if key not in _open:
        home = beside_or_cached(sources.items, f"{sources.items.name}.shop")
        try:
            build(sources, home, stamp)
        except OSError as error:
            raise DataError(f"{home}: cannot write ({error}). Fix: make room, or set AT2PO_CACHE.") from error
        _open[key] = Shop(home, str(sources.items))
    return _open[key]


def build(sources: Sources, home: Path, stamp: str) -> None:
    """Convert the original's files into a folder, unless that was done; other processes wait for it."""
    home.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{home}.lock"):
        if _stamp_of(home) == stamp:
            return
        new = home.with_name(f"{home.name}.{os.getpid()}.tmp")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        try:
            noted: Counter[str] = Counter()
            goals = _index(convert(sources, new / "products.jsonl", noted), new)
            meta = {"stamp": stamp, "noted": noted, "goals": goals}
            (new / "shop.json").write_text(json.dumps(meta, indent=1), "utf-8")
            shutil.rmtree(home, ignore_errors=True)
            new.rename(home)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def _stamp_of(home: Path) -> str | None:
    try:
        return str(json.loads((home / "shop.json").read_text("utf-8"))["stamp"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _index(products: Iterable[Product], folder: Path) -> dict[str, int]:
    """Write the sorted ids of the products and the goals of each kind; return the numbers of goals."""
    ids: list[bytes] = []
    counts: dict[Kind, list[tuple[int, int]]] = {kind: [] for kind in KINDS}
    for row, product in enumerate(products):
        ids.append(product.asin.encode("utf-8", "surrogatepass"))
        for kind in KINDS:
            if number := count_goals(product, kind):
                counts[kind].append((row, number))
    order = np.argsort(np.array(ids))
    np.save(folder / "ids.npy", np.array(ids)[order])
    np.save(folder / "id-rows.npy", order.astype(np.int64))
    return {kind: GoalTable.write(folder, kind, counts[kind]) for kind in KINDS}
