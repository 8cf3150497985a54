r"""Writes and reads the `/retrieve` messages of Search-R1's server and its kin.

    POST /retrieve {"queries": ["..."], "topk": 3, "return_scores": true}
    -> {"result": [[{"document": {"id": "0", "contents": "\"Title\"\ntext"}, "score": 1.5}, ...], ...]}

With `return_scores` false (the default) the documents stand bare: {"result": [[{"id", "contents"}, ...]]}.
Instead of `queries` one `query` may be given, as by the clients of T2PO, SkyRL and verl-agent; the answer
then has one list of documents.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import to_json

from at2po_env.data.corpus import Passage, split_contents

DIGEST_HEADER = "X-At2po-Digest"  # of the retriever that answered; keys a client's cache
DEFAULT_TOPK = 3
LARGEST_SCORE = sys.float_info.max
Form = Literal["queries", "query"]


class RetrieveRequest(BaseModel):
    """The body of a request; unknown keys are ignored, because other clients send some."""

    model_config = ConfigDict(extra="ignore", strict=True)

    queries: list[str] | None = None
    query: str | None = None
    topk: int | None = Field(default=None, ge=1)
    return_scores: bool = False

    @model_validator(mode="after")
    def _either(self) -> "RetrieveRequest":
        if (self.queries is None) == (self.query is None):
            raise ValueError('give either "queries", a list of strings, or "query", one string')
        return self

    @property
    def texts(self) -> list[str]:
        """The queries, whichever way they were given."""
        return self.queries if self.queries is not None else [self.query or ""]


class WireError(ValueError):
    """An answer does not have the form that it should have."""


class NotJsonError(WireError):
    """An answer is not JSON at all: usually a proxy's page, or an answer cut short. Worth another try."""


def request_body(queries: Sequence[str], topk: int, form: Form = "queries") -> bytes:
    """Write a request; lone surrogates, which JSON in UTF-8 cannot hold, become '?'."""
    texts = [query if query.isascii() else query.encode("utf-8", "replace").decode() for query in queries]
    body: dict[str, Any] = {"queries": texts} if form == "queries" else {"query": texts[0]}
    return to_json({**body, "topk": topk, "return_scores": True})


def response_body(results: Sequence[Sequence[Passage]], *, return_scores: bool) -> bytes:
    """Write an answer in the form that the request asked for."""
    rows: list[list[dict[str, Any]]] = []
    for found in results:
        documents = [{"id": p.id, "contents": p.contents} for p in found]
        if return_scores:
            scored = zip(documents, found, strict=True)
            rows.append([{"document": document, "score": float(p.score)} for document, p in scored])
        else:
            rows.append([*documents])
    return to_json({"result": rows})


def read_response(body: bytes, *, queries: int, topk: int) -> list[list[Passage]]:
    """Read an answer of either form.

    Args:
        body: The answer.
        queries: How many lists it must have.
        topk: How many passages of each are kept.

    Raises:
        NotJsonError: it is not JSON.
        WireError: it is not of that form.
    """
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise NotJsonError(f"the answer is not JSON: {body[:80]!r}") from error
    rows = answer.get("result") if isinstance(answer, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise WireError(f'the answer has no "result" with a list per query: {body[:80]!r}')
    if len(rows) != queries:
        raise WireError(f"the answer has {len(rows)} lists of passages for {queries} queries")
    return [[_passage(item) for item in row[:topk]] for row in rows]


def _passage(item: object) -> Passage:
    document = item.get("document", item) if isinstance(item, dict) else item
    if not isinstance(item, dict) or not isinstance(document, dict):
        raise WireError(f"a document is not an object: {item!r:.80}")
    contents, score = document.get("contents"), item.get("score", 0.0)
    if not isinstance(contents, str):
        raise WireError(f'a document has no text "contents": {document!r:.80}')
    if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) <= LARGEST_SCORE:
        raise WireError(f"a score is not a finite number: {score!r:.80}")
    title, text = split_contents(contents)
    return Passage(str(document.get("id", "")), title or "", text, float(score))
