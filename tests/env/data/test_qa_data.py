"""FlashRAG question files: lazily read, fully checked, every complaint with file, line and fix."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.paths import REAL_DATA

from at2po_env.data import Corpus, Task, TaskSource, load_qa, qa, resolve_corpus, resolve_dataset
from at2po_env.data.convert import convert
from at2po_env.data.qa import as_tasks
from at2po_env.errors import DataError

REAL = REAL_DATA / "qa"
ROW = {"id": "1", "question": "Who?", "golden_answers": ["Ada", "Ada Lovelace"], "metadata": {"hops": 2}}
GOOD = json.dumps(ROW).encode()


def write(path: Path, *lines: bytes, end: bytes = b"\n") -> Path:
    path.write_bytes(b"".join(line + end for line in lines))
    return path


def test_rows_become_tasks_by_index_and_by_id(tmp_path: Path) -> None:
    rows = [ROW, {"id": 2, "question": "When?\u2028Where?", "golden_answers": ["1815"], "source": "x"}]
    tasks = load_qa(write(tmp_path / "qa.jsonl", *(json.dumps(row).encode() for row in rows)))
    assert isinstance(tasks, TaskSource)
    assert tasks[0] == Task("1", "Who?", ("Ada", "Ada Lovelace"), {"hops": 2})
    assert tasks[1] == tasks[-1] == tasks.by_id("2") == Task(
        "2", "When?\u2028Where?", ("1815",), {"source": "x"}
    )  # fmt: skip
    assert list(tasks) == tasks[:] == [tasks[0], tasks[1]]


def test_missing_index_and_id_are_errors(tmp_path: Path) -> None:
    tasks = load_qa(write(tmp_path / "qa.jsonl", GOOD))
    for index in (1, -2):
        with pytest.raises(IndexError, match=r"qa.jsonl has 1 questions"):
            tasks[index]
    with pytest.raises(DataError, match=r"qa.jsonl: no question has the id 'x'.*'1'"):
        tasks.by_id("x")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"id": "2", "question"', "Invalid JSON"),
        (b"[]", "the row: "),
        (b'{"id": "2", "question": "q"}', "golden_answers: Field required"),
        (b'{"question": "q", "golden_answers": ["a"]}', "id: Field required"),
        (b'{"id": "2", "question": "q", "golden_answers": "a"}', "golden_answers: .*got 'a'"),
        (b'{"id": "2", "question": "q", "golden_answers": []}', "golden_answers: .*at least 1"),
        (b'{"id": "2", "question": "q", "golden_answers": [7]}', r"golden_answers.0: .*got 7"),
        (b'{"id": "2", "question": " ", "golden_answers": ["a"]}', "question: "),
        (b'{"id": true, "question": "q", "golden_answers": ["a"]}', r"id.*got True"),
        (b'{"id": "2", "question": "q", "golden_answers": ["a"], "metadata": 3}', "metadata: "),
        (b'{"id": "2", "question": "\xff", "golden_answers": ["a"]}', "invalid UTF-8 at byte 25"),
        (b'{"id": "2", "question": "\\ud800", "golden_answers": ["a"]}', "Invalid JSON.*hex escape"),
        (b"", "the line is blank"),
        (b"\x00" * 9, "Invalid JSON"),
        (GOOD.replace(b'"1"', b'"2"') + b"\r", r"the line ends in CR LF.*dos2unix"),
        (GOOD, "the id '1' occurs already in line 1.*Fix: give every question its own id"),
    ],
)
def test_bad_line_is_an_error_with_file_line_and_fix(tmp_path: Path, line: bytes, what: str) -> None:
    path = write(tmp_path / "qa.jsonl", GOOD, line)
    with pytest.raises(DataError, match=rf"qa.jsonl, line 2: .*{what}") as error:
        load_qa(path)
    assert str(path) in str(error.value)
    assert "Fix: " in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", r"qa.jsonl, line 1: the question file is empty. Fix: "),
        (b"\xef\xbb\xbf" + GOOD, r"qa.jsonl, line 1: .*byte order mark. Fix: "),
        (None, r"qa.jsonl: No such file or directory. Fix: "),
    ],
)
def test_file_that_is_no_question_file_is_an_error(tmp_path: Path, content: bytes | None, what: str) -> None:
    if content is not None:
        (tmp_path / "qa.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=what):
        load_qa(tmp_path / "qa.jsonl")
    with pytest.raises(DataError, match=r"Fix: give the path"):
        load_qa(tmp_path)


@pytest.mark.timeout(20)
def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reads: list[Callable[[Path], object]] = [
        load_qa,
        Corpus,
        as_tasks,
        lambda path: resolve_dataset("nq", "test", path),
        lambda path: resolve_corpus("nq", path),
        lambda path: convert("hotpotqa", path, tmp_path / "out.jsonl"),
    ]
    for read in reads:
        with pytest.raises(
            DataError, match=r"pipe: this .* is a named pipe, expected a regular file. Fix: write"
        ):
            read(tmp_path / "pipe")
    for read in (load_qa, Corpus):
        with pytest.raises(
            DataError, match=r"null: this .* is a device, expected a regular file. Fix: write"
        ):
            read(Path("/dev/null"))
        with pytest.raises(DataError, match=r"is a folder, expected a regular file. Fix: give the path"):
            read(tmp_path)


def test_last_line_needs_no_line_end(tmp_path: Path) -> None:
    assert len(load_qa(write(tmp_path / "qa.jsonl", GOOD, end=b""))) == 1


def test_unchanged_file_is_read_once_and_a_changed_one_again(tmp_path: Path) -> None:
    path = write(tmp_path / "qa.jsonl", GOOD)
    first = load_qa(path)
    assert load_qa(str(path)) is first
    write(path, GOOD, GOOD.replace(b'"1"', b'"2"'))
    assert len(load_qa(path)) == 2


def test_tasks_are_read_when_asked_for_and_kept_in_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qa, "CACHED_TASKS", 2)
    rows = [GOOD.replace(b'"1"', b'"%d"' % row) for row in range(9)]
    tasks = load_qa(write(tmp_path / "qa.jsonl", *rows))
    assert tasks._tasks == {}
    assert [task.id for task in tasks] == [str(row) for row in range(9)]
    assert len(tasks._tasks) <= 2


@pytest.mark.skipif(not REAL.exists(), reason="the real questions are not here")
@pytest.mark.parametrize(
    ("name", "rows"),
    [("hotpotqa/train", 100), ("musique/train", 100), ("nq/test", 1000), ("bamboogle/test", 125)],
)
def test_real_files_are_read(name: str, rows: int) -> None:
    tasks = load_qa(REAL / f"{name}.jsonl")
    assert len({task.id for task in tasks}) == rows
    assert all(tasks.by_id(task.id) is task and task.golden_answers for task in tasks)
