"""The proxy on production's port: every request goes to the model that serves, or by its share to a canary.

`python -m facemllm.serve.local.proxy --port 18081 --routes FILE` reads `facemllm.core.routes` from a file that is
looked at before each request, so a switch holds for the next one, and one in flight ends where it began. A request
whose connection is refused, of which no byte was sent, is tried once on the other server; any other is sent once.

Bodies pass as they come, in both directions, a few blocks at a time, and are not decoded. Each request has a
connection of its own to the server: on loopback that costs little, and none is sent into one that is being closed. What
the client says of itself in forwarding headers is dropped. `X-Backend` in an answer names the server it is from, in a
request the one it is for. `/proxy/live` tells that the proxy runs, `/proxy/status` what it has counted; every other
path is the model's, `/v2/health/ready` included.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import logging
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from facemllm.core.servers import HOST, Deployed
from facemllm.serve.guard.descriptors import allow_files
from facemllm.serve.local.meters import Meter
from facemllm.serve.local.routing import Router
from facemllm.serve.local.tunnel import Tunnel

log = logging.getLogger("facemllm.proxy")

BACKEND = "X-Backend"
MAX_CONNECTIONS, MAX_IN_FLIGHT = 2048, 512
_HEADER_S, _IDLE_S, _BODY_S, _ANSWER_S, _STOP_S = 10.0, 75.0, 60.0, 600.0, 8.0
_UNSENT = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
_HOP = {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "expect"}
_HOP |= {"proxy-authenticate", "proxy-authorization"}
_CLAIMS = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-forwarded-port", "x-real-ip")


class Proxy:
    """Answers requests with what the chosen server says."""

    def __init__(self, router: Router) -> None:
        self.router, self.meters = router, dict[str, Meter]()
        self._started, self._in_flight = time.time(), 0
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5.0, sock_read=_ANSWER_S),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        )

    async def close(self) -> None:
        """End connections to servers."""
        await self._session.close()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        if request.path.startswith("/proxy/"):
            return self._own(request)
        if not request.raw_path.startswith("/"):
            return _refusal(400, "the request's target must be a path")
        if self._in_flight >= MAX_IN_FLIGHT:
            return _refusal(429, "too many requests at once", retry=True)
        wanted = request.headers.get(BACKEND)
        self._in_flight += 1
        try:
            for backend in self.router.order(wanted):
                with contextlib.suppress(*_UNSENT):
                    return await self._forwarded(request, backend)
            where = "no model is in production" if wanted is None else f"{BACKEND}: no such server"
            known = self.router.look()[0] is not None and wanted is None
            return _refusal(503, "the model's server does not answer" if known else where, retry=True)
        finally:
            self._in_flight -= 1

    async def _forwarded(self, request: web.BaseRequest, backend: Deployed) -> web.StreamResponse:
        """One exchange with a server. Raises one of `_UNSENT` where there is no connection, and nothing was sent."""
        meter = self.meters.setdefault(backend.name, Meter())
        meter.in_flight += 1
        upload = _Upload(request)
        started, response = time.perf_counter(), None
        try:
            asked = self._session.request(
                request.method,
                URL(backend.url + request.raw_path, encoded=True),
                headers=_request_headers(request),
                data=upload.blocks() if request.body_exists else None,
                allow_redirects=False,
            )
            async with asked as upstream:
                seconds = time.perf_counter() - started
                response = web.StreamResponse(status=upstream.status, reason=upstream.reason)
                response.headers.extend(_kept(upstream.headers))
                response.headers[BACKEND] = backend.name
                blocks = upstream.content.iter_any()
                await _to_client(response.prepare(request))
                async for block in blocks:
                    await _to_client(response.write(block))
                meter.answered(upstream.status, seconds)
            await _to_client(response.write_eof())
            return response
        except asyncio.CancelledError:
            meter.left += 1
            raise
        except _ClientLeft:
            meter.left += 1
            return _broken(request, response)
        except _UNSENT:
            meter.failed(refused=True)
            raise
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            if upload.broken:
                meter.left += 1
                return _refusal(400, "the request's body broke off")
            meter.failed(refused=False)
            log.warning("%s broke off a request: %s", backend.name, type(error).__name__)
            if response is None or not response.prepared:
                return _refusal(502, "the model's server broke off")
            return _broken(request, response)
        finally:
            meter.in_flight -= 1

    def _own(self, request: web.BaseRequest) -> web.Response:
        if not request.remote or not ipaddress.ip_address(request.remote).is_loopback:
            return _refusal(403, "for this machine alone")
        if request.path == "/proxy/live":
            return web.json_response({"live": True})
        if request.path != "/proxy/status":
            return _refusal(404, "the proxy has /proxy/live and /proxy/status")
        routes, driven = self.router.look()
        status: dict[str, Any] = {"started": self._started, "in_flight": self._in_flight, "percent": 0.0}
        if routes is not None:
            status |= {"stable": routes.stable.name}
            if driven and routes.canary is not None:
                status |= {"canary": routes.canary.name, "percent": routes.percent}
        return web.json_response(status | {"backends": {name: meter.to_dict() for name, meter in self.meters.items()}})


class Door(web.Server):
    """Takes connections: so many, and only as long as they send a request's head in time."""

    def __init__(self, proxy: Proxy) -> None:
        self._asked = set[Any]()

        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            self._asked.add(request.protocol)
            if request.headers.get("Expect", "").lower() == "100-continue":  # aiohttp answers it in applications alone
                await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                request.writer.output_size = 0
            return await proxy.handle(request)

        limits: dict[str, Any] = {"keepalive_timeout": _IDLE_S, "max_field_size": 8190, "max_headers": 128}
        super().__init__(handle, handler_cancellation=True, access_log=None, auto_decompress=False, **limits)

    def connection_made(self, handler: Any, transport: asyncio.Transport) -> None:
        """Close one connection too many at once, and one that sends no head in time."""
        super().connection_made(handler, transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
            return

        def late() -> None:
            if handler not in self._asked:
                transport.abort()

        asyncio.get_running_loop().call_later(_HEADER_S, late)

    def connection_lost(self, handler: Any, exc: BaseException | None = None) -> None:
        """Forget a connection."""
        self._asked.discard(handler)
        super().connection_lost(handler, exc)


class _ClientLeft(Exception):
    """The client's connection ended before the answer."""


class _Upload:
    """The body of a request; `broken` once it did not come whole."""

    def __init__(self, request: web.BaseRequest) -> None:
        self._content, self.broken = request.content, False

    async def blocks(self) -> AsyncIterator[bytes]:
        """The body as it comes."""
        try:
            while True:
                async with asyncio.timeout(_BODY_S):
                    block = await self._content.readany()
                if not block:
                    return
                yield block
        except (aiohttp.ClientError, web.RequestPayloadError, OSError):
            self.broken = True
            raise


async def _to_client(writing: Any) -> None:
    try:
        await writing
    except (aiohttp.ClientError, OSError):
        raise _ClientLeft from None


def _broken(request: web.BaseRequest, response: web.StreamResponse | None) -> web.StreamResponse:
    """End the client's connection, so that it sees an answer that is not whole."""
    if request.transport is not None:
        request.transport.abort()
    return response or _refusal(502, "broken off")


def _kept(headers: Any) -> CIMultiDict[str]:
    """Headers that are for whoever asked, not for the next hop."""
    hop = {*_HOP, *(name.strip().lower() for name in ",".join(headers.getall("Connection", [])).split(","))}
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in hop)


