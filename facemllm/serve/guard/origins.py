"""Requests that a browser sends because a page from elsewhere has it do so: refused at every door.

A page of another site may post what needs no preflight (forms, text/plain), and one whose name was pointed at this
machine (DNS rebinding) is even of the same origin: its Host gives it away.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from facemllm.core.machine import is_loopback
from facemllm.serve.language import Refused

_SAME = ("same-origin", "none")


def require_own_page(headers: Headers) -> None:
    """Refuse what another site's page makes a browser post. Raises Refused (403)."""
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site in _SAME:
        return
    if site is not None or (origin is not None and urlsplit(origin).netloc != headers.get("host", "")):
        raise Refused(403, "a page of another site sent this; open this server's own page, or ask without a browser")


def require_own_name(headers: Headers, hosts: Collection[str]) -> None:
    """Refuse a Host that is neither loopback's nor one of `hosts`. Raises Refused (421)."""
    try:
        name = (urlsplit(f"//{headers.get('host', 'localhost')}").hostname or "").rstrip(".")
    except ValueError:  # brackets around no address
        name = ""
    if not is_loopback(name) and not name.endswith(".localhost") and name not in hosts:
        raise Refused(421, "this server listens on loopback, and Host is another name; list it in serve.guard.hosts")


class OwnOrigin:
    """ASGI middleware: what a page from elsewhere sends is refused. `hosts` are names that a server on loopback goes
    by, besides loopback's; None checks no name. `refuse` makes the answer to a refusal at a path."""

    def __init__(self, app: ASGIApp, hosts: Collection[str] | None, refuse: Callable[[str, Refused], ASGIApp]) -> None:
        self.app, self._hosts, self._refuse = app, hosts, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, if nobody else's page sent it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        try:
            if self._hosts is not None:
                require_own_name(headers, self._hosts)
            if scope["method"] not in ("GET", "HEAD", "OPTIONS"):
                require_own_page(headers)
        except Refused as refused:
            return await self._refuse(scope["path"], refused)(scope, receive, send)
        return await self.app(scope, receive, send)
