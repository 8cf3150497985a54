"""Request bodies in, response bodies out: limits and batching of a retrieval server."""

import hmac

from pydantic import ValidationError

from at2po_env.errors import RetrievalError
from at2po_env.retrieval.base import Retriever
from at2po_env.retrieval.messages import DEFAULT_TOPK, RetrieveRequest, response_body
from at2po_env.retrieval.server.batching import DynamicBatcher, OverloadedError
from at2po_env.retrieval.server.config import ServerConfig
from at2po_env.retrieval.server.metrics import ServerMetrics


class RefusedError(Exception):
    """A request that is answered with an error status."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


class RetrievalService:
    """Takes request bodies and gives response bodies; raises `RefusedError` for everything else."""

    def __init__(self, retriever: Retriever, settings: ServerConfig) -> None:
        self.retriever, self.settings = retriever, settings
        self.metrics = ServerMetrics()
        self.batcher = DynamicBatcher(
            retriever,
            max_batch=settings.max_batch,
            max_wait_s=settings.max_wait_ms / 1000,
            max_waiting=settings.max_waiting,
            workers=settings.workers,
            on_batch=self.metrics.on_batch,
        )
        self.metrics.waiting.set_function(lambda: self.batcher.waiting)
        self._token = settings.token.get_secret_value().encode() if settings.token else None

    def authorize(self, header: str | None) -> None:
        """Refuse a request without the token, in time that does not depend on where it differs."""
        if self._token is None:
            return
        scheme, _, given = (header or "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._token):
            raise RefusedError(401, "this server needs its token: Authorization: Bearer TOKEN")

    async def retrieve(self, body: bytes | bytearray) -> bytes:
        """Answer one request.

        Raises:
            RefusedError: the request is malformed or beyond a limit, or the server cannot answer it.
        """
        request = self._parse(body)
        topk = request.topk or DEFAULT_TOPK
        try:
            found = await self.batcher.search(request.texts, topk)
        except OverloadedError as error:
            raise RefusedError(503, f"overloaded: {error}") from error
        except RetrievalError as error:
            raise RefusedError(500, str(error)) from error
        return response_body(found, return_scores=request.return_scores)

    def _parse(self, body: bytes | bytearray) -> RetrieveRequest:
        try:
            request = RetrieveRequest.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise RefusedError(422, f"{where + ': ' if where else ''}{first['msg']}") from error
        limits, texts = self.settings, request.texts
        if len(texts) > limits.max_queries:
            raise RefusedError(422, f"{len(texts)} queries, at most {limits.max_queries} are taken at once")
        longest = max(map(len, texts), default=0)
        if longest > limits.max_query_chars:
            raise RefusedError(
                422, f"a query of {longest} characters, at most {limits.max_query_chars} are taken"
            )
        if (request.topk or 0) > limits.max_topk:
            raise RefusedError(422, f"topk {request.topk}, at most {limits.max_topk} are given")
        return request
