"""The original release files of the seven question sets to FlashRAG rows.

| set | original file |
|---|---|
| hotpotqa | `hotpot_train_v1.1.json`, `hotpot_dev_*_v1.json`: JSON array |
| 2wikimultihopqa | `train.json`, `dev.json`: JSON array |
| musique | `musique_ans_v1.0_*.jsonl`, `musique_full_v1.0_*.jsonl` (unanswerable questions are left out) |
| nq | `NQ-open.*.jsonl`: JSON lines |
| triviaqa | `unfiltered-web-*.json`, `wikipedia-*.json` and so on: JSON object with the array `Data` |
| popqa | `popQA.tsv`: tab-separated with a header |
| bamboogle | the published sheet as CSV with the columns Question and Answer |

Test files without answers cannot be converted. The paragraphs that some files carry are left out.
"""

import csv
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Annotated, Any

from pydantic import BaseModel, Field, Json, ValidationError

from at2po_env.data.catalog import qa_set
from at2po_env.data.jsonl import read_lines, require_regular
from at2po_env.data.progress import ProgressBar
from at2po_env.data.qa import QaRow
from at2po_env.errors import DataError


class _Original(BaseModel, ABC):
    """One item of an original file."""

    id: str | None = None
    question: str

    @abstractmethod
    def answers(self) -> list[str]:
        """Return the accepted answers; none where the question has no answer."""

    def metadata(self) -> dict[str, Any]:
        """Return what else is worth keeping."""
        return {}


class _Hotpot(_Original):
    """HotpotQA and 2WikiMultihopQA."""

    id: str = Field(alias="_id")
    answer: str
    type: str
    level: str | None = None
    supporting_facts: list[tuple[str, int]]
    evidences: list[tuple[str, str, str]] | None = None

    def answers(self) -> list[str]:
        return [self.answer]

    def metadata(self) -> dict[str, Any]:
        rest = self.model_dump(include={"type", "level", "evidences"}, exclude_none=True)
        titles, sentences = ([fact[part] for fact in self.supporting_facts] for part in (0, 1))
        return {**rest, "supporting_facts": {"title": titles, "sent_id": sentences}}


class _Musique(_Original):
    id: str
    answer: str
    answer_aliases: list[str] = []
    answerable: bool = True
    question_decomposition: list[dict[str, Any]]

    def answers(self) -> list[str]:
        return [self.answer, *self.answer_aliases] if self.answerable else []

    def metadata(self) -> dict[str, Any]:
        return {"question_decomposition": self.question_decomposition}


class _NqOpen(_Original):
    answer: list[str]

    def answers(self) -> list[str]:
        return self.answer


class _TriviaAnswer(BaseModel):
    value: str = Field(alias="Value")
    aliases: list[str] = Field(alias="Aliases", default=[])


class _Trivia(_Original):
    id: str = Field(alias="QuestionId")
    question: str = Field(alias="Question")
    answer: _TriviaAnswer = Field(alias="Answer")

    def answers(self) -> list[str]:
        return [self.answer.value, *self.answer.aliases]


class _PopQa(_Original):
    id: str
    subj: str
    prop: str
    obj: str
    s_wiki_title: str
    o_wiki_title: str
    s_pop: int
    o_pop: int
    possible_answers: Annotated[list[str], Json()]

    def answers(self) -> list[str]:
        return self.possible_answers

    def metadata(self) -> dict[str, Any]:
        return self.model_dump(exclude={"id", "question", "possible_answers"})


class _Bamboogle(_Original):
    question: str = Field(alias="Question")
    answer: str = Field(alias="Answer")

    def answers(self) -> list[str]:
        return [self.answer]


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in read_lines(path, kind="question file"):
        try:
            yield f"line {number}", json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}. Fix: get the original file again.") from error


_CHUNK = 2**20
_decode = json.JSONDecoder().raw_decode
_COLON = re.compile(r"\s*:\s*")


def read_array(path: Path, key: str | None = None) -> Iterator[tuple[str, Any]]:
    """Yield ("item N", item), N from 1, of the array in `path` or of the array under `key` of its object.

    Memory is that of a few items. The text before and after the array is not checked.

    Raises:
        DataError: no array, or one that is damaged or cut short; names the item.
    """
    fix = "Fix: get the original file again."
    start = re.compile(rf'"{key}"\s*:\s*\[' if key else r"\s*\[")
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_CHUNK)
            found = start.search(text) if key else start.match(text)
            if not found:
                raise DataError(f"{path}: no JSON array{f' {key!r}' if key else ''} at its beginning. {fix}")
            for item in _items(file, text[found.end() :]):
                number += 1
                yield f"item {number}", item
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}, item {number + 1}: cannot be read ({error}). {fix}") from error


