"""Gets one generation from a served model: tries, pauses, deadlines, and answers to refusals.

All of it runs in one event loop. The key is read from the environment, sent as a header, and never shown.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
import tenacity

from at2po_agent.policies.openai.errors import (
    BadRequestError,
    ContextError,
    ParameterError,
    PassingError,
    RequestFailedError,
    UnknownModelError,
    refusal,
)
from at2po_agent.policies.openai.messages import (
    ENDPOINTS,
    Answer,
    Endpoint,
    read_answer,
    read_usage,
)
from at2po_agent.policies.openai.stats import ServedStats
from at2po_env.errors import ConfigError, PolicyError

MAX_PAUSE_S = 20.0


@dataclass(frozen=True)
class Server:
    """A server and how patient its client is.

    Attributes:
        url: Its address up to and with the version, such as `http://localhost:8000/v1`.
        api_key_env: Environment variable that holds the key; None sends none.
        timeout_s: Deadline of a generation, all tries and pauses included.
        attempt_s: Longest try.
        connect_s: Longest wait for a connection.
        retries: Tries after the first; a server that is only busy (429) is asked until the deadline.
        backoff_s: First pause; doubles up to `MAX_PAUSE_S`, each time drawn from its upper half.
    """

    url: str
    api_key_env: str | None = None
    timeout_s: float = 900.0
    attempt_s: float = 600.0
    connect_s: float = 10.0
    retries: int = 6
    backoff_s: float = 0.5
    key: str | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", normal_url(self.url))
        times = (self.timeout_s, self.attempt_s, self.connect_s)
        if min(times) <= 0 or self.retries < 0 or self.backoff_s < 0:
            raise ConfigError("times of a server must be positive, retries and backoff_s at least 0")
        if self.api_key_env is not None:
            key = os.environ.get(self.api_key_env, "").strip()
            if not key or not key.isascii() or not key.isprintable():
                raise ConfigError(
                    f"the environment variable {self.api_key_env} holds no key. "
                    f"Fix: export {self.api_key_env}=..., or name the variable that holds it"
                )
            object.__setattr__(self, "key", key)


def normal_url(url: str) -> str:
    """An address without the endpoint, with the version where none was given.

    Raises:
        ConfigError: It is no address, or one with a key in it.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{url!r} is no address of a server: expected http(s)://HOST[:PORT][/v1]")
    if parts.username or parts.password or parts.query:
        raise ConfigError("an address holds no key or options. Fix: name the variable that holds the key")
    path = parts.path.rstrip("/")
    for endpoint in ENDPOINTS.values():  # the longer one first
        path = path.removesuffix(endpoint)
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


