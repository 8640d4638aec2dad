"""Connections to a vLLM server, and what its errors are in our words: what it says itself is for nobody outside."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx

from facemllm.serve.language import Refused

log = logging.getLogger("facemllm.serve")

RENDER, GENERATE = "/v1/chat/completions/render", "/inference/v1/generate"
JSON = {"Content-Type": "application/json"}
_BUSY = {429: "is busy", 503: "cannot answer now", 504: "did not answer in time"}
_CONNECT_SECONDS = 5.0
_IDLE_SECONDS = 2.0  # vLLM closes connections after 5 (VLLM_HTTP_TIMEOUT_KEEP_ALIVE): ours must be gone before


class VllmClient:
    """At most `at_once` connections to the server at `url`. How long an answer takes is for the caller to bound."""

    def __init__(self, url: str, at_once: int) -> None:
        self._url, self._at_once = url, at_once
        self._made: tuple[asyncio.AbstractEventLoop, httpx.AsyncClient] | None = None

    @asynccontextmanager
    async def asked(self, path: str, body: bytes) -> AsyncIterator[httpx.Response]:
        """A good answer, still to be read. Whoever leaves early closes the connection, which makes vLLM drop the work.
        Raises Refused."""
        client = self._http()
        try:
            async with client.stream("POST", path, content=body, headers=JSON) as answer:
                if answer.is_error:
                    await answer.aread()
                    raise refusal(answer.status_code, answer.headers.get("Retry-After"))
                yield answer
        except httpx.HTTPError as error:
            log.error("vLLM: %s", type(error).__name__)
            raise Refused(503, "the model's server does not answer; try again in a moment", 2.0) from None

    def _http(self) -> httpx.AsyncClient:
        """The connections of the running event loop."""
        loop = asyncio.get_running_loop()
        if self._made is None or self._made[0] is not loop:
            limits = httpx.Limits(
                max_connections=self._at_once,
                max_keepalive_connections=self._at_once,
                keepalive_expiry=_IDLE_SECONDS,
            )
            timeout = httpx.Timeout(None, connect=_CONNECT_SECONDS)
            self._made = loop, httpx.AsyncClient(base_url=self._url, limits=limits, timeout=timeout, trust_env=False)
        return self._made[1]


@contextmanager
def readable() -> Iterator[None]:
    """What cannot be read of an answer, as Refused."""
    try:
        yield
    except (ValueError, LookupError, TypeError) as error:
        log.error("vLLM answered what cannot be read: %s", type(error).__name__)
        raise Refused(502, "the model's server answered what cannot be read") from None


def refusal(status: int, retry_after: Any = None) -> Refused:
    """What a client is told of an error of vLLM's."""
    log.error("vLLM answered with %d", status)
    if status not in _BUSY:
        return Refused(502, "the model's server failed at this request")
    try:
        after = min(60.0, max(1.0, float(retry_after)))
    except (TypeError, ValueError):
        after = 1.0
    return Refused(status, f"the model's server {_BUSY[status]}; try again in a moment", after)
