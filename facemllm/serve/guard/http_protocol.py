"""Uvicorn's HTTP/1.1 protocol for strangers: how many connections there are, how long one may do nothing, how much it
says before a request, how many requests of it wait."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable
from fcntl import ioctl
from termios import FIONREAD
from typing import Any, ClassVar

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from facemllm.settings.serve import Guard

_TOO_LARGE = b"431 Request Header Fields Too Large"
_BAD = b"400 Bad Request"
_NOT_READ = b"501 Not Implemented"
_BUSY = b"503 Service Unavailable"
_turns = itertools.count()  # in which order connections began to wait: the loop's clock has the same time for several
_TURN_S = 0.05  # within which an event loop has read what has arrived
_PARTING_S = 1.0  # in which a client reads that there are too many connections, or an answer when it sends no more
_PIPELINED = 8  # requests of a connection that wait for the one before them; more are not read
_PIECE = 1024  # bytes that the parser, which cannot be stopped, is given at a time: what may hold many requests


class _Flow(FlowControl):
    """Uvicorn's, which resumes reading with every request and every answer: never where `enough` is there."""

    def __init__(self, transport: asyncio.Transport, enough: Callable[[], bool]) -> None:
        super().__init__(transport)
        self._enough = enough

    def resume_reading(self) -> None:
        """Read on, unless there is enough."""
        if not self._enough():
            super().resume_reading()


