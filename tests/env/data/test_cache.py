"""Which file is used: a path given, the cache, or the sample with a warning; never the network."""

import socket
from pathlib import Path

import pytest

from at2po_env.data import At2poSampleWarning, Corpus, cache_dir, load_qa, resolve_corpus, resolve_dataset
from at2po_env.data.cache import SAMPLE, beside_or_cached
from at2po_env.data.catalog import QA_SETS, files_of, qa_set
from at2po_env.errors import DataError
from at2po_env.retrieval import open_retriever


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def no_network(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setenv("AT2PO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"id": "0", "question": "q", "golden_answers": ["a"]}\n')
    return path


def test_given_file_is_used_whatever_the_split(tmp_path: Path) -> None:
    path = put(tmp_path / "mine.jsonl")
    assert resolve_dataset("hotpotqa", "no such split", path) == path
    assert resolve_corpus("hotpotqa", path) == path
    assert resolve_dataset("HotpotQA", "dev", str(path)) == path


@pytest.mark.parametrize("inside", ["dev.jsonl", "hotpotqa/dev.jsonl"])
def test_given_folder_holds_the_split(tmp_path: Path, inside: str) -> None:
    path = put(tmp_path / "flashrag" / inside)
    assert resolve_dataset("hotpotqa", "dev", tmp_path / "flashrag") == path
    with pytest.raises(DataError, match=r"has neither train.jsonl nor hotpotqa/train.jsonl. Fix: "):
        resolve_dataset("hotpotqa", "train", tmp_path / "flashrag")


def test_cache_comes_before_the_sample(cache: Path) -> None:
    dataset, corpus = put(cache / "datasets/nq/test.jsonl"), put(cache / "corpora/wiki-18/wiki-18.jsonl")
    assert resolve_dataset("NaturalQuestions", "test") == dataset
    assert resolve_corpus("NaturalQuestions") == resolve_corpus("wiki-18") == corpus


@pytest.mark.parametrize("name", QA_SETS)
def test_sample_stands_in_with_a_warning_that_names_the_command(name: str) -> None:
    with pytest.warns(At2poSampleWarning, match=rf"12 questions .*Fix: `at2po data get {name}`") as caught:
        assert len(load_qa(resolve_dataset(name))) == 12
    assert caught[0].filename == __file__
    with pytest.warns(At2poSampleWarning, match="few passages .*Fix: `at2po data get wiki-18`") as caught:
        assert len(Corpus(resolve_corpus(name))) == 268
    assert caught[0].filename == __file__


def test_default_split_is_train_else_test(cache: Path) -> None:
    train, test = put(cache / "datasets/nq/train.jsonl"), put(cache / "datasets/popqa/test.jsonl")
    assert resolve_dataset("nq") == train
    assert resolve_dataset("popqa") == test


def test_what_does_not_exist_is_an_error_that_says_what_does(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data set 'squad'. Fix: use one of hotpotqa, .*popqa"):
        resolve_dataset("squad")
    with pytest.raises(DataError, match="no data set 'wiki-25'"):
        resolve_corpus("wiki-25")
    with pytest.raises(DataError, match=r"Bamboogle has no split 'train'. Fix: use one of test"):
        resolve_dataset("bamboogle", "train")
    for resolve in (
        lambda path: resolve_dataset("nq", "test", path),
        lambda path: resolve_corpus("nq", path),
    ):
        with pytest.raises(
            DataError, match=r"gone.jsonl: there is no such file. Fix: give (dataset|corpus)="
        ):
            resolve(tmp_path / "gone.jsonl")


def test_cache_folder_is_the_users_unless_the_variable_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AT2PO_CACHE", "~/mine")
    assert cache_dir() == Path.home() / "mine"
    monkeypatch.setenv("AT2PO_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/where")
    assert cache_dir().name == "at2po"


def test_derived_files_lie_beside_writable_data_only(tmp_path: Path, cache: Path) -> None:
    corpus = put(tmp_path / "data" / "corpus.jsonl")
    assert beside_or_cached(corpus, "index") == tmp_path / "data/index"
    corpus.parent.chmod(0o555)
    try:
        assert beside_or_cached(corpus, "index").is_relative_to(cache)
    finally:
        corpus.parent.chmod(0o755)


def test_nothing_is_written_into_the_installed_package() -> None:
    before = sorted(SAMPLE.iterdir())
    with pytest.warns(At2poSampleWarning):
        open_retriever("bm25", resolve_corpus("nq")).search(["everest"], 1)
    assert sorted(SAMPLE.iterdir()) == before


def test_catalog_names_the_published_files() -> None:
    assert [file.target for file in files_of("triviaqa")] == [
        f"datasets/triviaqa/{split}.jsonl" for split in ("train", "dev", "test")
    ]
    assert len(files_of("all")) == 14 + 3 + 2 * 3 + 1
    assert {qa.title for qa in map(qa_set, QA_SETS)} == {
        "HotpotQA", "2WikiMultihopQA", "MuSiQue", "Bamboogle", "NaturalQuestions", "TriviaQA", "PopQA"
    }  # fmt: skip
