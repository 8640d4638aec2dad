"""Production's proxy before tiny servers: shares, streams, switches under load, servers that refuse or break off."""

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from facemllm.core.processes import Identity
from facemllm.core.routes import Routes
from facemllm.core.servers import Deployed
from facemllm.serve.guard import connections
from facemllm.serve.local.proxy import MAX_CONNECTIONS, Door, Proxy
from facemllm.serve.local.routing import Router
from facemllm.serve.local.tunnel import Tunnel
from tests.guarded import guard

ME = Identity.of(os.getpid())
Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


def named(name: str, port: int) -> Deployed:
    return Deployed(Path("/m"), name, "1", name, port)


class World:
    """A proxy, the servers behind it by name, and a client."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "production.model"
        self.proxy = Proxy(Router(self.path, random.Random(0)))
        self.client = aiohttp.ClientSession(auto_decompress=False)
        self.listening: dict[str, asyncio.Server] = {}
        self.requests: dict[str, list[dict[str, str]]] = {}
        self.url = ""

    async def start(self) -> None:
        self.door = await asyncio.get_running_loop().create_server(Door(self.proxy), "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.door.sockets[0].getsockname()[1]}"

    async def backend(self, name: str, handler: Handler | None = None) -> Deployed:
        """A server that says its name, or does what it is told."""
        requests = self.requests.setdefault(name, [])

        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            requests.append(dict(request.headers))
            return await handler(request) if handler else web.Response(text=name)

        made = await asyncio.get_running_loop().create_server(
            web.Server(handle, access_log=None, handler_cancellation=True), "127.0.0.1", 0
        )
        self.listening[name] = made
        return named(name, made.sockets[0].getsockname()[1])

    def route(self, stable: Deployed, canary: Deployed | None = None, percent: float = 0, owner: Any = ME) -> None:
        Routes(stable, canary, percent, owner).write(self.path)

    async def ask(self, path: str = "/", **given: Any) -> tuple[int, str]:
        async with self.client.post(self.url + path, **given) as reply:
            return reply.status, await reply.text()

    async def status(self) -> dict[str, Any]:
        async with self.client.get(self.url + "/proxy/status") as reply:
            found: dict[str, Any] = await reply.json()
            return found


@asynccontextmanager
async def world(folder: Path) -> AsyncIterator[World]:
    made = World(folder)
    await made.start()
    try:
        yield made
    finally:
        for server in (made.door, *made.listening.values()):
            server.close()
        await made.client.close()
        await made.proxy.close()


def run(folder: Path, work: Callable[[World], Awaitable[None]]) -> None:
    async def whole() -> None:
        async with asyncio.timeout(60), world(folder) as made:
            await work(made)

    asyncio.run(whole())


def test_a_canary_gets_its_share_and_none_once_nobody_drives_it(tmp_path: Path) -> None:
    async def work(w: World) -> None:
        a, b = await w.backend("a"), await w.backend("b")
        w.route(a, b, 30)
        said = Counter([(await w.ask())[1] for _ in range(300)])
        assert 60 < said["b"] < 120, said
        w.route(a, b, 100)
        assert {(await w.ask())[1] for _ in range(10)} == {"b"}
        w.route(a, b, 0)
        assert {(await w.ask())[1] for _ in range(10)} == {"a"}
        w.route(a, b, 100, replace(ME, started=ME.started - 9))  # as of a release that was killed
        assert {(await w.ask())[1] for _ in range(10)} == {"a"}
        counted = await w.status()
        assert counted["stable"] == "a"
        assert "canary" not in counted
        assert counted["backends"]["a"]["requests"] + counted["backends"]["b"]["requests"] == 330

    run(tmp_path, work)


def test_a_request_may_name_its_server_and_is_told_which_answered(tmp_path: Path) -> None:
    async def work(w: World) -> None:
        a, b = await w.backend("a"), await w.backend("b")
        w.route(a, b, 0)
        for name in ("b", "a"):
            async with w.client.get(w.url, headers={"X-Backend": name}) as reply:
                assert (await reply.text(), reply.headers["X-Backend"]) == (name, name)
        assert await w.ask(headers={"X-Backend": "c"}) == (503, '{"error": "X-Backend: no such server"}')

    run(tmp_path, work)


def test_headers_of_the_next_hop_and_claims_of_the_client_stay_behind(tmp_path: Path) -> None:
    async def work(w: World) -> None:
        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            return web.Response(body=b"\x1f\x8bnot gzip at all", headers={"Content-Encoding": "gzip", "X-Own": "1"})

        w.route(await w.backend("a", answer))
        sent = {"X-Forwarded-For": "9.9.9.9", "Forwarded": "for=9.9.9.9", "Connection": "X-Secret", "X-Secret": "1"}
        async with w.client.get(w.url + "/x?q=%2F&r=a+b", headers={**sent, "X-Kept": "2"}) as reply:
            assert (await reply.read(), reply.headers["X-Own"]) == (b"\x1f\x8bnot gzip at all", "1")
            assert reply.headers["Content-Encoding"] == "gzip"
        headers = w.requests["a"][0]
        assert (headers["X-Forwarded-For"], headers["X-Kept"]) == ("127.0.0.1", "2")
        assert not {"Forwarded", "X-Secret"} & set(headers)

    run(tmp_path, work)


def test_bodies_stream_both_ways_before_they_end(tmp_path: Path) -> None:
    """Each side goes on only when the other has got what it sent: a proxy that gathers bodies would wait for ever."""

    async def work(w: World) -> None:
        async def echo(request: web.BaseRequest) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            async for block in request.content.iter_any():
                await response.write(block)
            return response

        w.route(await w.backend("a", echo))
        heard: asyncio.Queue[bytes] = asyncio.Queue()

        async def blocks() -> AsyncIterator[bytes]:
            for number in range(5):
                yield b"data: %d\n\n" % number
                assert await heard.get() == b"data: %d\n\n" % number

        async with w.client.post(w.url, data=blocks()) as reply:
            async for block in reply.content.iter_any():
                heard.put_nowait(block)
        assert reply.status == 200

    run(tmp_path, work)


def test_memory_stays_bounded_when_the_client_does_not_read(tmp_path: Path) -> None:
    async def work(w: World) -> None:
        sent = 0

        async def flood(request: web.BaseRequest) -> web.StreamResponse:
            nonlocal sent
            response = web.StreamResponse()
            await response.prepare(request)
            for _ in range(2000):
                await response.write(bytes(2**17))
                sent += 2**17
            return response

        w.route(await w.backend("a", flood))
        _, writer = await asyncio.open_connection("127.0.0.1", int(w.url.rpartition(":")[2]), limit=2**16)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        last = -1
        while last != sent or sent == 0:  # until it stands still
            last = sent
            await asyncio.sleep(0.3)
        assert sent < 100 * 2**17, "what nobody reads is gathered"
        writer.close()
        while (await w.status())["backends"]["a"]["in_flight"]:
            await asyncio.sleep(0.01)
        assert (await w.status())["backends"]["a"]["left"] == 1

    run(tmp_path, work)


def test_a_switch_under_load_loses_no_request_and_those_begun_end_where_they_began(tmp_path: Path) -> None:
    async def work(w: World) -> None:
        def slow(name: str) -> Handler:
            async def answer(request: web.BaseRequest) -> web.StreamResponse:
                await asyncio.sleep(random.random() / 50)
                return web.Response(text=name)

            return answer

        backends = {name: await w.backend(name, slow(name)) for name in "ab"}
        w.route(backends["a"])
        replies: list[tuple[int, str]] = []
        stop = asyncio.Event()

        async def client() -> None:
            while not stop.is_set():
                replies.append(await w.ask(data=bytes(1000)))

        clients = [asyncio.create_task(client()) for _ in range(16)]
        serving = "a"
        for _ in range(6):
            other = "b" if serving == "a" else "a"
            for percent in (10, 50, 100):
                w.route(backends[serving], backends[other], percent)
                await asyncio.sleep(0.02)
            w.route(backends[other])
            while (await w.status())["backends"][serving]["in_flight"]:
                await asyncio.sleep(0.005)
            w.listening.pop(serving).close()  # drained: it stops, and another one starts under the same name
            backends[serving] = await w.backend(serving, slow(serving))
            serving = other
        stop.set()
        await asyncio.gather(*clients)
        assert {status for status, _ in replies} == {200}
        assert {name for _, name in replies} == {"a", "b"}
        counted = (await w.status())["backends"]
        assert sum(one["requests"] for one in counted.values()) == len(replies)
        assert sum(one["errors"] for one in counted.values()) == 0

    run(tmp_path, work)


def test_a_refused_connection_is_tried_once_on_the_other_server(tmp_path: Path) -> None:
    async def work(w: World) -> None:
        a, gone = await w.backend("a"), await w.backend("b")
        w.listening.pop("b").close()
        w.route(a, gone, 100)
        assert await w.ask(data=b"x" * 100) == (200, "a")
        w.route(gone, a, 0)
        assert await w.ask(data=b"x" * 100) == (200, "a")
        counted = (await w.status())["backends"]
        assert (counted["b"]["refused"], counted["b"]["errors"], counted["a"]["errors"]) == (2, 2, 0)
        w.route(gone)
        status, text = await w.ask()
        assert (status, json.loads(text)) == (503, {"error": "the model's server does not answer"})

    run(tmp_path, work)


DYING = """
import asyncio, sys
async def serve(reader, writer):
    await reader.readuntil(b"\\r\\n\\r\\n")
    if sys.argv[1] == "half":
        writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 1000\\r\\n\\r\\nhalf")
        await writer.drain()
    await asyncio.sleep(600)
