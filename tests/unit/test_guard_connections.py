"""Connections over real sockets: idle and slow ones, headers, how many there are, TLS, and gRPC's own limits."""

import asyncio
import contextlib
import functools
import gc
import json
import resource
import socket
import ssl
import time
import urllib.error
import urllib.request
import weakref

import grpc
import pytest
import uvicorn
import uvloop
from fastapi import FastAPI
from starlette.responses import JSONResponse, PlainTextResponse
from uvicorn.server import ServerState

from facemllm.errors import UserError
from facemllm.serve.doors.errors import refusal
from facemllm.serve.doors.grpc import Statuses
from facemllm.serve.guard import connections, http_protocol, middleware
from facemllm.serve.guard.descriptors import allow_files
from facemllm.serve.guard.keys import made
from facemllm.serve.observer import Observer, grpc_interceptor
from tests.guarded import app, certificate, connect, guard, said, serving

GET = b"GET / HTTP/1.1\r\nHost: x\r\n"
SLOW = {"header_s": 0.3, "idle_s": 1}
LONG = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 100002\r\n\r\n" + b'"%s"' % (b"x" * 100_000)


@pytest.fixture(scope="module")
def port():
    with serving(guard(max_headers=20, header_kb=8)) as found:
        yield found


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ",
        b"GET /no HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n123",
    ],
    ids=["nothing", "empty lines", "a header", "the rest of a body that nobody reads"],
)
def test_a_connection_without_a_request_is_closed(sent):
    with serving(guard(**SLOW)) as port, connect(port) as connection:
        connection.sendall(sent)
        assert b" 200 " not in said(connection)


def test_headers_that_come_byte_by_byte_do_not_hold_a_connection():
    with serving(guard(**SLOW)) as port, connect(port) as connection:
        connection.sendall(GET + b"X-Slow: ")
        connection.settimeout(0.02)
        for _ in range(1000):
            try:
                connection.sendall(b"x")
                if connection.recv(1) == b"":
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        else:
            pytest.fail("the connection stayed open")


def test_requests_follow_one_another_on_a_connection(port):
    with connect(port) as connection:
        for _ in range(3):
            connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
            assert b'"bytes":2' in connection.recv(2**16)
        connection.sendall((GET + b"\r\n") * 3 + GET + b"Connection: close\r\n\r\n")
        assert said(connection).count(b" 200 ") == 4


