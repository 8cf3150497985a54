"""wiki-18 corpora: random access by row, streaming, and every complaint with file, line and fix."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from helpers.paths import REAL_DATA

from at2po_env.data import Corpus, Passage, corpus
from at2po_env.errors import DataError

REAL = REAL_DATA / "corpus" / "wiki_hotpotqa_musique.jsonl"
ROWS = [
    {"id": "0", "contents": '"Cat"\nA cat.\nIt purrs.'},
    {"id": 1, "contents": '"\\"Weird Al\\" Yankovic"\nA musician.'.replace("\\", "")},
    {"id": "x", "contents": "Åse\u2028\nBare title,  été.", "more": None},
]
PASSAGES = [
    Passage("0", "Cat", "A cat.\nIt purrs."),
    Passage("1", '"Weird Al" Yankovic', "A musician."),
    Passage("x", "Åse\u2028", "Bare title,  été."),
]


def write(path: Path, *lines: bytes, end: bytes = b"\n") -> Path:
    path.write_bytes(b"".join(line + end for line in lines))
    return path


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AT2PO_CACHE", str(tmp_path / "cache"))
    rows = (json.dumps(row, ensure_ascii=False).encode() for row in ROWS)
    return write(tmp_path / "corpus.jsonl", *rows)


@pytest.fixture(params=["small", "large"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "large":
        monkeypatch.setattr(corpus, "KEEP_BYTES", 0)
        monkeypatch.setattr(corpus, "_CHUNK", 7)
    return str(request.param)


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("end", [b"\n", b""])
def test_rows_by_number_and_in_a_stream(path: Path, end: bytes) -> None:
    path.write_bytes(path.read_bytes().removesuffix(b"\n") + end)
    opened = Corpus(path)
    assert [opened[row] for row in (2, 0, 1)] == [PASSAGES[row] for row in (2, 0, 1)]
    assert list(opened) == PASSAGES
    assert len(opened) == 3
    assert opened.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    for row in (3, -1):
        with pytest.raises(IndexError, match=r"corpus.jsonl has rows 0 to 2, not"):
            opened[row]


def test_large_corpus_is_scanned_once_and_again_when_it_changes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "KEEP_BYTES", 0)
    first = Corpus(path)
    scans: list[Path] = []
    find_rows = corpus._find_rows
    monkeypatch.setattr(corpus, "_find_rows", lambda *a: (scans.append(a[0]), find_rows(*a))[1])
    again = Corpus(path)
    assert (again.digest, list(again), scans) == (first.digest, PASSAGES, [])
    assert isinstance(again._offsets, np.memmap)
    write(path, b'{"id": "0", "contents": "\\"Dog\\"\\nA dog."}')
    assert [passage.title for passage in Corpus(path)] == ["Dog"]
    assert len(scans) == 1


@pytest.mark.parametrize("damage", ["cut", "no json", "no object", "gone"])
def test_damaged_row_positions_are_found_again(
    path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(corpus, "KEEP_BYTES", 0)
    Corpus(path)
    home = path.parent / "corpus.jsonl.rows"
    if damage == "cut":
        os.truncate(home / "rows.u64", 16)
    elif damage == "gone":
        (home / "rows.u64").unlink()
    else:
        (home / "rows.json").write_text("{" if damage == "no json" else "[]")
    assert [Corpus(path)[row] for row in range(3)] == PASSAGES


def test_read_only_folder_sends_row_positions_to_the_cache(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "KEEP_BYTES", 0)
    inside = tmp_path / "read only"
    inside.mkdir()
    path = path.rename(inside / "corpus.jsonl")
    inside.chmod(0o555)
    try:
        assert list(Corpus(path)) == PASSAGES
        assert list(inside.iterdir()) == [path]
    finally:
        inside.chmod(0o755)
    assert len(list((tmp_path / "cache/indexes").glob("*/corpus.jsonl.rows"))) == 1


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"id": "1"', "Invalid JSON"),
        (b'{"id": "1"}', "contents: Field required"),
        (b'{"contents": "\\"T\\"\\nx"}', "id.*: Field required"),
        (b'{"id": "1", "contents": 7}', "contents: .*got 7"),
        (b'{"id": 1.5, "contents": "\\"T\\"\\nx"}', "id.*got 1.5"),
        (b'{"id": "1", "contents": "no newline"}', "contents has no title line"),
        (b'{"id": "1", "contents": "\xff\\n"}', "invalid UTF-8 at byte 25"),
        (b"", "the line is blank"),
        (b'{"id": "1", "contents": "\\"T\\"\\nx"}\r', "the line ends in CR LF"),
    ],
)
def test_bad_line_is_an_error_with_file_line_and_fix(path: Path, line: bytes, what: str) -> None:
    write(path, json.dumps(ROWS[0]).encode(), line)
    opened = Corpus(path)
    assert opened[0] == PASSAGES[0]
    for read in (lambda: opened[1], lambda: list(opened)):
        with pytest.raises(DataError, match=rf"corpus.jsonl, line 2: .*{what}.*Fix: ") as error:
            read()
        assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", r"corpus.jsonl, line 1: the corpus is empty. Fix: "),
        (b"\xef\xbb\xbf{}", r"corpus.jsonl, line 1: .*byte order mark. Fix: "),
        (None, r"corpus.jsonl: cannot read this corpus \(No such file or directory\). Fix: "),
    ],
)
def test_file_that_is_no_corpus_is_an_error(path: Path, content: bytes | None, what: str) -> None:
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=what):
        Corpus(path)


def test_corpus_cut_short_while_open_is_an_error(path: Path) -> None:
    opened = Corpus(path)
    os.truncate(path, 20)
    with pytest.raises(DataError, match=r"corpus.jsonl, line 3"):
        opened[2]


@pytest.mark.skipif(not REAL.exists(), reason="the real corpus is not here")
def test_real_corpus_is_read() -> None:
    opened = Corpus(REAL)
    assert len(opened) == 2884
    assert [passage.id for passage in opened] == [str(row) for row in range(2884)]
    assert all(opened[row] == passage and passage.title for row, passage in enumerate(opened))