async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


@pytest.mark.parametrize("when", ["before", "half"])
def test_what_a_killed_server_loses_is_what_it_had_begun_and_is_counted(tmp_path: Path, when: str) -> None:
    async def work(w: World) -> None:
        process = subprocess.Popen([sys.executable, "-c", DYING, when], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout
            a, b = await w.backend("a"), named("b", int(process.stdout.readline()))
            w.route(a, b, 100)

            async def begun() -> str:
                try:
                    return str((await w.ask(data=b"x"))[0])
                except aiohttp.ClientError:
                    return "broken"

            asked = [asyncio.create_task(begun()) for _ in range(3)]
            while (await w.status())["backends"].get("b", {}).get("in_flight") != 3:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)
            process.kill()
            assert await asyncio.gather(*asked) == (["502"] * 3 if when == "before" else ["broken"] * 3)
            process.wait()
            assert await w.ask(data=b"x") == (200, "a"), "later ones go to the other server"
            counted = (await w.status())["backends"]["b"]
            assert (counted["broken"], counted["refused"], counted["errors"], counted["requests"]) == (3, 1, 4, 4)
        finally:
            process.kill()
            process.wait()

    run(tmp_path, work)


def test_work_of_a_client_that_left_is_not_done(tmp_path: Path) -> None:
    async def work(w: World) -> None:
        dropped = asyncio.Event()

        async def endless(request: web.BaseRequest) -> web.StreamResponse:
            try:
                await asyncio.sleep(600)
            except asyncio.CancelledError:
                dropped.set()
                raise
            raise AssertionError

        w.route(await w.backend("a", endless))
        with pytest.raises(TimeoutError):
            await w.ask(timeout=aiohttp.ClientTimeout(total=0.2))
        await dropped.wait()
        counted = (await w.status())["backends"]["a"]
        assert (counted["left"], counted["errors"], counted["in_flight"]) == (1, 0, 0)

    run(tmp_path, work)