@pytest.mark.parametrize(
    "sent",
    [
        GET + b"X-Long: " + b"x" * 10_000 + b"\r\n\r\n",
        GET + b"X-Endless: " + b"x" * 300_000,
        GET + b"X: y\r\n" * 21 + b"\r\n",
        b"GET /" + b"x" * 10_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
    ids=["long", "endless", "many", "address"],
)
def test_large_headers_are_refused_in_one_line(port, sent):
    with connect(port) as connection:
        connection.sendall(sent)
        head, _, body = said(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 ")
    assert json.loads(body) == {"error": "the headers are too large; this server takes 8 kB in 20 headers"}


def test_trailers_and_tiny_chunks_are_no_way_around(port):
    start = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    for rest in (b"2\r\n{}\r\n0\r\nX-Endless: " + b"x" * 300_000, b"1;" + b"x" * 300_000):
        with connect(port) as connection:
            connection.sendall(start + rest)
            assert b" 431 " in said(connection)
    with connect(port) as connection:
        connection.sendall(start + b"2\r\n{}\r\n0\r\nX-Trailer: y\r\n\r\n")
        assert b'"bytes":2' in connection.recv(2**16)


def test_what_is_not_http_is_refused_in_one_line(port):
    with connect(port) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        assert said(connection).endswith(b'{"error": "this is not HTTP as this server reads it"}')


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", b"400"),
        (GET + b"Host: y\r\n\r\n", b"400"),
        (b"GET / HTTP/1.0\r\n\r\n", b"200"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", b"501"),
    ],
    ids=["no host", "two hosts", "an old client", "a coding"],
)
def test_what_http_wants_of_headers(port, sent, status):
    with connect(port) as connection:
        connection.sendall(sent)
        assert said(connection).split()[1] == status


def test_head_is_get_without_a_body():
    application = FastAPI()  # which has no HEAD of its own
    application.add_api_route("/", lambda: "four", methods=["GET"])
    middleware.install(application, guard(), 2**20, refusal)
    with serving(guard(), application) as port, connect(port) as connection:
        connection.sendall(b"HEAD / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        head, _, body = said(connection).partition(b"\r\n\r\n")
    assert b" 200 " in head
    assert b"content-length: 6" in head
    assert body == b""


@pytest.mark.parametrize("answers", [True, False])
def test_who_sends_no_more_is_answered_and_has_left_after_a_while(monkeypatch, answers):
    if not answers:
        monkeypatch.setattr(http_protocol, "_PARTING_S", 0.1)

    async def go():
        heard = []

        async def application(scope, receive, send):
            await receive()
            while not next(iter(state))._late:  # the end has not come
                await asyncio.sleep(0)
            if answers:
                await PlainTextResponse("ok")(scope, receive, send)
            else:
                heard.append((await receive())["type"])

        async with in_this_loop(guard(), application) as (port, state):
            client = connect(port)
            client.sendall(GET + b"\r\n")
            client.shutdown(socket.SHUT_WR)
            return await asyncio.to_thread(said, client), heard

    answer, heard = run(go())
    assert answer.endswith(b"ok" if answers else b"")
    assert bool(answer) is answers
    assert heard == ([] if answers else ["http.disconnect"])


def test_idle_connections_make_room_and_busy_ones_do_not():
    with serving(guard(max_connections=4)) as port:
        idle = [connect(port) for _ in range(12)]
        with connect(port) as connection:
            connection.sendall(GET + b"Connection: close\r\n\r\n")
            assert b" 200 " in said(connection)  # to its end, so that it is counted no more
        assert said(idle[0]) == b""
        busy = [connect(port) for _ in range(4)]
        for one in busy:
            one.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n")
            assert one.recv(2**16).startswith(b"HTTP/1.1 100 ")  # it is being read
        with connect(port) as connection:
            answer = said(connection)
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b"retry-after: 1" in answer
        for one in (*idle, *busy):
            one.close()


@contextlib.asynccontextmanager
async def in_this_loop(limits, application=None):
    """The port of a server in the loop that runs, and its connections."""
    config = uvicorn.Config(application or app(limits), log_config=None, lifespan="off")
    connections.apply(config, limits)
    config.load()
    state = ServerState()
    made = functools.partial(config.http_protocol_class, config=config, server_state=state, app_state={})
    async with await asyncio.get_running_loop().create_server(made, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1], state.connections
        for one in list(state.connections):
            one.transport.abort()


def run(work):
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def test_of_more_clients_than_there_is_room_for_each_hears_an_answer():
    """All have asked before the server gets round to the first."""

    async def go():
        async with in_this_loop(guard(max_connections=4)) as (port, _):
            clients = [connect(port) for _ in range(12)]
            for one in clients:
                one.sendall(LONG)
            return await asyncio.to_thread(lambda: [said(one) for one in clients])

    answers = run(go())
    served = [b" 200 " in answer for answer in answers]
    assert sum(served) >= 4
    assert all(ok or answer.startswith(b"HTTP/1.1 503 ") for ok, answer in zip(served, answers, strict=True))


def test_of_requests_that_do_not_wait_for_answers_few_are_read_and_all_are_answered():
    """The first answer is held back while far more come than a connection may have waiting."""
    number, waiting = 12_000, []

    async def go():
        gate = asyncio.Event()

        async def application(scope, receive, send):
            await receive()
            await gate.wait()
            waiting.append(max(len(one.pipeline) for one in state))
            await PlainTextResponse("ok")(scope, receive, send)

        async with in_this_loop(guard(), application) as (port, state):
            client = connect(port)

            def send():
                client.sendall((GET + b"\r\n") * number + GET + b"Connection: close\r\n\r\n")

            sending = asyncio.create_task(asyncio.to_thread(send))
            while not any(one._unfed for one in state):
                await asyncio.sleep(0)
            (one,) = state
            held = len(one.pipeline), len(one._unfed), one.flow.read_paused
            gate.set()
            answer = await asyncio.to_thread(said, client)
            await sending
            return held, answer

    (requests, unread, paused), answer = run(go())
    most = 8 + 1024 // len(GET)  # requests in the last piece that was parsed come together
    assert 8 <= requests <= most
    assert max(waiting) <= most
    assert unread <= 2**18
    assert paused
    assert answer.count(b"HTTP/1.1 200 ") == number + 1


@pytest.mark.parametrize("late", ["_give_up", "timeout_keep_alive_handler"])
def test_a_request_that_is_there_unread_keeps_its_connection(late):
    """The timer of a connection without a request comes first where the loop was held up."""

    async def go():
        async with in_this_loop(guard()) as (port, made):
            client = connect(port)
            while not made:
                await asyncio.sleep(0)
            client.sendall(GET + b"Connection: close\r\n\r\n")
            getattr(next(iter(made)), late)()
            return await asyncio.to_thread(said, client)

    assert b" 200 " in run(go())


def test_a_connection_whose_body_came_behind_its_answer_may_wait_as_long_as_any():
    async def go():
        async with in_this_loop(guard(), JSONResponse("", 429)) as (port, made):
            client = connect(port)
            client.sendall(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n")
            answer = await asyncio.to_thread(client.recv, 2**16)
            client.sendall(b"{}")
            (one,) = made
            while not one._at_head:
                await asyncio.sleep(0)
            return answer, one._late, one.timeout_keep_alive_task.when() - asyncio.get_running_loop().time()

    answer, late, rest = run(go())
    assert b" 429 " in answer
    assert late is None
    assert rest > 60


def test_a_client_that_does_not_take_its_answer_is_cut_off():
    with serving(guard(body_s=0.5, max_connections=1)) as port, connect(port) as connection:
        connection.sendall(b"GET /long HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(1) == b"H"  # and nothing more
        while b" 200 " not in (answer := asked(port)):  # the only place is taken
            assert answer.startswith(b"HTTP/1.1 503 ")
            time.sleep(0.1)


def asked(port):
    with connect(port) as connection:
        connection.sendall(GET + b"Connection: close\r\n\r\n")
        return said(connection)


def test_tls_for_rest_and_a_certificate_that_is_not_there(tmp_path):
    files = certificate(tmp_path)
    trust = ssl.create_default_context(cafile=files[0])
    with serving(guard(tls=files)) as port:
        with urllib.request.urlopen(f"https://localhost:{port}/", context=trust, timeout=30) as reply:
            assert reply.status == 200
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            urllib.request.urlopen(f"http://localhost:{port}/", timeout=30)
    with pytest.raises(UserError, match=r"serve\.guard\.tls: .*none\.pem cannot be read"):
        connections.grpc_credentials(guard(tls=(str(tmp_path / "none.pem"), files[1])))
    assert connections.grpc_credentials(guard()) is None


def call(limits, requests, *, metadata=(), interceptors=(), trusted=None, method="Ask", compression=None, reader=None):
    """Codes, or answers, of calls to a gRPC server with these limits that echoes how long a message is."""

    async def echo(request, context):
        return str(len(request)).encode()

    async def act():
        grpc.aio.init_grpc_aio()  # else the garbage collector ends gRPC's poller, and may wait for it for ever
        server = grpc.aio.server(options=connections.grpc_options(limits, 2**16), interceptors=interceptors)
        handlers = {name: grpc.unary_unary_rpc_method_handler(echo, reader) for name in ("Ask", "ServerLive")}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", handlers),))
        credentials = connections.grpc_credentials(limits)
        if credentials is None:
            port = server.add_insecure_port("127.0.0.1:0")
            channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", compression=compression)
        else:
            port = server.add_secure_port("127.0.0.1:0", credentials)
            if trusted:
                channel = grpc.aio.secure_channel(f"localhost:{port}", grpc.ssl_channel_credentials(trusted))
            else:
                channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        await server.start()
        found = []
        async with channel:
            for request in requests:
                try:
                    found.append(
                        await channel.unary_unary(f"/test.Echo/{method}")(request, metadata=metadata, timeout=30)
                    )
                except grpc.aio.AioRpcError as error:
                    found.append(error.code())
        await server.stop(None)
        return found

    return asyncio.run(act())


def test_grpc_messages_and_metadata_are_bounded_compressed_ones_too():
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    assert call(guard(), [b"x" * 100, b"x" * 2**17, b"x"]) == [b"100", code, b"1"]
    bomb = b"\0" * 2**24  # 16 kB when compressed
    assert call(guard(), [bomb, b"x"], compression=grpc.Compression.Gzip) == [code, b"1"]
    (found,) = call(guard(header_kb=8), [b"x"], metadata=(("long", "x" * 100_000),))
    assert found in (code, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE)


def test_connections_to_grpc_are_bounded():
    hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"  # a client's preface, and no settings
    limits = guard(max_connections=4)

    def greeted(port: int) -> bool:
        one = held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
        try:
            one.sendall(hello)
            return one.recv(1) != b""
        except ConnectionError:
            return False

    async def act() -> list[bool]:
        grpc.aio.init_grpc_aio()
        server = grpc.aio.server(options=connections.grpc_options(limits, 2**16))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        found = [await asyncio.to_thread(greeted, port) for _ in range(8)]
        await server.stop(None)
        return found

    with contextlib.ExitStack() as held:
        assert asyncio.run(act()) == [True] * 4 + [False] * 4


@pytest.mark.parametrize(
    ("limits", "asked", "soft"), [((64, 4096), 512, 512), ((64, 256), 512, 256), ((99, 256), 9, 99)]
)
def test_as_many_files_may_be_open_as_are_needed(monkeypatch: pytest.MonkeyPatch, limits, asked, soft):
    given = [limits]
    monkeypatch.setattr(resource, "getrlimit", lambda _: given[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: given.append(both))
    allow_files(asked)
    assert given[-1] == (soft, limits[1])


def test_grpc_speaks_tls_alone_where_there_is_a_certificate(tmp_path):
    files = certificate(tmp_path)
    trusted = (tmp_path / "cert.pem").read_bytes()
    assert call(guard(tls=files), [b"abc"], trusted=trusted) == [b"3"]
    assert call(guard(tls=files), [b"abc"]) == [grpc.StatusCode.UNAVAILABLE]


def test_a_grpc_message_that_cannot_be_read_is_the_callers_fault():
    def read(data):
        if data == b"broken":
            raise ValueError
        return data

    options = {"interceptors": connections.grpc_interceptors(guard()), "reader": read}
    assert call(guard(), [b"broken", b"abc"], **options) == [grpc.StatusCode.INVALID_ARGUMENT, b"3"]


def test_a_refused_call_and_its_message_are_forgotten_at_once():
    alive = weakref.WeakSet()

    class Message:
        """Has no length, so that the call fails."""

    def read(data: bytes) -> Message:
        alive.add(message := Message())
        return message

    class Noting(Observer):
        @contextlib.contextmanager
        def request(self, door, headers=None):
            with super().request(door, headers) as seen:
                yield seen
            statuses.append(seen.status)

    statuses: list[str] = []
    interceptors = [grpc_interceptor(Noting()), *connections.grpc_interceptors(guard()), Statuses()]
    gc.disable()  # what only it would find lives until it runs, and a message may have megabytes
    try:
        found = call(guard(), [b"x"] * 3, interceptors=interceptors, reader=read)
        assert (found, len(alive)) == ([grpc.StatusCode.INTERNAL] * 3, 0)
        assert call(guard(), [b"x"], interceptors=interceptors) == [b"1"]
        assert statuses == ["INTERNAL"] * 3 + ["OK"]
    finally:
        gc.enable()


def test_grpc_asks_for_a_key_but_for_health(tmp_path):
    key, line = made("ada")
    (tmp_path / "keys").write_text(line)
    check = connections.grpc_interceptors(guard(keys=str(tmp_path / "keys")))
    known = (("authorization", f"Bearer {key}"),)
    unknown = (("authorization", "Bearer other"),)
    denied = grpc.StatusCode.UNAUTHENTICATED
    assert call(guard(), [b"a"], interceptors=check) == [denied]
    assert call(guard(), [b"a"], metadata=unknown, interceptors=check) == [denied]
    assert call(guard(), [b"a"], metadata=known * 2, interceptors=check) == [denied]
    assert call(guard(), [b"a"], metadata=known, interceptors=check) == [b"1"]
    assert call(guard(), [b"a"], interceptors=check, method="ServerLive") == [b"1"]
