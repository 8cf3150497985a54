"""`POST /retrieve` as a bare ASGI application: a framework's handling costs more than a search."""

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from pydantic_core import to_json

from at2po_env.retrieval.messages import DIGEST_HEADER
from at2po_env.retrieval.server.service import RefusedError, RetrievalService

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

_JSON = (b"content-type", b"application/json")
_DIGEST = DIGEST_HEADER.lower().encode()


class RetrieveEndpoint:
    """Answers requests in bounded time; limits, token and metrics are those of the service."""

    def __init__(self, service: RetrievalService) -> None:
        self._service, self._settings = service, service.settings

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        start = time.perf_counter()
        headers: Headers = [_JSON]
        try:
            body = await self._answer(scope["headers"], receive)
            headers.append((_DIGEST, self._service.retriever.digest.encode()))
            status = 200
        except RefusedError as refused:
            status, body = refused.status, to_json({"detail": refused.detail})
            if status == 503:
                headers.append((b"retry-after", b"1"))
        headers.append((b"content-length", b"%d" % len(body)))
        self._service.metrics.answered(status, time.perf_counter() - start)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, headers: Headers, receive: Receive) -> bytes:
        body, limit = None, self._settings.timeout_s
        given = dict(headers)
        self._service.authorize(given.get(b"authorization", b"").decode("latin-1"))
        try:
            async with asyncio.timeout(limit):
                body = await self._body(given.get(b"content-length", b"0"), receive)
                return await self._service.retrieve(body)
        except TimeoutError as error:
            if body is None:
                raise RefusedError(408, f"the body did not arrive within {limit:g} s") from error
            raise RefusedError(504, f"no result within {limit:g} s") from error

    async def _body(self, declared: bytes, receive: Receive) -> bytearray:
        """Read a body of bounded size."""
        largest = self._settings.max_body_bytes
        too_large = f"the body is larger than {largest} bytes"
        if not declared.isdigit() or int(declared) > largest:
            raise RefusedError(413, too_large)
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise RefusedError(400, "the client went away")
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > largest:
                raise RefusedError(413, too_large)
        return body