class BoundedProtocol(HttpToolsProtocol):
    """Uvicorn's HTTP/1.1 protocol within the limits of `guard`.

    A connection on which no request is being answered is closed `header_s` after it was made or its last request began
    to arrive (and, as Uvicorn has it, `idle_s` after an answer). What is no body (line and headers, framing of chunks,
    trailers) is counted as it comes. When there are `max_connections`, the one that has waited longest without a
    request makes room for a new one; where all are at work, the new one gets 503. None is closed for doing nothing
    while bytes of it lie unread: a loop that was held up learns of its timers and of new connections first. A client
    that does not take its answer is cut off after `body_s`. One that sends requests without waiting for answers is read
    on once few of them wait.
    """

    guard: ClassVar[Guard]
    parting: ClassVar[set[BoundedProtocol]]

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._wire = self._body = 0  # bytes of this message, and those of them that are its body
        self._at_head = True
        self._unfed = bytearray()  # what has come and is not parsed
        self._rest = 0  # bytes of the body that are still to come, where its length was declared
        self._turn = 0
        self._late: asyncio.TimerHandle | None = None
        self._stuck: asyncio.TimerHandle | None = None
        self._refusal: bytes | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, if there is room for it."""
        if len(self.connections) >= self.guard.max_connections and not self._make_room():
            self.transport = transport
            transport.write(_answer(_BUSY, "too many connections; try again in a moment", b"retry-after: 1\r\n"))
            self._part()
            return
        super().connection_made(transport)
        self.flow = _Flow(transport, lambda: bool(self._unfed) or self._full)
        self._wait_for_a_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self.parting.discard(self)
        for timer in (self._late, self._stuck):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on."""
        if self.transport.is_closing() or self in self.parting:
            return
        self._unfed += data
        self._read_on()

    def _read_on(self) -> None:
        """Parse what has come, until enough requests wait."""
        while self._unfed and not self._full:
            size = max(_PIECE, self._rest)
            piece = bytes(self._unfed[:size])
            del self._unfed[:size]
            self._wire += len(piece)
            super().data_received(piece)
            if self.transport.is_closing():
                return
            if self._wire - self._body > self.guard.header_kb * 1024 + self._body:
                self._refuse_headers()
                self.send_400_response("")
                return
        if self._unfed:
            self.flow.pause_reading()
        elif self._idle and self._late is None and self.timeout_keep_alive_task is None:  # Uvicorn took its own away
            self._wait_for_a_request()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; trailers, which come after the body, are left out."""
        if self._at_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begin to answer, if the headers are few and small enough, and say what HTTP wants (RFC 9112, 3.2 and 6.1)."""
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self.guard.header_kb * 1024 or len(self.headers) > self.guard.max_headers:
            self._refuse_headers()
            raise ValueError("headers")  # the parser stops, and Uvicorn sends the refusal
        if (hosts := len(self._said(b"host"))) > 1 or (not hosts and self.parser.get_http_version() == "1.1"):
            self._refusal = _answer(_BAD, f"the request has {hosts or 'no'} Host headers; send one")
            raise ValueError("Host")
        if self._said(b"transfer-encoding") not in ([], [b"chunked"]):
            self._refusal = _answer(_NOT_READ, "of Transfer-Encoding this server reads chunked alone")
            raise ValueError("Transfer-Encoding")
        self._at_head = False
        self._rest = int(next(iter(self._said(b"content-length")), 0))
        self._stop_waiting()
        self._unset_keepalive_if_required()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._body += len(body)
        self._rest = max(0, self._rest - len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The end of a request: another may follow."""
        super().on_message_complete()
        self._wire = self._body = self._rest = 0
        self._at_head = True
        if self._idle:  # refused before its body had come: the wait for the next begins now
            self._stop_waiting()
            self.timeout_keep_alive_task = self.loop.call_later(self.guard.idle_s, self.timeout_keep_alive_handler)

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, unless its next request is there."""
        if self._unread:
            self.timeout_keep_alive_task = self.loop.call_later(_TURN_S, super().timeout_keep_alive_handler)
        else:
            super().timeout_keep_alive_handler()

    def on_response_complete(self) -> None:
        """The end of an answer: it waits again, or the next request is answered."""
        self._turn = next(_turns)
        super().on_response_complete()
        if not self.transport.is_closing():
            self._read_on()
            self.flow.resume_reading()

    def send_400_response(self, msg: str) -> None:
        """Refuse in one line and close."""
        line = _answer(_BAD, "this is not HTTP as this server reads it")
        self.transport.write(self._refusal or line)
        self.transport.close()

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends nothing more; True keeps the connection open. One that has left altogether looks the same,
        so a request that has come whole is answered within `_PARTING_S`, or not at all."""
        if self._idle or self.cycle.more_body or self.scheme == "https":  # asyncio's TLS knows no half of a connection
            return False
        self.cycle.keep_alive = False
        self._late = self.loop.call_later(_PARTING_S, self.transport.close)
        return True

    def pause_writing(self) -> None:
        """The client takes nothing more: it has a while to begin again."""
        super().pause_writing()
        self._stuck = self.loop.call_later(self.guard.body_s, self.transport.abort)

    def resume_writing(self) -> None:
        """It does again."""
        super().resume_writing()
        if self._stuck is not None:
            self._stuck.cancel()

    @property
    def _full(self) -> bool:
        """Whether as many requests wait as may."""
        return len(self.pipeline) >= _PIPELINED

    @property
    def _idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _said(self, header: bytes) -> list[bytes]:
        """The values of a header of this request."""
        return [value.strip().lower() for name, value in self.headers if name == header]

    def _wait_for_a_request(self) -> None:
        self._turn = next(_turns)
        self._late = self.loop.call_later(self.guard.header_s, self._give_up)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _give_up(self) -> None:
        self._late = self.loop.call_later(_TURN_S, self._end) if self._unread else None
        if self._late is None:
            self._end()

    def _end(self) -> None:
        self._late = None
        if self._idle and not self.transport.is_closing():
            self.transport.close()

    @property
    def _unread(self) -> bool:
        """Whether bytes have arrived that were not read yet."""
        connected = self.transport.get_extra_info("socket")
        try:
            return any(ioctl(connected.fileno(), FIONREAD, bytes(4)))
        except (OSError, ValueError):  # it is closed
            return False

    def _part(self) -> None:
        """Close once the client, which may still be sending, has read why: closing a connection with bytes unread
        resets it under the client's hands."""
        if len(self.parting) >= self.guard.max_connections:
            self.transport.close()
            return
        self.parting.add(self)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._late = self.loop.call_later(_PARTING_S, self.transport.abort)

    def _refuse_headers(self) -> None:
        most = f"{self.guard.header_kb} kB in {self.guard.max_headers} headers"
        self._refusal = _answer(_TOO_LARGE, f"the headers are too large; this server takes {most}")

    def _make_room(self) -> bool:
        """Close the connection that has waited longest for a request; False if none waits."""
        waiting = [one for one in self.connections if isinstance(one, BoundedProtocol) and one._idle]
        oldest = next((one for one in sorted(waiting, key=lambda one: one._turn) if not one._unread), None)
        if oldest is None:
            return False
        oldest.transport.abort()
        self.connections.discard(oldest)
        return True


def _answer(status: bytes, line: str, headers: bytes = b"") -> bytes:
    body = json.dumps({"error": line}).encode()
    sizes = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n" % len(body)
    return b"HTTP/1.1 " + status + b"\r\n" + sizes + headers + b"\r\n" + body
