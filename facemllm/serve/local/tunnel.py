"""gRPC through production's proxy: TCP connections passed on as they are, each to one server for as long as it lasts.

A gRPC client keeps one connection for all its calls, so a canary gets its share of connections here, not of requests,
and is not judged by them. A server tells its clients to go away (GOAWAY) once their connection is so old
(`serve.guard.grpc_age_s`); they connect anew, to the one that serves now, and no call fails. The old one is stopped
after that.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from facemllm.core.servers import HOST
from facemllm.serve.local.meters import Meter
from facemllm.serve.local.routing import Router

log = logging.getLogger("facemllm.proxy")

MAX_TUNNELS = 512
_BLOCK = 2**16


class Tunnel:
    """Serves connections; `meters` are the proxy's."""

    def __init__(self, router: Router, meters: dict[str, Meter]) -> None:
        self._router, self._meters, self._open = router, meters, 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass on one connection until either side ends it."""
        self._open += 1
        try:
            for backend in self._router.order() if self._open <= MAX_TUNNELS else ():
                with contextlib.suppress(OSError):
                    back_reader, back_writer = await asyncio.open_connection(HOST, backend.grpc_port, limit=_BLOCK)
                    meter = self._meters.setdefault(backend.name, Meter())
                    meter.tunnels += 1
                    try:
                        await _joined((reader, back_writer), (back_reader, writer))
                    finally:
                        meter.tunnels -= 1
                        back_writer.transport.abort()
                    return
        finally:
            self._open -= 1
            writer.close()


async def _joined(*ways: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
    """Copy both ways until one has ended; what the other side has not sent by then nobody waits for."""
    copying = [asyncio.create_task(_copied(*way)) for way in ways]
    try:
        await asyncio.wait(copying, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for one in copying:
            one.cancel()
        await asyncio.gather(*copying, return_exceptions=True)


async def _copied(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while block := await reader.read(_BLOCK):
            writer.write(block)
            await writer.drain()
