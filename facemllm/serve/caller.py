"""Who asks, known to every door without being handed through KServe's own routes; and whether they still wait."""

from __future__ import annotations

import asyncio
import contextlib
from contextvars import ContextVar
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send


@dataclass(frozen=True)
class Caller:
    """A client's name (its address, or its key's name) and when it stops waiting (`time.monotonic()`), if it said."""

    client: str = ""
    deadline: float | None = None


_NOBODY = Caller()
CALLER: ContextVar[Caller] = ContextVar("caller", default=_NOBODY)
"""The caller of the request that the current task answers."""


class NamedCaller:
    """ASGI middleware: the caller of a request is known by its address."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on in its caller's name."""
        if scope["type"] == "http":
            CALLER.set(Caller((scope.get("client") or ("",))[0]))
        await self.app(scope, receive, send)


class EndsWithCaller:
    """ASGI middleware: when the client leaves before its answer is sent, the work on it is cancelled."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and look whether the client is still there once its body has come."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        whole, sent = asyncio.Event(), False

        async def counted() -> Message:
            message = await receive()
            if not message.get("more_body", False):
                whole.set()
            return message

        async def noted(message: Message) -> None:
            nonlocal sent
            await send(message)
            sent = message["type"] == "http.response.body" and not message.get("more_body", False)

        async def gone() -> None:
            await whole.wait()
            while (await receive())["type"] != "http.disconnect":
                pass

        work, watch = asyncio.create_task(self._work(scope, counted, noted)), asyncio.create_task(gone())
        try:
            await asyncio.wait([work, watch], return_when=asyncio.FIRST_COMPLETED)
            if not (work.done() or sent):
                work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work
        finally:
            work.cancel()
            watch.cancel()

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)
