"""Bodies that are too large, too slow in coming, or not plain JSON."""

from __future__ import annotations

import asyncio
import codecs
import time
from collections import Counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from facemllm.serve.caller import CALLER
from facemllm.serve.language import Refused

_DISCARD_BYTES = 64 * 2**20
_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # those of UTF-32 begin alike, or with zeros


def _unsupported(form: str) -> Refused:
    return Refused(415, f"the body is {form}; send it as plain JSON in UTF-8")


def given_again(message: Message, receive: Receive) -> Receive:
    """What gives a message that was taken once more, and then what follows it."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return message

    return again


class BodyLimit:
    """ASGI middleware: a body that is too large, too slow in coming, compressed or in UTF-16 or UTF-32 is refused
    without being held in memory. The mark before UTF-8 that some editors write is taken away.

    Most clients read the answer only when they have sent everything, and see a broken connection when it is closed
    before. So a body that is not enormous is read to its end, and thrown away, before it is refused.

    The bodies of all requests under way hold `budget` bytes. Beyond it, and up to twice as much, a client that holds
    more than an equal share is refused (503), so that others find room whatever one holds.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, budget: int, seconds: float = 60.0) -> None:
        self.app, self.max_bytes, self._budget, self._seconds = app, max_bytes, budget, seconds
        self._held = Counter[str]()  # bytes, by client

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, counting."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        size, whole, deadline = 0, False, time.monotonic() + self._seconds
        headers = dict(scope["headers"])
        declared, encoding = headers.get(b"content-length", b""), headers.get(b"content-encoding", b"").strip().lower()
        fault: Refused | None = None
        if encoding not in (b"", b"identity"):
            fault = _unsupported(f"compressed (Content-Encoding: {encoding.decode('latin-1')[:40]})")
        enormous = self.max_bytes + _DISCARD_BYTES
        client, held = CALLER.get().client, 0

        async def counted() -> Message:
            nonlocal size, whole, fault, held
            if declared.isdigit() and int(declared) > enormous:
                raise self._refused()
            while not whole:
                try:
                    async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                        message = await receive()
                except TimeoutError:
                    raise Refused(408, f"the body did not arrive within {self._seconds:g} s") from None
                body = message.get("body", b"")
                if not size and fault is None and (b"\0" in body[:4] or body.startswith(_WIDE)):
                    fault = _unsupported("in UTF-16 or UTF-32")
                if not size and body.startswith(codecs.BOM_UTF8):
                    message["body"] = body.removeprefix(codecs.BOM_UTF8)
                size += len(body)
                whole = not message.get("more_body", False)
                if size <= self.max_bytes and fault is None:
                    if body:
                        held += len(body)
                        self._held[client] += len(body)
                        self._require_room(client)
                    return message
                if whole or size > enormous:
                    raise fault if size <= self.max_bytes and fault is not None else self._refused()
            return await receive()

        try:
            await self.app(scope, counted, send)
        finally:
            self._held[client] -= held
            if not self._held[client]:
                del self._held[client]

    def _require_room(self, client: str) -> None:
        total, share = self._held.total(), self._budget / len(self._held)
        if total > 2 * self._budget or (total > self._budget and self._held[client] > share):
            raise Refused(503, "the server holds as many requests as it can; try again in a moment", 1.0)

    def _refused(self) -> Refused:
        return Refused(413, f"the body is too large; this server takes {self.max_bytes / 2**20:g} MB")
