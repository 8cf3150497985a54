"""BM25: right scores, a stable order, any query, and an index on disk that is checked."""

import copy
import json
import math
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import bm25s
import numpy as np
import pytest
from helpers.paths import REAL_DATA
from hypothesis import given
from hypothesis import strategies as st

from at2po_env.data import Corpus
from at2po_env.errors import DataError, RetrievalError
from at2po_env.retrieval import Bm25Retriever, Passage, Retriever, open_retriever
from at2po_env.retrieval.bm25 import build as bm25_build
from at2po_env.retrieval.bm25 import rank as bm25_rank
from at2po_env.retrieval.bm25 import retriever as bm25_retriever
from at2po_env.retrieval.tokens import STOP_WORDS, tokenize

REAL_CORPUS = REAL_DATA / "corpus" / "wiki_hotpotqa_musique.jsonl"
REAL_QUESTIONS = REAL_DATA / "qa/hotpotqa/train.jsonl"
needs_real_data = pytest.mark.skipif(not REAL_CORPUS.exists(), reason="the real corpus is not here")

ANIMALS = (
    Passage("a", "Cat", "cat sat cat"),
    Passage("b", "Dog", "dog sat"),
    Passage("c", "Cow", "a cow ate grass and grass and grass"),
    Passage("d", "Twin", "dog sat"),
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AT2PO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "data" / "corpus.jsonl", ANIMALS)


def write_corpus(path: Path, passages: tuple[Passage, ...]) -> Path:
    path.parent.mkdir(exist_ok=True)
    rows = [{"id": p.id, "contents": f'"{p.title}"\n{p.text}'} for p in passages]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def index_of(corpus: Path) -> Path:
    (folder,) = corpus.parent.glob(f"{corpus.name}.bm25-*")
    return folder


def test_scores_are_lucenes_bm25() -> None:
    # Lengths with titles, without stop words: 4, 3, 6, 3; mean 4. "cat" occurs 3 times in passage 0 only:
    # idf = ln(1 + (4 - 1 + 0.5) / (1 + 0.5)); norm = 0.9 * (1 - 0.4 + 0.4 * 4 / 4) = 0.9; tf 3 / (3 + 0.9).
    ((found,),) = Bm25Retriever.from_passages(ANIMALS).search(["CAT!"], 3)
    assert found[:3] == ANIMALS[0][:3]
    assert found.score == pytest.approx(math.log(1 + 3.5 / 1.5) * 3 / 3.9, rel=1e-6)
    # Negative control: the BM25 of the textbook, with a factor k1 + 1, would give 1.9 times that.
    assert found.score != pytest.approx(math.log(1 + 3.5 / 1.5) * 1.9 * 3 / 3.9, rel=1e-2)


def test_equal_scores_rank_by_row() -> None:
    same = [Passage(str(row), "", "tie") for row in range(500)]
    (found,) = Bm25Retriever.from_passages([*same, ANIMALS[0]]).search(["tie cat"], 4)
    assert [passage.id for passage in found] == ["a", "0", "1", "2"]


def test_order_of_terms_does_not_matter_and_repetition_counts() -> None:
    retriever = Bm25Retriever.from_passages(ANIMALS)
    one, other, twice = retriever.search(["dog sat cat", "cat sat dog", "cat dog cat"], 4)
    assert one == other
    assert twice[0].id == "a"
    assert twice[0].score == pytest.approx(2 * retriever.search(["cat"], 1)[0][0].score)


def test_batch_equals_single_searches_and_answers_each_duplicate() -> None:
    retriever = Bm25Retriever.from_passages(ANIMALS)
    queries = ["cat", "nothing known", "grass", "cat"]
    assert retriever.search(queries, 2) == [retriever.search([query], 2)[0] for query in queries]
    assert retriever.search([], 3) == []


@pytest.mark.parametrize(
    "query",
    ["", " ", "the of and", "\x00", "cat\x00dog", "\ud800", "x" * 2**20, "cat " * 2**18, "!?", "ÅßΣ", "🐈"],
)
def test_odd_queries_give_a_list(query: str) -> None:
    (found,) = Bm25Retriever.from_passages(ANIMALS).search([query], 3)
    assert [passage.id for passage in found][:1] in ([], ["a"])