def _request_headers(request: web.BaseRequest) -> CIMultiDict[str]:
    kept = _kept(request.headers)
    for name in (*_CLAIMS, BACKEND):
        kept.popall(name, None)
    kept["X-Forwarded-For"] = request.remote or "unknown"
    return kept


def _refusal(status: int, reason: str, retry: bool = False) -> web.Response:
    return web.json_response({"error": reason}, status=status, headers={"Retry-After": "1"} if retry else None)


async def serve(host: str, port: int, routes: Path, grpc_port: int = 0) -> None:
    """Serve until SIGTERM or SIGINT; then requests in flight have some seconds to end. `grpc_port` 0: no gRPC."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    proxy = Proxy(Router(routes))
    door = Door(proxy)
    listening: list[asyncio.Server] = [await loop.create_server(door, host, port, backlog=1024)]
    if grpc_port:
        tunnel = Tunnel(proxy.router, proxy.meters)
        listening.append(await asyncio.start_server(tunnel.serve, host, grpc_port, limit=2**16))
    log.info("production's proxy listens on %s:%d", host, port)
    await stop.wait()
    for one in listening:
        one.close()
    door.pre_shutdown()
    await door.shutdown(_STOP_S)
    await proxy.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM; the exit code."""
    parser = argparse.ArgumentParser(prog="facemllm.serve.local.proxy", description="Production's proxy.")
    parser.add_argument("--port", type=int, required=True, help="port on loopback")
    parser.add_argument("--routes", type=Path, required=True, help="file that says what goes where")
    parser.add_argument("--grpc-port", type=int, default=0, help="port on loopback; 0: no gRPC")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # a traceback for each request that is none
    allow_files(2 * MAX_CONNECTIONS)
    asyncio.run(serve(HOST, options.port, options.routes, options.grpc_port))
    return 0


if __name__ == "__main__":
    sys.exit(main())
