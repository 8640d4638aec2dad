"""Who asks: known to every door without being handed through KServe's own routes."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send


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
