"""What stands before every route, in its order: where it comes from, the key, room in the queue, the size and time of
the body, its JSON, its links."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Receive, Scope, Send

from facemllm.core.machine import is_loopback
from facemllm.serve.caller import CALLER
from facemllm.serve.engine.room import UnderWay
from facemllm.serve.guard.bodies import BodyLimit
from facemllm.serve.guard.fetching import Fetcher
from facemllm.serve.guard.json_bodies import JsonLimit
from facemllm.serve.guard.keys import KeyCheck, guarded_by
from facemllm.serve.guard.links import FetchImages
from facemllm.serve.guard.origins import OwnOrigin
from facemllm.serve.language import Refused
from facemllm.settings.serve import Guard

if TYPE_CHECKING:
    from starlette.applications import Starlette


class Admission:
    """ASGI middleware: what would be refused whatever it says is refused before its body is read. `check` is given the
    client and the requests that are under way, which the queue may not hold yet."""

    def __init__(
        self, app: ASGIApp, check: Callable[[str, UnderWay], None], refuse: Callable[[str, Refused], ASGIApp]
    ) -> None:
        self.app, self._check, self._refuse = app, check, refuse
        self._under_way = Counter[str]()  # by client

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, if there is room for it."""
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        client, every = CALLER.get().client, self._under_way
        try:
            self._check(client, UnderWay(every.total(), every[client], len(every)))
        except Refused as refused:
            return await self._refuse(scope["path"], refused)(scope, receive, send)
        every[client] += 1
        try:
            await self.app(scope, receive, send)
        finally:
            every[client] -= 1
            if not every[client]:
                del every[client]


class HeadAsGet:
    """ASGI middleware: HEAD is asked as GET (RFC 9110, 9.3.2); Uvicorn leaves the body out."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        await self.app({**scope, "method": "GET"} if scope.get("method") == "HEAD" else scope, receive, send)


def install(
    app: Starlette,
    guard: Guard,
    max_bytes: int,
    refuse: Callable[[str, Refused], ASGIApp],
    check: Callable[[str, UnderWay], None] = lambda client, under_way: None,
    host: str | None = None,
) -> None:
    """Add the middlewares to an application that does not run yet. `refuse` makes the answer to a refusal at a path;
    `check` raises Refused where a client would be refused whatever it asks; `host` is the address that the server
    listens on. Raises UserError for a keys file that cannot be read."""
    keys = guarded_by(guard)
    if guard.fetch.hosts:
        fetcher = Fetcher(guard.fetch.hosts, max_bytes=max_bytes, seconds=guard.fetch.seconds)
        app.add_middleware(FetchImages, fetcher=fetcher, max_bytes=max_bytes, refuse=refuse)
    app.add_middleware(JsonLimit, max_depth=guard.json_depth, max_values=guard.json_values, refuse=refuse)
    app.add_middleware(BodyLimit, max_bytes=max_bytes, budget=int(guard.bodies_mb * 2**20), seconds=guard.body_s)
    app.add_middleware(Admission, check=check, refuse=refuse)
    if keys:  # the one added last comes first
        app.add_middleware(KeyCheck, keys=keys, refuse=refuse)
    app.add_middleware(OwnOrigin, hosts=guard.hosts if host and is_loopback(host) else None, refuse=refuse)
    app.add_middleware(HeadAsGet)
