import multiprocessing
import resource
import sqlite3
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from at2po_env.data.corpus import Passage
from at2po_env.errors import RetrievalError
from at2po_env.retrieval import cache as cache_module
from at2po_env.retrieval.bm25.retriever import Bm25Retriever
from at2po_env.retrieval.cache import CachedRetriever, ResultCache
from at2po_env.retrieval.counters import counted
from at2po_env.retrieval.opening import open_retriever


class Counting:
    def __init__(self, digest: str = "one") -> None:
        self.digest, self.asked = digest, list[str]()

    def search(self, queries: Sequence[str], topk: int) -> list[list[Passage]]:
        self.asked += queries
        if "fail" in queries:
            raise RetrievalError("no")
        return [
            [Passage(str(i), f"{self.digest} {q}", "日本 text", 1.5) for i in range(topk)] for q in queries
        ]


def test_a_result_is_searched_for_once_and_comes_back_the_same(tmp_path: Path) -> None:
    inner, path = Counting(), tmp_path / "cache.sqlite"
    first = CachedRetriever(inner, path).search(["a", "b", "a"], 2)
    again = CachedRetriever(inner, path)
    assert first == inner.search(["a", "b", "a"], 2)
    inner.asked.clear()
    assert again.search(["b", "c", "a", "c"], 2) == Counting().search(["b", "c", "a", "c"], 2)
    assert inner.asked == ["c"]
    assert isinstance(again.search(["a"], 2)[0][0], Passage)


def test_hits_and_misses_are_counted(tmp_path: Path) -> None:
    before = counted()
    retriever = CachedRetriever(Counting(), tmp_path / "c")
    retriever.search(["a", "b"], 1)
    retriever.search(["a", "c"], 1)
    after = counted()
    assert after["cache_hits"] - before.get("cache_hits", 0) == 1
    assert after["cache_misses"] - before.get("cache_misses", 0) == 3


def test_another_index_and_another_topk_share_nothing(tmp_path: Path) -> None:
    path = tmp_path / "c"
    CachedRetriever(Counting("one"), path).search(["a"], 1)
    assert CachedRetriever(Counting("two"), path).search(["a"], 1)[0][0].title == "two a"
    assert len(CachedRetriever(Counting("one"), path).search(["a"], 3)[0]) == 3


def test_a_failed_search_is_not_kept(tmp_path: Path) -> None:
    retriever = CachedRetriever(Counting(), tmp_path / "c")
    for _ in range(2):
        with pytest.raises(RetrievalError):
            retriever.search(["fail"], 1)
    assert len(retriever.cache) == 0


def test_the_file_is_bounded_and_drops_what_was_used_longest_ago(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(cache_module.time, "time", lambda: now[0])
    inner = Counting()
    retriever = CachedRetriever(inner, tmp_path / "c", max_results=20)
    for number in range(30):
        now[0] += 100
        retriever.search([f"q{number}"], 1)
        retriever.search(["often"], 1)
    assert len(retriever.cache) <= 20
    inner.asked.clear()
    retriever.search(["often", "q29", "q0"], 1)
    assert inner.asked == ["q0"]


def test_no_text_breaks_the_cache(tmp_path: Path) -> None:
    retriever = CachedRetriever(Counting(), tmp_path / "c")
    for query in ("", "\x00", "\ud800", "x" * 100_000):
        for _ in range(2):
            assert retriever.search([query], 1) == Counting().search([query], 1)


def full_disk(cache: ResultCache) -> None:
    """Let SQLite find no room for another page: the very error of a full disk."""
    connection = cache._open()
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages}")


def test_a_full_disk_is_survived_without_the_cache_and_counted(tmp_path: Path) -> None:
    inner = Counting()
    retriever = CachedRetriever(inner, tmp_path / "c")
    retriever.search(["kept"], 1)
    full_disk(retriever.cache)
    with pytest.raises(sqlite3.OperationalError, match="full"):  # the fault is what it claims to be
        retriever.cache.put([(str(i).encode(), inner.search(["x" * 500], 50)[0]) for i in range(50)])
    before = counted().get("cache_errors", 0)
    queries = [f"q{i}" for i in range(200)]
    assert retriever.search(queries, 5) == Counting().search(queries, 5)
    assert counted()["cache_errors"] - before == 1
    assert retriever.search(queries, 5) == Counting().search(queries, 5)  # left alone, not tried each time
    assert counted()["cache_errors"] - before == 1


def _write_with_little_room(path: Path, results: "multiprocessing.Queue[tuple[int, int]]") -> None:
    retriever = CachedRetriever(Counting(), path)
    retriever.search(["first"], 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, 64 * 1024))
    right = sum(retriever.search([f"q{i}"], 20) == Counting().search([f"q{i}"], 20) for i in range(200))
    results.put((right, counted().get("cache_errors", 0)))