@given(st.text(), st.integers(1, 9))
def test_any_text_gives_at_most_topk_ranked_passages(query: str, topk: int) -> None:
    (found,) = RETRIEVER.search([query], topk)
    assert len(found) <= topk
    ranks = [(-passage.score, passage.id) for passage in found]
    assert ranks == sorted(ranks)
    assert all(passage.score > 0 for passage in found)


RETRIEVER = Bm25Retriever.from_passages(ANIMALS)


def test_stop_words_can_be_kept() -> None:
    band = [Passage("0", "The The", "a band"), ANIMALS[0]]
    assert Bm25Retriever.from_passages(band).search(["the the"], 3) == [[]]
    (found,) = Bm25Retriever.from_passages(band, stop_words=()).search(["the the"], 3)
    assert [passage.id for passage in found] == ["0"]


def test_searching_needs_a_list_and_a_positive_topk() -> None:
    for queries, topk in (("cat", 3), (["cat"], 0)):
        with pytest.raises(RetrievalError, match="list of queries and topk >= 1"):
            RETRIEVER.search(queries, topk)


@pytest.mark.parametrize("setting", [{"k1": -1.0}, {"b": 1.5}, {"k1": math.nan}])
def test_impossible_settings_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(RetrievalError, match="k1 >= 0 and b in"):
        Bm25Retriever.from_passages(ANIMALS, **setting)


@pytest.mark.parametrize("passages", [(), (Passage("0", "", "the"),)])
def test_nothing_to_find(passages: tuple[Passage, ...]) -> None:
    assert Bm25Retriever.from_passages(passages).search(["cat", "the"], 3) == [[], []]


# ---- the index on disk


def test_index_lies_beside_the_corpus_with_its_digest_in_the_name(corpus: Path) -> None:
    retriever = Bm25Retriever(corpus)
    assert retriever.search(["dog sat"], 3) == RETRIEVER.search(["dog sat"], 3)
    assert index_of(corpus).name.startswith(f"corpus.jsonl.bm25-{Corpus(corpus).digest[:16]}-")
    assert not list(corpus.parent.glob("*.tmp"))


