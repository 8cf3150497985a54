"""Original release files become FlashRAG rows that the question reader accepts."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from at2po_env.data import convert as conversion
from at2po_env.data import load_qa
from at2po_env.data.convert import convert, read_array
from at2po_env.errors import DataError

HOTPOT = {
    "_id": "5a7a",
    "answer": "Chief of Protocol",
    "question": "What position?",
    "supporting_facts": [["Kiss and Tell", 0], ["Shirley Temple", 1]],
    "context": [["Kiss and Tell", ["A film.", " With her."]], ["Shirley Temple", ["x", "y"]]],
    "type": "bridge",
    "level": "hard",
}
TWO_WIKI = {
    "_id": "8813",
    "type": "compositional",
    "question": "Who is the mother of the director of film Polish-Russian War?",
    "context": [["Polish-Russian War", ["A film."]]],
    "entity_ids": "Q1_Q2",
    "supporting_facts": [["Polish-Russian War (film)", 1], ["Xawery Żuławski", 2]],
    "evidences": [["Polish-Russian War", "director", "Xawery Żuławski"]],
    "answer": "Małgorzata Braunek",
    "evidences_id": [],
    "answer_id": "Q3",
}
MUSIQUE = {
    "id": "2hop__1_2",
    "paragraphs": [{"idx": 0, "title": "Green", "paragraph_text": "An album.", "is_supporting": True}],
    "question": "Who is the spouse of the Green performer?",
    "question_decomposition": [
        {"id": 1, "question": "Green >> performer", "answer": "Steve Hillage", "paragraph_support_idx": 0}
    ],
    "answer": "Miquette Giraudy",
    "answer_aliases": ["M. Giraudy", "Miquette Giraudy"],
    "answerable": True,
}
TRIVIA = {
    "Answer": {
        "Aliases": ["Sinclair Lewis", "Harry Lewis"],
        "NormalizedValue": "x",
        "Value": "Sinclair Lewis",
    },
    "EntityPages": [],
    "Question": "Which American-born Sinclair won the Nobel Prize for Literature in 1930?",
    "QuestionId": "tc_1",
}
POPQA = {
    "id": "4222362",
    "subj": "George Rankin",
    "prop": "occupation",
    "obj": "politician",
    "subj_id": "1850297",
    "s_aliases": '["George James Rankin"]',
    "s_wiki_title": "George Rankin",
    "o_wiki_title": "Politician",
    "s_pop": "142",
    "o_pop": "25692",
    "question": "What is George Rankin's occupation?",
    "possible_answers": '["politician", "political leader"]',
}


def lines(*items: Any) -> str:
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)


def table(path: Path, rows: list[dict[str, str]], delimiter: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def converted(tmp_path: Path, name: str, content: str) -> list[dict[str, Any]]:
    (tmp_path / "original").write_text(content, "utf-8")
    count = convert(name, tmp_path / "original", tmp_path / "out" / "test.jsonl")
    assert len(load_qa(tmp_path / "out/test.jsonl")) == count
    return [json.loads(line) for line in (tmp_path / "out/test.jsonl").read_text("utf-8").splitlines()]


def test_hotpotqa(tmp_path: Path) -> None:
    assert converted(tmp_path, "hotpotqa", json.dumps([HOTPOT])) == [
        {
            "id": "5a7a",
            "question": "What position?",
            "golden_answers": ["Chief of Protocol"],
            "metadata": {
                "type": "bridge",
                "level": "hard",
                "supporting_facts": {"title": ["Kiss and Tell", "Shirley Temple"], "sent_id": [0, 1]},
            },
        }
    ]


def test_2wikimultihopqa(tmp_path: Path) -> None:
    (row,) = converted(tmp_path, "2WikiMultihopQA", json.dumps([TWO_WIKI], indent=1))
    assert (row["id"], row["golden_answers"]) == ("8813", ["Małgorzata Braunek"])
    assert row["metadata"] == {
        "type": "compositional",
        "evidences": [["Polish-Russian War", "director", "Xawery Żuławski"]],
        "supporting_facts": {"title": ["Polish-Russian War (film)", "Xawery Żuławski"], "sent_id": [1, 2]},
    }


def test_musique_keeps_aliases_once_and_drops_unanswerable_questions(tmp_path: Path) -> None:
    (row,) = converted(tmp_path, "musique", lines({**MUSIQUE, "id": "x", "answerable": False}, MUSIQUE))
    assert (row["id"], row["golden_answers"]) == ("2hop__1_2", ["Miquette Giraudy", "M. Giraudy"])
    assert row["metadata"] == {"question_decomposition": MUSIQUE["question_decomposition"]}


def test_nq_open_gets_ids_from_the_name_of_the_target(tmp_path: Path) -> None:
    original = lines(
        {"question": "who wrote it", "answer": ["A", "B"]}, {"question": "when", "answer": ["1"]}
    )
    assert converted(tmp_path, "NaturalQuestions", original) == [
        {"id": "test_0", "question": "who wrote it", "golden_answers": ["A", "B"], "metadata": {}},
        {"id": "test_1", "question": "when", "golden_answers": ["1"], "metadata": {}},
    ]


def test_triviaqa(tmp_path: Path) -> None:
    original = {"Data": [TRIVIA, {**TRIVIA, "QuestionId": "tc_2"}], "Domain": "Web", "Version": 1.0}
    first, second = converted(tmp_path, "triviaqa", json.dumps(original))
    assert (first["id"], first["golden_answers"]) == ("tc_1", ["Sinclair Lewis", "Harry Lewis"])
    assert second["id"] == "tc_2"


def test_popqa(tmp_path: Path) -> None:
    table(tmp_path / "popQA.tsv", [POPQA], "\t")
    (row,) = converted(tmp_path, "popqa", (tmp_path / "popQA.tsv").read_text("utf-8"))
    assert (row["id"], row["golden_answers"]) == ("4222362", ["politician", "political leader"])
    assert row["metadata"] == {
        "subj": "George Rankin",
        "prop": "occupation",
        "obj": "politician",
        "s_wiki_title": "George Rankin",
        "o_wiki_title": "Politician",
        "s_pop": 142,
        "o_pop": 25692,
    }


def test_bamboogle_with_commas_quotes_and_a_byte_order_mark(tmp_path: Path) -> None:
    rows = [{"Question": 'Who said "A, B"?', "Answer": "Ada, Countess of Lovelace"}]
    table(tmp_path / "sheet.csv", rows, ",")
    (row,) = converted(tmp_path, "bamboogle", "\ufeff" + (tmp_path / "sheet.csv").read_text("utf-8"))
    assert (row["question"], row["golden_answers"]) == ('Who said "A, B"?', ["Ada, Countess of Lovelace"])


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        (
            "hotpotqa",
            json.dumps([HOTPOT, {"_id": "test", "question": "q"}]),
            "item 2: answer: Field required",
        ),
        ("hotpotqa", json.dumps([HOTPOT, HOTPOT])[:-90], "item 2: cannot be read"),
        ("hotpotqa", json.dumps([HOTPOT])[:-1], "item 1: cannot be read .*closing bracket"),
        ("hotpotqa", json.dumps({"data": []}), "no JSON array at its beginning"),
        ("hotpotqa", "", "no JSON array"),
        ("triviaqa", json.dumps([TRIVIA]), "no JSON array 'Data'"),
        ("triviaqa", json.dumps({"Data": [{**TRIVIA, "Answer": None}]}), "item 1: Answer: "),
        ("musique", lines(MUSIQUE) + "{", "line 2: "),
        ("musique", "", "line 1: the question file is empty"),
        ("nq", lines({"question": "q", "answer": "a"}), "line 1: answer: "),
        ("nq", lines({"question": "q", "answer": [""]}), "line 1: golden_answers.0: "),
        ("popqa", "id\tquestion\n1\tq\n", "line 2: subj: Field required"),
        ("bamboogle", 'Question,Answer\n"q', "cannot be read"),
    ],
)
def test_what_is_not_the_original_is_an_error_and_leaves_no_target(
    tmp_path: Path, name: str, content: str, what: str
) -> None:
    with pytest.raises(DataError, match=rf"original.*{what}.*Fix: "):
        converted(tmp_path, name, content)
    assert list((tmp_path / "out").iterdir()) == []


def test_existing_target_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text("mine")
    with pytest.raises(DataError, match=r"test.jsonl exists already. Fix: "):
        convert("nq", tmp_path / "original", tmp_path / "test.jsonl")
    assert (tmp_path / "test.jsonl").read_text() == "mine"


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1000])
def test_arrays_are_read_the_same_in_chunks_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    items = [1, -25, 3.5e3, 'a, ]"[ é\\', [], {"b": [None, {"c": "x" * 50}]}, True, 12]
    monkeypatch.setattr(conversion, "_CHUNK", max(chunk, 3))
    for indent in (None, 2):
        (tmp_path / "array.json").write_text(" " + json.dumps(items, indent=indent), "utf-8")
        numbered = [(f"item {number}", item) for number, item in enumerate(items, start=1)]
        assert list(read_array(tmp_path / "array.json")) == numbered