def test_a_file_that_may_not_grow_is_survived(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[tuple[int, int]] = context.Queue()
    process = context.Process(target=_write_with_little_room, args=(tmp_path / "c", results))
    process.start()
    right, errors = results.get(timeout=60)
    process.join()
    assert right == 200
    assert errors >= 1
    assert CachedRetriever(Counting(), tmp_path / "c").search(["first"], 1) == Counting().search(["first"], 1)


@pytest.mark.parametrize("content", [b"this is no database " * 300, b"SQLite format 3\x00" + b"\xff" * 5000])
def test_a_damaged_file_is_survived_and_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "c"
    path.write_bytes(content)
    before = counted().get("cache_errors", 0)
    assert CachedRetriever(Counting(), path).search(["a"], 1) == Counting().search(["a"], 1)
    assert counted()["cache_errors"] > before
    assert path.read_bytes() == content


def test_a_folder_that_cannot_be_made_is_survived(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    retriever = CachedRetriever(Counting(), tmp_path / "file" / "c")
    assert retriever.search(["a"], 1) == Counting().search(["a"], 1)


@pytest.mark.parametrize(
    "found",
    [
        "[[1",
        "5",
        "null",
        "{}",
        '["abcd"]',
        "[[1, 2, 3, 4]]",
        '[["0", "t", "text", "high"]]',
        '[["0", "t", "text", NaN]]',
        '[["0", "t", null, 1.0]]',
        '[["0", "t", "text", 1.0, 2]]',
        "[" * 100_000,
        '[["0", "t", "text", %s]]' % ("9" * 400),
        b"\xff\xfe",
        3,
        None,
    ],
    ids=lambda found: f"{found!r:.30}",
)
def test_a_damaged_row_is_survived(tmp_path: Path, found: object) -> None:
    retriever = CachedRetriever(Counting(), tmp_path / "c")
    retriever.search(["a"], 1)
    table = retriever.cache._open()
    table.execute("PRAGMA ignore_check_constraints = ON")
    table.executescript(
        "ALTER TABLE results RENAME TO old; CREATE TABLE results (key, used, found); "
        "INSERT INTO results SELECT * FROM old;"
    )  # without its constraints
    table.execute("UPDATE results SET found = ?", (found,))
    assert retriever.search(["a"], 1) == Counting().search(["a"], 1)


def test_another_letter_in_a_row_is_noticed(tmp_path: Path) -> None:
    retriever = CachedRetriever(Counting(), tmp_path / "c")
    retriever.search(["a"], 1)
    table = retriever.cache._open()
    table.execute(
        "UPDATE results SET found = replace(found, 'text', 'lies')"
    )  # valid, of the right type, and wrong
    assert table.execute("SELECT found FROM results").fetchone()[0].count("lies") == 1
    assert retriever.search(["a"], 1) == Counting().search(["a"], 1)


def test_a_row_of_an_older_release_is_read(tmp_path: Path) -> None:
    inner = Counting()
    retriever = CachedRetriever(inner, tmp_path / "c")
    expected = retriever.search(["a"], 1)
    retriever.cache._open().execute("UPDATE results SET found = substr(found, 9)")  # without its checksum
    assert retriever.search(["a"], 1) == expected
    assert inner.asked == ["a"]


def test_a_damaged_time_of_use_is_survived(tmp_path: Path) -> None:
    retriever = CachedRetriever(Counting(), tmp_path / "c")
    retriever.search(["a"], 1)
    retriever.cache._open().execute("UPDATE results SET used = 'yesterday'")
    assert retriever.search(["a"], 1) == Counting().search(["a"], 1)


@pytest.mark.parametrize("at", [100, 4096 + 8, 2 * 4096 + 8, 5 * 4096 + 50])
def test_damage_while_the_file_is_open_is_survived(tmp_path: Path, at: int) -> None:
    retriever = CachedRetriever(Counting(), tmp_path / "c")
    queries = [f"q{i}" for i in range(100)]
    retriever.search(queries, 5)
    retriever.cache.close()
    with (tmp_path / "c").open("r+b") as file:
        file.seek(at)
        file.write(b"\xff" * 200)
    for _ in range(2):
        assert retriever.search([*queries, "new"], 5) == Counting().search([*queries, "new"], 5)


def _search_many(path: Path, first: int) -> None:
    retriever = CachedRetriever(Counting(), path)
    for i in range(100):
        assert retriever.search([f"q{(first + i) % 100}"], 2) == Counting().search(
            [f"q{(first + i) % 100}"], 2
        )
    assert counted().get("cache_errors", 0) == 0


def test_processes_share_the_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_search_many, args=(tmp_path / "c", 33 * i)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert len(ResultCache(tmp_path / "c")) == 100


def test_threads_share_a_retriever(tmp_path: Path) -> None:
    retriever, wrong = CachedRetriever(Counting(), tmp_path / "c"), list[str]()

    def work(first: int) -> None:
        for i in range(50):
            query = f"q{(first + i) % 60}"
            if retriever.search([query], 1) != Counting().search([query], 1):
                wrong.append(query)

    threads = [threading.Thread(target=work, args=(i * 7,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == []
    assert len(retriever.cache) == 60


def test_a_locked_file_delays_a_search_no_longer_than_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "BUSY_S", 0.2)
    path = tmp_path / "c"
    CachedRetriever(Counting(), path).search(["a"], 1)
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    start = time.monotonic()
    assert CachedRetriever(Counting(), path).search(["b"], 1) == Counting().search(["b"], 1)
    assert time.monotonic() - start < 2
    blocker.close()


def test_open_retriever_puts_a_cache_before_any_kind(tmp_path: Path, passages: tuple[Passage, ...]) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"id": "0", "contents": "\\"Ada\\"\\nwrote programs"}\n')
    retriever = open_retriever("bm25", corpus, cache=tmp_path / "c")
    assert isinstance(retriever, CachedRetriever)
    assert isinstance(retriever.retriever, Bm25Retriever)
    assert retriever.digest == open_retriever("bm25", corpus).digest
    assert retriever.search(["programs"], 1)[0][0].title == "Ada"
    assert len(passages) == 4
