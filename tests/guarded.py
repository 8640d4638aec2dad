"""An application behind the guards, on real sockets of this machine."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from facemllm.serve.caller import CALLER
from facemllm.serve.doors.errors import refusal
from facemllm.serve.guard import connections, middleware
from facemllm.settings import plain
from facemllm.settings.serve import Guard


def guard(**changes: Any) -> Guard:
    """The settings' own limits, with changes."""
    return Guard.model_validate({**plain().serve.guard.model_dump(), **changes})


def app(limits: Guard, max_bytes: int = 2**20) -> Starlette:
    """Says what it was sent; `/long` answers with 256 MB."""

    async def echo(request: Request) -> JSONResponse:
        return JSONResponse({"bytes": len(await request.body()), "client": CALLER.get().client})

    async def long(request: Request) -> StreamingResponse:
        return StreamingResponse(bytes(2**20) for _ in range(256))

    paths = ("/", "/metrics", "/v2/health/live", "/v2/health/ready", "/v1/models/one", "/v1/models/one:predict")
    paths += ("/v2/models/one/infer",)
    made = Starlette(routes=[*(Route(path, echo, methods=["GET", "POST"]) for path in paths), Route("/long", long)])
    middleware.install(made, limits, max_bytes, refusal)
    return made


@contextlib.contextmanager
def serving(limits: Guard, application: Any = None) -> Iterator[int]:
    """The port of a server with these limits."""
    config = uvicorn.Config(application or app(limits), log_config=None, lifespan="off")
    connections.apply(config, limits)
    server = uvicorn.Server(config)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield listening.getsockname()[1]
        server.should_exit = server.force_exit = True
        thread.join(30)


def connect(port: int) -> socket.socket:
    """A connection that does not wait for ever."""
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def said(connection: socket.socket) -> bytes:
    """Everything until the other side closes."""
    data = bytearray()
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(2**16):
            data += piece
    return bytes(data)


def certificate(folder: Path) -> tuple[str, str]:
    """Files of a certificate for localhost and of its key."""
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    for file, data in (("cert.pem", made.public_bytes(pem)), ("key.pem", secret)):
        (folder / file).write_bytes(data)
    return str(folder / "cert.pem"), str(folder / "key.pem")