def test_statuses_pass_and_5xx_and_busy_ones_are_counted_apart(tmp_path: Path) -> None:
    async def work(w: World) -> None:
        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            return web.json_response({"error": "said"}, status=int(request.path[1:]), headers={"Retry-After": "3"})

        w.route(await w.backend("a", answer))
        for status in (200, 302, 404, 422, 429, 500, 503):
            async with w.client.post(f"{w.url}/{status}", data=b"1", allow_redirects=False) as reply:
                assert (reply.status, reply.headers["Retry-After"]) == (status, "3")
        counted = (await w.status())["backends"]["a"]
        assert [counted[name] for name in ("requests", "errors", "busy", "broken")] == [6, 2, 1, 0]
        assert sum(counted["latency"].values()) == 4

    run(tmp_path, work)


def test_an_answer_that_comes_before_the_body_was_read_is_passed_on(tmp_path: Path) -> None:
    async def work(w: World) -> None:
        async def large(request: web.BaseRequest) -> web.StreamResponse:
            return web.json_response({"error": "too large"}, status=413, headers={"Connection": "close"})

        w.route(await w.backend("a", large))
        for size in (10**5, 10**7):
            assert await w.ask(data=bytes(size)) == (413, '{"error": "too large"}')

    run(tmp_path, work)


def test_what_cannot_be_routed_is_refused_in_one_line(tmp_path: Path) -> None:
    async def work(w: World) -> None:
        assert await w.ask() == (503, '{"error": "no model is in production"}')
        w.route(await w.backend("a"))
        assert await w.ask() == (200, "a")
        w.path.write_text("{")  # never written so by us; the last good routes hold
        assert await w.ask() == (200, "a")
        async with w.client.get(w.url + "/proxy/other") as reply:
            assert reply.status == 404
        for head, status in {"GET http://evil/ HTTP/1.1": b"400", "GET / HTTP/1.1\r\nA: " + "x" * 9000: b"400"}.items():
            reader, writer = await asyncio.open_connection("127.0.0.1", int(w.url.rpartition(":")[2]))
            writer.write(head.encode() + b"\r\nHost: x\r\n\r\n")
            assert (await reader.readline()).split()[1] == status
            writer.close()
        assert len(w.requests["a"]) == 2

    run(tmp_path, work)


