"""Connections of strangers: how many there are, how long they may do nothing, how much they say before a request.

Uvicorn as it comes waits for ever for a request that never comes, or comes byte by byte, and takes headers of any size.
`apply` makes the REST server's configuration bounded, `grpc_options` are for a gRPC server, which gRPC itself bounds
once it is told to, and both speak TLS if there is a certificate.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from facemllm.errors import UserError
from facemllm.serve.guard.http_protocol import BoundedProtocol
from facemllm.serve.guard.keys import grpc_interceptor, guarded_by
from facemllm.settings.serve import Guard

if TYPE_CHECKING:
    import grpc
    import uvicorn


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
    """Options of a gRPC server: size of messages and of metadata, connections, calls at once on one, their age.

    Connections end by age so that none is left when the server stops: gRPC cancels calls that come in the moment when
    it begins to, and only after a GOAWAY by age are those of a client made again elsewhere.
    """
    return [
        ("grpc.max_allowed_incoming_connections", guard.max_connections),
        ("grpc.max_receive_message_length", max_bytes),
        ("grpc.max_send_message_length", max_bytes),
        ("grpc.max_metadata_size", guard.header_kb * 1024),
        ("grpc.absolute_max_metadata_size", guard.header_kb * 1024),
        ("grpc.max_concurrent_streams", guard.grpc_streams),
        ("grpc.max_connection_idle_ms", guard.idle_s * 1000),
        ("grpc.max_connection_age_ms", guard.grpc_age_s * 1000),
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
                    context.set_code(grpc.StatusCode.INVALID_ARGUMENT)
                    context.set_details("the message cannot be read")
                    return None
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
