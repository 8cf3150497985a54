"""Builds any index of a corpus and verifies it, for `at2po index`.

Every build streams the corpus, shows its progress, works in bounded memory, and goes on where it was killed.
The finished folder holds a manifest with the corpus digest and the settings, which every opening checks.
"""

from pathlib import Path

from at2po_env.data.corpus import Corpus
from at2po_env.errors import ConfigError, RetrievalError
from at2po_env.retrieval.manifest import FIX, Manifest, verify

KINDS = ("bm25", "lucene", "flat", "ivf", "hnsw", "ivfpq")


def build_index(
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
        out: Folder of the index; default: beside the corpus, where retrievers look for it.
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
        from at2po_env.retrieval.bm25 import retriever as bm25

        return bm25.build_index(Corpus(corpus), bm25.bm25_config(k1, b), home)
    if kind == "lucene":
        from at2po_env.retrieval.lucene import retriever as lucene

        return lucene.build(Corpus(corpus), tokens, home)
    if kind not in KINDS:
        raise ConfigError(f"There is no kind of index {kind!r}. Fix: use one of {', '.join(KINDS)}.")
    from at2po_env.retrieval.dense.build import build
    from at2po_env.retrieval.dense.encoders import SentenceEncoder

    return build(Corpus(corpus), SentenceEncoder(encoder, device=device), kind, home)


def verify_index(folder: str | Path, corpus: str | Path | None = None) -> Manifest:
    """Read an index whole and compare all of it with its checksums; opening does so only for files to 256 MB.

    Args:
        folder: What `build_index` returned.
        corpus: Also check that the index was built from this corpus.

    Returns:
        The manifest.

    Raises:
        RetrievalError: the index is damaged, or of another corpus.
        DataError: the corpus is unreadable.
    """
    found = verify(Path(folder))
    if corpus is not None and found.corpus_digest != Corpus(corpus).digest:
        raise RetrievalError(f"{folder} is whole, but was built from another corpus than {corpus}. {FIX}")
    return found
