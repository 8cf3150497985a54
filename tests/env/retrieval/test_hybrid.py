import pytest

from at2po_env.data.corpus import Passage
from at2po_env.errors import ConfigError, RetrievalError
from at2po_env.retrieval.bm25.retriever import Bm25Retriever
from at2po_env.retrieval.hybrid import HybridRetriever, fuse
from at2po_env.retrieval.opening import open_retriever


def ranking(ids: str) -> list[Passage]:
    return [Passage(i, f"Title {i}", "text", 9.0) for i in ids]


def test_fusion_by_hand() -> None:
    # k = 60. a: 1/61 + 1/63; b: 1/62 + 1/61; c: 1/63; d: 1/62.   b > a > d > c
    fused = fuse([ranking("abc"), ranking("bda")], 4)
    assert "".join(passage.id for passage in fused) == "bade"[:3] + "c"
    assert [passage.score for passage in fused] == pytest.approx(
        [1 / 61 + 1 / 62, 1 / 61 + 1 / 63, 1 / 62, 1 / 63]
    )


def test_ranks_count_from_one_and_not_scores() -> None:
    high = [Passage("a", "Title a", "", 1e9), *ranking("b")]
    assert [p.id for p in fuse([high, ranking("ba")], 2)] == ["a", "b"]  # equal: the first retriever wins
    # A wrong formula that counts ranks from 0 with k = 0 would divide by zero; ours gives 1 for the first.
    assert fuse([ranking("a"), []], 1, k=0)[0].score == 1.0


def test_what_only_one_ranking_has_is_kept_and_topk_cuts() -> None:
    assert [p.id for p in fuse([ranking("ab"), ranking("cd")], 3)] == ["a", "c", "b"]
    assert fuse([[], []], 3) == []


def test_a_hybrid_of_two_settings_over_a_corpus(tmp_path, passages) -> None:
    corpus = tmp_path / "corpus.jsonl"
    rows = [
        f'{{"id": "{i}", "contents": "\\"{n}\\"\\ntext about {n}"}}' for i, n in enumerate(["Ada", "Bob"])
    ]
    corpus.write_text("\n".join(rows) + "\n")
    parts = ["bm25", {"kind": "bm25", "k1": 1.5}]
    hybrid = open_retriever("hybrid", corpus, parts=parts)
    assert isinstance(hybrid, HybridRetriever)
    found = hybrid.search(["bob", "ada bob text", "zzz"], 2)
    assert [[p.title for p in row] for row in found] == [["Bob"], ["Ada", "Bob"], []]
    assert found[0][0].score == pytest.approx(2 / 61)
    assert hybrid.digest != open_retriever("hybrid", corpus, parts=parts, k=10).digest
    assert open_retriever("hybrid", corpus, parts=parts) is hybrid
    direct = Bm25Retriever.from_passages(passages)
    assert HybridRetriever(None, parts=(direct, direct)).search(["enigma"], 1)[0][0].id == "3"


@pytest.mark.parametrize("settings", [{"parts": ["bm25"]}, {"k": -1}, {"depth": 0}])
def test_wrong_settings_are_refused(settings) -> None:
    with pytest.raises(ConfigError):
        HybridRetriever("corpus", **settings)


def test_an_unknown_kind_names_the_known_ones() -> None:
    with pytest.raises(RetrievalError, match="bm25, dense, http, hybrid, lucene"):
        open_retriever("elastic", "corpus")
    with pytest.raises(RetrievalError, match="needs a corpus"):
        open_retriever("bm25")
