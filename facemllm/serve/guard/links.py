"""Pictures that a body names by their address are put in their place, so that every door reads pictures alone.

In force only where `serve.guard.fetch.hosts` names hosts; elsewhere the doors refuse an address. Two forms are known:
`"image": {"url": "https://..."}`, which becomes `{"b64": ...}`, and OpenAI's `"image_url": {"url": "https://..."}`,
which becomes a data URL.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Iterator
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from facemllm.serve.guard.bodies import given_again
from facemllm.serve.guard.fetching import Fetcher
from facemllm.serve.language import Refused

MAX_PICTURES = 8
"""Addresses that one body may name."""
_START = ("http://", "https://")
_MARKS = (b'"url"', b"http")  # a body without them names none


class FetchImages:
    """ASGI middleware: fetches the pictures that a JSON body names. It stands inside `JsonLimit`. `refuse` makes the
    answer to a refusal at a path."""

    def __init__(
        self, app: ASGIApp, fetcher: Fetcher, max_bytes: int, refuse: Callable[[str, Refused], ASGIApp]
    ) -> None:
        self.app, self._fetcher, self._max_bytes, self._refuse = app, fetcher, max_bytes, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, with pictures for addresses."""
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        message = await receive()  # whole: `JsonLimit` stands before
        try:
            if all(mark in message.get("body", b"") for mark in _MARKS):
                message = {**message, "body": await self._filled(message["body"])}
        except Refused as refused:
            return await self._refuse(scope["path"], refused)(scope, receive, send)
        return await self.app(scope, given_again(message, receive), send)

    async def _filled(self, body: bytes) -> bytes:
        try:
            tree = json.loads(body)
        except ValueError:  # tensors follow the JSON; a door reads them
            return body
        found = list(_links(tree))
        if len(found) > MAX_PICTURES:
            raise Refused(413, f"the body names {len(found)} addresses; this server fetches {MAX_PICTURES}")
        if not found:
            return body
        urls = sorted({holder[key]["url"] for holder, key in found})
        pictures = dict(
            zip(urls, await asyncio.gather(*(self._fetcher.get(url, "image") for url in urls)), strict=True)
        )
        if sum(len(pictures[holder[key]["url"]]) for holder, key in found) > self._max_bytes:
            raise Refused(413, f"the images have more than {self._max_bytes / 2**20:g} MB together")
        for holder, key in found:
            picture = base64.b64encode(pictures[holder[key]["url"]]).decode()
            if key == "image":
                holder[key] = {"b64": picture}
            else:
                holder[key] = {**holder[key], "url": f"data:image/jpeg;base64,{picture}"}
        return json.dumps(tree).encode()


def _links(tree: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Where a body names a picture by its address: the object, and its key."""
    waiting = [tree]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            for key in ("image", "image_url"):
                inner = one.get(key)
                if isinstance(inner, dict) and isinstance(url := inner.get("url"), str) and url.startswith(_START):
                    yield one, key
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
