"""Build any index of a corpus: `build_index`, what `at2po index` calls.

Every build streams the corpus, shows its progress, works in bounded memory, and goes on where it was killed
("bm25", which takes about a minute per million passages, starts over). The finished folder holds a
manifest with the corpus digest and the settings, which every opening checks.
"""

from pathlib import Path

from at2po_env.data.corpus import Corpus
from at2po_env.errors import ConfigError

KINDS = ("bm25", "lucene", "flat", "ivf", "hnsw", "ivfpq")


def build_index(  # noqa: PLR0913 - keyword-only settings of the kinds
    corpus: str | Path,
    kind: str,
    *,
    out: str | Path | None = None,
    encoder: str = "e5",
    device: str | None = None,
    tokens: str = "english",
    k1: float = 0.9,
    b: float = 0.4,
) -> Path:
    """Build an index of `corpus` unless it is there.

    Args:
        corpus: JSON lines in wiki-18 form.
        kind: One of `KINDS`; those after "lucene" are dense.
        out: Folder of the index; default: beside the corpus, where retrievers look for it ("bm25" always).
        encoder: Of a dense index; see `encoders.encoder_spec`.
        device: Where the encoder runs.
        tokens: Of a Lucene index; see `lucene.LuceneRetriever`.
        k1: Of a BM25 index; Lucene takes it when searching.
        b: Likewise.

    Returns:
        The folder of the index.

    Raises:
        ConfigError: unknown kind.
        DataError: the corpus is unreadable or has a bad line.
        RetrievalError: another index is in the way, or there is no room.
        MissingExtraError: the kind needs an extra that is not installed.
    """
    home = None if out is None else Path(out)
    if kind == "bm25":
        return _bm25(corpus, home, k1, b)
    if kind == "lucene":
        from at2po_env.retrieval import lucene

        return lucene.build(Corpus(corpus), tokens, home)
    if kind not in KINDS:
        raise ConfigError(f"There is no kind of index {kind!r}. Fix: use one of {', '.join(KINDS)}.")
    from at2po_env.retrieval import dense
    from at2po_env.retrieval.encoders import SentenceEncoder

    return dense.build(Corpus(corpus), SentenceEncoder(encoder, device=device), kind, home)


def _bm25(corpus: str | Path, home: Path | None, k1: float, b: float) -> Path:
    from at2po_env.retrieval.bm25 import Bm25Retriever
    from at2po_env.retrieval.bm25_build import Settings
    from at2po_env.retrieval.bm25_index import index_home
    from at2po_env.retrieval.tokens import STOP_WORDS

    if home is not None:
        raise ConfigError("a bm25 index lies beside its corpus, or in the cache. Fix: leave --out away.")
    Bm25Retriever(corpus, k1=k1, b=b)
    return index_home(Corpus(corpus), Settings(float(k1), float(b), STOP_WORDS))
