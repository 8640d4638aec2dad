"""Connections of strangers: how many there are, how long they may do nothing, how much they say before a request.

Uvicorn as it comes waits for ever for a request that never comes, or comes byte by byte, and takes headers of any size.
`apply` makes the REST server's configuration bounded, `grpc_options` are for a gRPC server, which gRPC itself bounds
once it is told to, and both speak TLS if there is a certificate.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from fcntl import ioctl
from pathlib import Path
from termios import FIONREAD
from typing import TYPE_CHECKING, Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from facemllm.errors import UserError
from facemllm.serve.guard.keys import grpc_interceptor, guarded_by
from facemllm.settings.serve import Guard

if TYPE_CHECKING:
    import grpc
    import uvicorn

_TOO_LARGE = b"431 Request Header Fields Too Large"
_BUSY = b"503 Service Unavailable"
_turns = itertools.count()  # in which order connections began to wait: the loop's clock has the same time for several
_TURN_S = 0.05  # within which an event loop has read what has arrived
_PARTING_S = 1.0  # in which a client reads that there are too many connections


class BoundedProtocol(HttpToolsProtocol):
    """Uvicorn's HTTP/1.1 protocol within the limits of `guard`.

    A connection on which no request is being answered is closed `header_s` after it was made or its last request began
    to arrive (and, as Uvicorn has it, `idle_s` after an answer). What is no body (line and headers, framing of chunks,
    trailers) is counted as it comes. When there are `max_connections`, the one that has waited longest without a
    request makes room for a new one; where all are at work, the new one gets 503. None is closed for doing nothing
    while bytes of it lie unread: a loop that was held up learns of its timers and of new connections first. A client
    that does not take its answer is cut off after `body_s`.
    """

    guard: ClassVar[Guard]
    parting: ClassVar[set[BoundedProtocol]]

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._wire = self._body = 0  # bytes of this message, and those of them that are its body
        self._at_head = True
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
        self._wire += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._wire - self._body > self.guard.header_kb * 1024 + self._body:
            self._refuse_headers()
            self.send_400_response("")
        elif self._idle and self._late is None and self.timeout_keep_alive_task is None:  # Uvicorn took its own away
            self._wait_for_a_request()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; trailers, which come after the body, are left out."""
        if self._at_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begin to answer, if the headers are few and small enough."""
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self.guard.header_kb * 1024 or len(self.headers) > self.guard.max_headers:
            self._refuse_headers()
            raise ValueError("headers")  # the parser stops, and Uvicorn sends the refusal
        self._at_head = False
        self._stop_waiting()
        self._unset_keepalive_if_required()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._body += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The end of a request: another may follow."""
        super().on_message_complete()
        self._wire = self._body = 0
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
        """The end of an answer: it waits again."""
        self._turn = next(_turns)
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse in one line and close."""
        line = _answer(b"400 Bad Request", "this is not HTTP as this server reads it")
        self.transport.write(self._refusal or line)
        self.transport.close()

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
    def _idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

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


def apply(config: uvicorn.Config, guard: Guard) -> None:
    """Bound the connections of a REST server that is not yet running. Raises UserError for a certificate that is not
    there."""
    config.http = type("GuardedProtocol", (BoundedProtocol,), {"guard": guard, "parting": set()})
    config.ws = "none"
    config.timeout_keep_alive = guard.idle_s
    config.server_header = False
    if guard.tls:
        config.ssl_certfile, config.ssl_keyfile = (str(_readable(path)) for path in guard.tls)


def grpc_options(guard: Guard, max_bytes: int) -> list[tuple[str, int]]:
    """Options of a gRPC server: size of messages and of metadata, calls at once on a connection, idle connections."""
    return [
        ("grpc.max_receive_message_length", max_bytes),
        ("grpc.max_send_message_length", max_bytes),
        ("grpc.max_metadata_size", guard.header_kb * 1024),
        ("grpc.absolute_max_metadata_size", guard.header_kb * 1024),
        ("grpc.max_concurrent_streams", guard.grpc_streams),
        ("grpc.max_connection_idle_ms", guard.idle_s * 1000),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 2),
        ("grpc.server_handshake_timeout_ms", round(guard.header_s * 1000)),
        ("grpc.so_reuseport", 0),  # else a second server would share the port unseen
    ]


def grpc_credentials(guard: Guard) -> grpc.ServerCredentials | None:
    """TLS of a gRPC server; None without a certificate. Raises UserError for one that is not there."""
    if guard.tls is None:
        return None
    from grpc import ssl_server_credentials

    certificate, key = (_readable(path).read_bytes() for path in guard.tls)
    return ssl_server_credentials([(key, certificate)])


def grpc_interceptors(guard: Guard) -> list[Any]:
    """Interceptors of a gRPC server, which come first: whole messages alone, and keys if they are asked for. Raises
    UserError for a keys file that cannot be read."""
    found = [_whole_messages()]
    keys = guarded_by(guard)
    return [*found, grpc_interceptor(keys)] if keys else found


def _whole_messages() -> Any:
    """An interceptor that refuses a message that cannot be read, which gRPC would call a fault of the server."""
    import grpc

    broken = object()

    class WholeMessages(grpc.aio.ServerInterceptor):
        async def intercept_service(self, continuation: Any, details: Any) -> Any:
            handler = await continuation(details)
            if handler is None or handler.unary_unary is None or handler.request_deserializer is None:
                return handler

            def read(data: bytes) -> Any:
                try:
                    return handler.request_deserializer(data)
                except Exception:  # hostile bytes can raise almost anything from a parser
                    return broken

            async def answer(request: Any, context: Any) -> Any:
                if request is broken:
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the message cannot be read")
                return await handler.unary_unary(request, context)

            return grpc.unary_unary_rpc_method_handler(answer, read, handler.response_serializer)

    return WholeMessages()


def _readable(path: str) -> Path:
    file = Path(path).expanduser()
    try:
        with file.open("rb"):
            return file
    except OSError as error:
        raise UserError(f"serve.guard.tls: {file} cannot be read: {error.strerror}") from None