def test_second_opening_reads_the_index_instead_of_building(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Bm25Retriever(corpus)
    monkeypatch.setattr(bm25_retriever, "build", None)
    assert Bm25Retriever(corpus).search(["cat"], 3) == first.search(["cat"], 3)


def test_read_only_corpus_folder_sends_the_index_to_the_cache(corpus: Path, tmp_path: Path) -> None:
    corpus.parent.chmod(0o555)
    try:
        Bm25Retriever(corpus)
        assert [path.name for path in corpus.parent.iterdir()] == ["corpus.jsonl"]
    finally:
        corpus.parent.chmod(0o755)
    assert len(list((tmp_path / "cache/indexes").glob("*/corpus.jsonl.bm25-*"))) == 1


def test_other_settings_and_other_contents_get_their_own_index(corpus: Path) -> None:
    digests = {Bm25Retriever(corpus).digest, Bm25Retriever(corpus, k1=1.5, b=0.75).digest}
    write_corpus(corpus, ANIMALS[:2])
    digests.add(Bm25Retriever(corpus).digest)
    assert len(digests) == 3
    assert len(list(corpus.parent.glob("corpus.jsonl.bm25-*"))) == 3


def test_mapped_index_gives_the_same_results(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bm25_retriever, "IN_MEMORY_BYTES", 0)
    assert Bm25Retriever(corpus).search(["dog sat", "grass"], 3) == RETRIEVER.search(["dog sat", "grass"], 3)


def test_many_small_blocks_give_the_same_index(monkeypatch: pytest.MonkeyPatch, corpus: Path) -> None:
    monkeypatch.setattr(bm25_build, "BLOCK_TERMS", 5)
    queries = ["dog sat", "grass cow", "cat"]
    assert Bm25Retriever(corpus).search(queries, 3) == RETRIEVER.search(queries, 3)


@pytest.mark.parametrize("name", [*bm25_retriever.FILES, "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_damaged_index_is_one_clear_error_and_stays_as_it_is(corpus: Path, name: str, damage: str) -> None:
    Bm25Retriever(corpus)
    path = index_of(corpus) / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] if damage == "cut" else bytes([content[0] ^ 1]) + content[1:])
    if damage == "gone":
        path.unlink()
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    with pytest.raises(RetrievalError, match="Fix: delete that folder") as error:
        Bm25Retriever(corpus)
    assert str(path) in str(error.value)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


def test_index_of_another_corpus_is_refused(corpus: Path, tmp_path: Path) -> None:
    Bm25Retriever(corpus)
    other = write_corpus(tmp_path / "other.jsonl", ANIMALS[:2])
    with pytest.raises(RetrievalError, match="was built from another corpus") as error:
        Bm25Retriever(other, index=index_of(corpus))
    assert str(index_of(corpus)) in str(error.value)
    assert "Fix: " in str(error.value)


def test_index_with_other_settings_is_refused(corpus: Path) -> None:
    Bm25Retriever(corpus)
    with pytest.raises(RetrievalError, match=r"built with other settings: k1 0.9 \(wanted 1.5\)"):
        Bm25Retriever(corpus, k1=1.5, index=index_of(corpus))


def test_failed_build_leaves_nothing_behind(corpus: Path) -> None:
    with corpus.open("a") as file:
        file.write("not json\n")
    with pytest.raises(DataError, match=r"corpus.jsonl, line 5: "):
        Bm25Retriever(corpus)
    assert [path for path in corpus.parent.iterdir() if not path.name.endswith(".lock")] == [corpus]


def test_full_disk_is_one_clear_error(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    with pytest.raises(RetrievalError, match=r"No space left on device.*Fix: make room"):
        Bm25Retriever(corpus)


def test_corpus_cut_short_while_open_is_one_clear_error(corpus: Path) -> None:
    retriever = Bm25Retriever(corpus)
    corpus.write_bytes(corpus.read_bytes()[:10])
    with pytest.raises(RetrievalError, match="damaged while in use"):
        retriever.search(["grass"], 3)
    assert retriever.search(["nothing known"], 3) == [[]]


def test_processes_that_open_at_once_build_one_index(corpus: Path) -> None:
    script = textwrap.dedent(f"""
        from at2po_env.retrieval import Bm25Retriever
        print(Bm25Retriever({str(corpus)!r}).search(["grass"], 1)[0][0].id)
    """)
    both = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) for _ in range(2)]
    assert [process.communicate(timeout=60)[0] for process in both] == [b"c\n", b"c\n"]
    assert index_of(corpus).is_dir()


# ---- sharing


def test_unchanged_corpus_is_opened_once_per_process(corpus: Path) -> None:
    first = open_retriever("bm25", corpus)
    assert isinstance(first, Retriever)
    assert open_retriever("bm25", str(corpus)) is first
    assert open_retriever("bm25", corpus, k1=1.2) is not first
    assert open_retriever(first, "whatever") is first
    write_corpus(corpus, ANIMALS[:1])
    assert open_retriever("bm25", corpus).search(["dog"], 3) == [[]]


def test_unknown_kind_or_setting_is_refused(corpus: Path) -> None:
    with pytest.raises(RetrievalError, match=r"no retriever 'bm52'.*bm25"):
        open_retriever("bm52", corpus)
    with pytest.raises(RetrievalError, match=r"does not take these settings.*k2"):
        open_retriever("bm25", corpus, k2=1.0)
    with pytest.raises(DataError, match=r"gone.jsonl"):
        open_retriever("bm25", corpus.with_name("gone.jsonl"))


def test_copies_share_and_pickles_reopen(corpus: Path) -> None:
    for retriever in (Bm25Retriever(corpus, k1=1.2), Bm25Retriever.from_passages(ANIMALS, b=0.1)):
        assert copy.deepcopy(retriever) is retriever
        again = pickle.loads(pickle.dumps(retriever))
        assert again.digest == retriever.digest
        assert again.search(["cat sat"], 2) == retriever.search(["cat sat"], 2)