def test_connections_are_capped_and_slow_heads_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("facemllm.serve.local.proxy.MAX_CONNECTIONS", 3)
    monkeypatch.setattr("facemllm.serve.local.proxy._HEADER_S", 0.3)
    assert MAX_CONNECTIONS > 1000

    async def work(w: World) -> None:
        w.route(await w.backend("a"))
        port = int(w.url.rpartition(":")[2])
        slow = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        for _, writer in slow:
            writer.write(b"GET / HTTP/1.1\r\nHost")
        reader, _ = await asyncio.open_connection("127.0.0.1", port)
        assert await _ended(reader)
        for reader, _ in slow:
            assert await _ended(reader)
        assert await w.ask() == (200, "a")

    run(tmp_path, work)


async def _ended(reader: asyncio.StreamReader) -> bool:
    try:
        return await reader.read() == b""
    except ConnectionError:
        return True


def test_routes_survive_their_file(tmp_path: Path) -> None:
    path = tmp_path / "routes"
    written = Routes(named("a", 1), named("b", 2), 10, ME)
    written.write(path)
    assert Routes.read(path) == written
    assert written.driven()
    assert not replace(written, owner=None).driven()
    for damaged in ("", "[1]", '{"model": 3}', path.read_text()[:-9]):
        path.write_text(damaged)
        assert Routes.read(path) is None


def test_the_proxy_ends_what_it_has_begun_on_sigterm(tmp_path: Path) -> None:
    async def work(w: World) -> None:
        begun = asyncio.Event()

        async def slow(request: web.BaseRequest) -> web.StreamResponse:
            begun.set()
            await asyncio.sleep(0.5)
            return web.Response(text="whole")

        w.route(await w.backend("a", slow))
        code = (
            "import asyncio, socket, sys; from pathlib import Path; from facemllm.serve.local import proxy\n"
            "s = socket.socket(); s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]; s.close()\n"
            "print(port, flush=True)\n"
            "asyncio.run(proxy.serve('127.0.0.1', port, Path(sys.argv[1])))"
        )
        process = subprocess.Popen([sys.executable, "-c", code, str(w.path)], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout
            w.url = f"http://127.0.0.1:{process.stdout.readline().strip()}"
            until = time.monotonic() + 30
            while True:
                try:
                    await w.status()
                    break
                except aiohttp.ClientError:
                    assert time.monotonic() < until
                    await asyncio.sleep(0.05)
            asked = asyncio.create_task(w.ask(data=b"x"))
            await begun.wait()
            process.terminate()
            assert await asked == (200, "whole")
            while process.poll() is None:
                await asyncio.sleep(0.05)
            assert process.returncode == 0
        finally:
            process.kill()
            process.wait()

    run(tmp_path, work)


def test_grpc_calls_go_on_while_one_server_takes_over_from_another(tmp_path: Path) -> None:
    grpc = pytest.importorskip("grpc", reason="comes with kserve")

    async def work(w: World) -> None:
        async def started(name: str) -> tuple[Any, Deployed]:
            async def say(request: bytes, context: Any) -> bytes:
                await asyncio.sleep(0.005)
                return name.encode()

            server = grpc.aio.server(options=connections.grpc_options(guard(grpc_age_s=1), 2**20))
            handlers = {"M": grpc.unary_unary_rpc_method_handler(say)}
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("S", handlers),))
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            return server, replace(named(name, 0), grpc_port=port)

        grpc.aio.init_grpc_aio()  # else the garbage collector ends gRPC's poller, and may wait for it for ever
        (first, a), (second, b) = await started("a"), await started("b")
        w.route(a)
        tunnel = Tunnel(w.proxy.router, w.proxy.meters)
        w.listening["grpc"] = await asyncio.start_server(tunnel.serve, "127.0.0.1", 0, limit=2**16)
        port = w.listening["grpc"].sockets[0].getsockname()[1]
        replies: list[bytes] = []
        stop = asyncio.Event()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:

            async def client() -> None:
                while not stop.is_set():
                    replies.append(await channel.unary_unary("/S/M")(b"", timeout=20))

            clients = [asyncio.create_task(client()) for _ in range(4)]
            while len(replies) < 50:
                await asyncio.sleep(0.01)
            assert w.proxy.meters["a"].tunnels == 1
            w.route(b)
            while w.proxy.meters["a"].tunnels:
                await asyncio.sleep(0.01)
            await first.stop(5)
            before = len(replies)
            while len(replies) < before + 50:
                await asyncio.sleep(0.01)
            stop.set()
            await asyncio.gather(*clients)  # no call has failed
        assert set(replies[before:]) == {b"b"}
        await second.stop(0)

    run(tmp_path, work)


def test_a_client_that_waits_for_leave_to_send_its_body_gets_it(tmp_path: Path) -> None:
    async def work(w: World) -> None:
        w.route(await w.backend("a"))
        address = w.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(address[0], int(address[1]))
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"{}")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        writer.close()

    run(tmp_path, work)
