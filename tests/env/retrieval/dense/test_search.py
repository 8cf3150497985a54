import numpy as np
import pytest

pytest.importorskip("faiss", reason="needs the extra 'dense'")

from at2po_env.retrieval.dense import search as module
from at2po_env.retrieval.dense.search import FlatSearch


def reference(matrix: np.ndarray, queries: np.ndarray, topk: int) -> np.ndarray:
    return np.argsort(-(queries.astype(np.float64) @ matrix.T.astype(np.float64)), axis=1, kind="stable")[
        :, :topk
    ]


@pytest.mark.parametrize("rows", [1, 2, 7, 1000])
@pytest.mark.parametrize("queries", [1, 3, 24, 25, 40])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_path_finds_the_exact_best(
    rows: int, queries: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", 4 * 16 * 64)  # several blocks of 64 rows
    rng = np.random.default_rng(rows + queries)
    matrix = rng.standard_normal((rows, 16)).astype(np.float32)
    asked = rng.standard_normal((queries, 16)).astype(np.float32)
    scores, found = FlatSearch(matrix, threads=threads).search(asked, 5)
    assert found.tolist() == reference(matrix, asked, 5).tolist()
    np.testing.assert_allclose(scores, np.take_along_axis(asked @ matrix.T, found, 1), atol=1e-5)


def test_equal_scores_among_the_best_rank_by_row() -> None:
    matrix = np.array([[1.0], [5.0], [0.0], [5.0], [5.0], [2.0]], np.float32).repeat(8, axis=1)
    for queries in (1, 30):
        _, found = FlatSearch(matrix, threads=1).search(np.ones((queries, 8), np.float32), 4)
        assert found.tolist() == [[1, 3, 4, 5]] * queries


def test_a_matrix_at_an_odd_address_is_searched_too() -> None:
    data = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
    buffer = bytearray(45) + data.tobytes()
    odd = np.frombuffer(buffer, np.float32, offset=45).reshape(300, 8)
    for queries in (1, 30):
        asked = data[:queries]
        assert FlatSearch(odd).search(asked, 4)[1].tolist() == reference(data, asked, 4).tolist()
