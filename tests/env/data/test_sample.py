"""The shipped sample answers its own questions."""

import re

import pytest

from at2po_env.data import Corpus, Task, load_qa
from at2po_env.data.cache import SAMPLE
from at2po_env.data.catalog import QA_SETS
from at2po_env.retrieval import Bm25Retriever, Passage


@pytest.fixture(scope="module")
def passages() -> list[Passage]:
    return list(Corpus(SAMPLE / "corpus.jsonl"))


@pytest.fixture(scope="module")
def retriever(passages: list[Passage]) -> Bm25Retriever:
    return Bm25Retriever.from_passages(passages)


def questions() -> list[Task]:
    return [task for name in QA_SETS for task in load_qa(SAMPLE / f"{name}.jsonl")]


def test_every_data_set_has_twelve_questions_and_all_ids_differ() -> None:
    assert {name: len(load_qa(SAMPLE / f"{name}.jsonl")) for name in QA_SETS} == dict.fromkeys(QA_SETS, 12)
    assert len({task.id for task in questions()}) == 84


def test_corpus_has_at_least_200_short_passages_with_different_titles(passages: list[Passage]) -> None:
    assert len(passages) >= 200
    assert len({passage.title for passage in passages}) == len(passages)
    assert [passage.id for passage in passages] == [str(row) for row in range(len(passages))]
    assert max(len(passage.text) for passage in passages) < 400


@pytest.mark.parametrize("task", questions(), ids=lambda task: task.id)
def test_supporting_passages_exist_and_hold_an_answer(task: Task, passages: list[Passage]) -> None:
    titles = task.metadata["supporting_titles"]
    support = [f"{passage.title} {passage.text}" for passage in passages if passage.title in titles]
    assert len(support) == len(titles)
    if {"yes", "no"}.isdisjoint(task.golden_answers):
        answers = "|".join(re.escape(answer) for answer in task.golden_answers)
        assert re.search(rf"(?<!\w)({answers})(?!\w)", " ".join(support), re.IGNORECASE)


@pytest.mark.parametrize("task", questions(), ids=lambda task: task.id)
def test_searching_a_supporting_title_finds_it(task: Task, retriever: Bm25Retriever) -> None:
    titles = task.metadata["supporting_titles"]
    for title, found in zip(titles, retriever.search(titles, 3), strict=True):
        assert title in [passage.title for passage in found]


@pytest.mark.parametrize("name", ["hotpotqa", "2wikimultihopqa", "musique", "bamboogle"])
def test_multi_hop_questions_need_more_than_one_passage(name: str) -> None:
    for task in load_qa(SAMPLE / f"{name}.jsonl"):
        assert task.metadata["hops"] >= 2
        assert len(task.metadata["supporting_titles"]) == task.metadata["hops"]


@pytest.mark.parametrize("name", ["hotpotqa", "2wikimultihopqa"])
def test_supporting_facts_name_sentences_of_supporting_passages(name: str) -> None:
    for task in load_qa(SAMPLE / f"{name}.jsonl"):
        facts = task.metadata["supporting_facts"]
        assert list(dict.fromkeys(facts["title"])) == task.metadata["supporting_titles"]
        assert len(facts["sent_id"]) == len(facts["title"])
