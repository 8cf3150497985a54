"""Lists environment ids with the data that they need, and data sets with their files on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import gymnasium
from rich import box
from rich.table import Table

import at2po_env  # noqa: F401  registers the shipped ids and those of plug-ins
from at2po_env.data.cache import cache_dir
from at2po_env.data.catalog import CORPORA, INDEXES, QA_SETS, WIKI_18, WORLDS, files_of

_FOREIGN = ("gymnasium.", "shimmy.")
_LINE_EVERY_S = 5.0
_GET = "at2po data get "


class EnvironmentRow(NamedTuple):
    """One id.

    Attributes:
        id: The name that `gymnasium.make` takes.
        questions: Origin of its questions on this machine, unless `dataset=` names another.
        passages: Origin of its passages, unless `corpus=` names another; "" when it has none.
        get: Command that gets the real data; "" when nothing is missing.
    """

    id: str
    questions: str
    passages: str
    get: str


class DataRow(NamedTuple):
    """One data set: its name, its kind, how much there is, and the files that are on this machine."""

    name: str
    kind: str
    content: str
    files: list[str]
    complete: bool


def environment_rows() -> list[EnvironmentRow]:
    """List all ids that at2po, its plug-ins and this process registered, sorted."""
    rows = []
    for spec in sorted(gymnasium.registry.values(), key=lambda spec: spec.id):
        entry = spec.entry_point
        module = entry if isinstance(entry, str) else str(getattr(entry, "__module__", ""))
        if not module.startswith(_FOREIGN):
            rows.append(_environment_row(spec.id))
    return rows


def environment_table(rows: Sequence[EnvironmentRow]) -> Table:
    """Tabulate the ids."""
    table = Table(title="Environments", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("id", no_wrap=True)
    for name in ("questions", "passages", "at2po data get ..."):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(
            f"[cyan]{row.id}", row.questions, row.passages or "–", row.get.removeprefix(_GET) or "–"
        )
    return table


def data_rows() -> list[DataRow]:
    """List all data sets that `at2po data get` knows."""
    rows = []
    for qa in QA_SETS.values():
        counts = [name if count is None else f"{name} {count:,}" for name, count in qa.splits.items()]
        rows.append(_data_row(qa.name, "questions", ", ".join(counts)))
    rows += [_data_row(name, "passages", "Wikipedia 2018, about 21 million") for name in CORPORA]
    contents = {"wiki-18-e5": "for dense retrieval, 64.5 GB", "wiki-18-bm25": "by Lucene, 2.3 GB"}
    rows += [_data_row(name, "index", contents[name]) for name in INDEXES]
    worlds = {
        "webshop": "1,000 products",
        "webshop-full": "1.18 million products, 5.5 GB",
        "alfworld": "published games of the household",
    }
    rows += [_data_row(name, "world", worlds[name]) for name in WORLDS]
    return rows


def data_table(rows: Sequence[DataRow]) -> Table:
    """Tabulate the data sets."""
    table = Table(
        title=f"Data in {cache_dir()}", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD
    )
    for name in ("name", "kind", "content", "here"):
        table.add_column(name, overflow="fold")
    for row in rows:
        here = "[green]yes" if row.complete else "partly" if row.files else "[dim]no"
        table.add_row(f"[cyan]{row.name}", row.kind, row.content, here)
    return table


def data_files(name: str) -> list[Path]:
    """Find the files of a data set that are on this machine.

    Raises:
        DataError: There is nothing of that name.
    """
    return [path for path in _targets(name) if path.exists()]


def plain_download_report(
    write: Callable[[str], None], clock: Callable[[], float] = time.monotonic
) -> Callable[[str, int, int | None], None]:
    """Make a listener of downloads that writes a line every few seconds, for output that is no terminal."""
    last = clock()

    def report(name: str, done: int, total: int | None) -> None:
        nonlocal last
        if clock() - last < _LINE_EVERY_S and done != total:
            return
        last = clock()
        write(f"{name}: {done / 1e6:,.1f} MB" + ("" if total is None else f" of {total / 1e6:,.1f} MB"))

    return report


def _environment_row(env_id: str) -> EnvironmentRow:
    name = env_id.removeprefix("at2po/").rpartition("-v")[0].lower()
    qa = next((qa for qa in QA_SETS.values() if qa.title.lower() == name), None)
    if env_id.startswith("at2po/") and name in WORLDS:
        here = _data_row(name, "world", "").complete
        return EnvironmentRow(
            env_id, f"{name} (downloaded)" if here else "sample", "", "" if here else _GET + name
        )
    if env_id.startswith("at2po/Household"):
        here = _data_row("alfworld", "world", "").complete
        published = ", published (downloaded)" if here else ""
        return EnvironmentRow(env_id, f"generated{published}", "", "" if here else f"{_GET}alfworld")
    if not env_id.startswith("at2po/") or qa is None:
        generated = env_id.startswith("at2po/MiniWiki")
        return EnvironmentRow(
            env_id, "generated" if generated else "its own", "generated" if generated else "", ""
        )
    splits = [path.stem for path in data_files(qa.name)]
    corpus = bool(data_files(WIKI_18))
    missing = [data for data, here in ((qa.name, bool(splits)), (WIKI_18, corpus)) if not here]
    return EnvironmentRow(
        env_id,
        f"{', '.join(splits)} (downloaded)" if splits else "sample of 12",
        f"{WIKI_18} (downloaded)" if corpus else "sample",
        _GET + " ".join(missing) if missing else "",
    )


def _data_row(name: str, kind: str, content: str) -> DataRow:
    here = data_files(name)
    return DataRow(name, kind, content, [str(path) for path in here], len(here) == len(_targets(name)))


def _targets(name: str) -> list[Path]:
    return [cache_dir() / file.target for file in files_of(name)]