@needs_real_data
def test_threads_get_what_single_searches_get() -> None:
    retriever = Bm25Retriever(REAL_CORPUS)
    queries = [json.loads(line)["question"] for line in REAL_QUESTIONS.read_text("utf-8").splitlines()]
    expected = retriever.search(queries, 3)
    wrong: list[str] = []

    def search(shift: int) -> None:
        for at in range(len(queries)):
            row = (at + shift * 13) % len(queries)
            if retriever.search([queries[row]], 3) != [expected[row]]:
                wrong.append(queries[row])

    threads = [threading.Thread(target=search, args=(shift,)) for shift in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ---- the real corpus


@needs_real_data
def test_scores_equal_those_of_bm25s_on_the_real_corpus() -> None:
    passages = list(Corpus(REAL_CORPUS))
    reference = bm25s.BM25(method="lucene", k1=0.9, b=0.4)
    tokens = [[term.lower() for term in tokenize(f"{p.title} {p.text}")] for p in passages]
    reference.index(tokens, show_progress=False)
    retriever = Bm25Retriever(REAL_CORPUS)
    for line in REAL_QUESTIONS.read_text("utf-8").splitlines()[:30]:
        question = json.loads(line)["question"]
        scores = reference.get_scores(tokenize(question))
        best = np.sort(scores)[::-1][:10]
        (found,) = retriever.search([question], 10)
        assert [passage.score for passage in found] == pytest.approx(best, rel=1e-5)
        rows = [int(passage.id) for passage in found]
        assert scores[rows] == pytest.approx(best, rel=1e-5)


@needs_real_data
@pytest.mark.parametrize("topk", [1, 3, 100])
def test_pruning_changes_no_bit(topk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    retriever = Bm25Retriever(REAL_CORPUS)
    queries = [json.loads(line)["question"] for line in REAL_QUESTIONS.read_text("utf-8").splitlines()]
    exhaustive = retriever.search(queries, topk)
    looked_up: list[object] = []
    look_up = bm25_rank.Ranker._look_up
    monkeypatch.setattr(bm25_rank.Ranker, "_look_up", lambda *a: (looked_up.append(a), look_up(*a))[1])
    monkeypatch.setattr(bm25_rank, "PRUNE_FROM", 0)
    assert retriever.search(queries, topk) == exhaustive
    assert looked_up


@given(st.lists(st.lists(st.sampled_from("abcdefg"), max_size=6), min_size=1, max_size=40), st.data())
def test_pruning_keeps_ties(texts: list[list[str]], data: st.DataObject) -> None:
    retriever = Bm25Retriever.from_passages(
        [Passage(str(row), "", " ".join(words)) for row, words in enumerate(texts)], stop_words=()
    )
    query = " ".join(data.draw(st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=9)))
    expected = retriever.search([query], 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bm25_rank, "PRUNE_FROM", 0)
        assert retriever.search([query], 2) == expected


@needs_real_data
def test_top_3_of_the_real_corpus_holds_the_supporting_titles() -> None:
    retriever = Bm25Retriever(REAL_CORPUS)
    rows = [json.loads(line) for line in REAL_QUESTIONS.read_text("utf-8").splitlines()]
    titles = [title for row in rows for title in dict.fromkeys(row["metadata"]["supporting_facts"]["title"])]
    found = retriever.search(titles, 3)
    hits = sum(title in [p.title for p in top] for title, top in zip(titles, found, strict=True))
    # Two titles lose to passages whose title contains theirs ("The Dandy Warhols", "Chiang Kai-shek").
    assert (hits, len(titles)) == (198, 200)


def test_tokens_are_lower_case_letters_and_digits_without_stop_words() -> None:
    assert tokenize("The U.S.A.'s 2nd_try: Ångström & Ærø, naïve") == [
        "u", "s", "s", "2nd", "try", "ångström", "ærø", "naïve"
    ]  # fmt: skip
    assert len(STOP_WORDS) == 33