class Client:
    """Asks one server. Must be used and closed in one event loop.

    Args:
        server: Address, key and patience.
        endpoint: Chat, or completions.
        stats: Counters to keep.
    """

    def __init__(self, server: Server, endpoint: Endpoint, stats: ServedStats, *, connections: int) -> None:
        self._server, self._endpoint, self._stats = server, endpoint, stats
        headers = {"Content-Type": "application/json"}
        if server.key is not None:
            headers["Authorization"] = f"Bearer {server.key}"
        self._http = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(server.attempt_s, connect=server.connect_s),
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
            trust_env=not _is_loopback(server.url),  # proxies of the environment, but not to this machine
        )
        self._backoff = tenacity.wait_combine(  # half of a pause, and a random part of its other half
            tenacity.wait_exponential(server.backoff_s / 2, MAX_PAUSE_S / 2),
            tenacity.wait_random_exponential(server.backoff_s / 2, MAX_PAUSE_S / 2),
        )
        self._answered = False

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def ask(self, body: Mapping[str, Any]) -> Answer:
        """Get one answer before the deadline.

        Raises:
            RequestFailedError: It cannot be had.
            PolicyError: None can be had, for a reason that all requests share.
        """
        sent, last, patience = dict(body), "", self._server

        def pause(state: tenacity.RetryCallState) -> float:
            """Wait as long as the server asks for, and at least the back-off."""
            return max(self._backoff(state), _passing(state).pause_s)

        def is_last(state: tenacity.RetryCallState) -> bool:
            """Stop before the deadline, and after all retries unless the server is only busy."""
            spent = state.attempt_number > patience.retries and not _passing(state).busy
            return spent or tenacity.stop_before_delay(patience.timeout_s)(state)

        def note(state: tenacity.RetryCallState) -> None:
            nonlocal last
            last = f"; the last failure was: {_passing(state)}"
            self._stats.retries += 1

        tries = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(PassingError),
            stop=is_last,
            wait=pause,
            before_sleep=note,
            reraise=True,
        )
        try:
            async with asyncio.timeout(patience.timeout_s):
                return await tries(self._adapting, sent, int(body["max_tokens"]))
        except PassingError as error:
            made = tries.statistics["attempt_number"]
            late = made <= patience.retries or error.busy
            tried = f"{made} tries, none left before the deadline" if late else f"{made} tries"
            raise RequestFailedError(error.kind, f"{error} ({tried})") from error
        except TimeoutError as error:
            raise RequestFailedError(
                "deadline", f"no answer within {patience.timeout_s:g} s{last}"
            ) from error

    async def models(self) -> list[str]:
        """Names of the models that the server lists; none where it lists nothing that can be read."""
        try:
            response = await self._http.get(f"{self._server.url}/models")
            return [str(entry["id"]) for entry in response.json()["data"]]
        except (httpx.HTTPError, ValueError, KeyError, TypeError, RecursionError):
            return []

    async def _adapting(self, sent: dict[str, Any], max_tokens: int) -> Answer:
        """Ask once, and again without what this server refuses: a parameter, or too many tokens."""
        left_out = self._stats.left_out
        while True:
            body = {key: value for key, value in sent.items() if key not in left_out}
            if "max_tokens" in left_out:  # the newer name of the same limit
                body["max_completion_tokens"] = sent["max_tokens"]
            try:
                answer = await self._try(body)
            except ParameterError as error:  # never one that was left out, so this ends
                if error.name not in left_out:
                    left_out.append(error.name)
            except ContextError as error:
                if error.room is None or not 1 <= error.room < sent["max_tokens"]:
                    raise
                self._stats.shortened += sent["max_tokens"] == max_tokens
                sent["max_tokens"] = error.room  # ever less, so this ends
            except UnknownModelError as error:
                raise PolicyError(await self._unknown(str(sent["model"]), error)) from error
            except BadRequestError as error:
                if not self._answered:  # the first requests: it will not get better
                    raise PolicyError(f"{self._server.url} refuses the request: {error}") from error
                raise
            else:
                self._answered = True
                return answer

    async def _try(self, body: Mapping[str, Any]) -> Answer:
        self._stats.tries += 1
        url = self._server.url + ENDPOINTS[self._endpoint]
        try:
            async with asyncio.timeout(self._server.attempt_s):  # that of httpx is one of each read
                response = await self._http.post(url, content=json.dumps(body))
        except (httpx.TimeoutException, TimeoutError) as error:
            raise PassingError("timeout", f"no whole answer in time ({type(error).__name__})") from error
        except httpx.RequestError as error:
            raise PassingError("connection", f"{type(error).__name__}: {error}") from error
        if response.status_code != 200:
            content, key = response.content, self._server.key
            if key is not None:  # some servers repeat it
                content = content.replace(key.encode(), b"[key]")
            raise refusal(response.status_code, response.headers, content, sent=body)
        try:
            value = response.json()
            self._stats.count_usage(read_usage(value))  # paid for, whether it can be read or not
            return read_answer(value, self._endpoint)
        except (ValueError, RecursionError) as error:
            raise PassingError("bad answer", f"{type(error).__name__}: {error}") from error

    async def _unknown(self, model: str, error: UnknownModelError) -> str:
        models = await self.models()
        if not models:
            return f"{self._server.url} knows no {ENDPOINTS[self._endpoint]}, or no model {model!r}: {error}"
        if model in models:
            return f"{self._server.url} has no {ENDPOINTS[self._endpoint]} for {model!r}: {error}"
        listed = ", ".join(models[:20]) + (" ..." if len(models) > 20 else "")
        return f"{self._server.url} serves no model {model!r}; it has: {listed}"


def _passing(state: tenacity.RetryCallState) -> PassingError:
    """The failure of the last try."""
    error = None if state.outcome is None else state.outcome.exception()
    assert isinstance(error, PassingError)
    return error


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