def read_object(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of the object in `path`, in memory of a few values; a key may come twice.

    Raises:
        DataError: no object, or one that is damaged or cut short; names the item and the key before it.
    """
    fix = "Fix: get the original file again."
    number, key = 0, ""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_CHUNK)
            found = re.match(r"\s*\{", text)
            if not found:
                raise DataError(f"{path}: no JSON object at its beginning. {fix}")
            for key, value in _items(file, text[found.end() :], _decode_pair):
                number += 1
                yield key, value
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        where = f"item {number + 1} (after {key!r})" if number else "item 1"
        raise DataError(f"{path}, {where}: cannot be read ({error}). {fix}") from error


def _decode_pair(text: str, at: int) -> tuple[tuple[str, Any], int]:
    """Decode `"key": value`."""
    key, end = _decode(text, at)
    colon = _COLON.match(text, end)
    if not isinstance(key, str) or not colon:
        raise json.JSONDecodeError("expected a key and a colon", text, end)
    value, end = _decode(text, colon.end())
    return (key, value), end


def _items(
    file: IO[str], text: str, decode: Callable[[str, int], tuple[Any, int]] = _decode
) -> Iterator[Any]:
    """Yield the items of an array or object that was opened right before `text`; `file` has the rest."""
    skip, follows = re.compile(r"[\s,]*"), re.compile(r"\s*[,\]}]")
    at = 0
    while True:
        if skipped := skip.match(text, at):
            at = skipped.end()
        if text[at : at + 1] in ("]", "}"):
            return
        # An item is whole when a comma or the closing bracket follows: a number at the end may go on.
        try:
            item, end = decode(text, at)
            whole = follows.match(text, end)
        except json.JSONDecodeError:
            whole = None
        if whole:
            yield item
            at = end
            continue
        # Otherwise read more. The amount doubles, so that a huge item costs linear time.
        more = file.read(max(_CHUNK, len(text) - at))
        if not more:
            decode(text, at)  # raises, unless only the comma or bracket is missing
            raise json.JSONDecodeError("no comma or closing bracket follows", text, len(text))
        text, at = text[at:] + more, 0


def _table(path: Path, delimiter: str) -> Iterator[tuple[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            for row in reader:
                yield f"line {reader.line_num}", row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error}). Fix: get the original file again.") from error


_FORMATS: dict[str, tuple[type[_Original], Callable[[Path], Iterator[tuple[str, Any]]]]] = {
    "hotpotqa": (_Hotpot, read_array),
    "2wikimultihopqa": (_Hotpot, read_array),
    "musique": (_Musique, _json_lines),
    "nq": (_NqOpen, _json_lines),
    "triviaqa": (_Trivia, partial(read_array, key="Data")),
    "popqa": (_PopQa, partial(_table, delimiter="\t")),
    "bamboogle": (_Bamboogle, partial(_table, delimiter=",")),
}
"""For each set the form of an item, and what yields the items of a file with their places."""


def convert(name: str, source: str | Path, target: str | Path) -> int:
    """Convert an original release file to FlashRAG rows, in memory that does not grow with the file.

    Args:
        name: The question set.
        source: The original file.
        target: The file to write. Questions without an id in the original get `STEM_NUMBER`, with the
            target's stem ("test.jsonl" gives "test_0").

    Returns:
        The number of questions written.

    Raises:
        DataError: unknown set, an item that is not in the original's form or has no answer, or an existing
            target.
    """
    source, target = Path(source), Path(target)
    if source.exists():
        require_regular(source, kind="original file")
    form, read = _FORMATS[qa_set(name).name]
    if target.exists():
        raise DataError(f"{target} exists already. Fix: delete it or give another target.")
    new = target.with_name(f"{target.name}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            new.open("w", encoding="utf-8") as out,
            ProgressBar(f"Converting {source.name}", None, unit="rows") as count,
        ):
            written = 0
            for number, (where, item) in enumerate(read(source)):
                try:
                    original = form.model_validate(item)
                    answers = list(dict.fromkeys(original.answers()))
                    if not answers:  # it cannot be answered
                        continue
                    row = QaRow(
                        id=original.id if original.id is not None else f"{target.stem}_{number}",
                        question=original.question,
                        golden_answers=answers,
                        metadata=original.metadata(),
                    )
                except ValidationError as error:
                    first = error.errors(include_url=False, include_context=False)[0]
                    field = ".".join(map(str, first["loc"])) or "the item"
                    what = f"{field}: {first['msg']} (got {first['input']!r:.80})"
                    fix = "convert the original release file of this set; one without answers cannot be used"
                    raise DataError(f"{source}, {where}: {what}. Fix: {fix}.") from error
                out.write(json.dumps(row.model_dump(), ensure_ascii=False) + "\n")
                written += 1
                count(1)
        os.replace(new, target)
    except OSError as error:
        raise DataError(f"{target}: cannot write ({error.strerror}). Fix: give another target.") from error
    finally:
        new.unlink(missing_ok=True)
    return written
