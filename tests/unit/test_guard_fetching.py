"""Pictures by address: from named hosts, at public addresses, to the very address that was checked."""

import asyncio
import base64
import ipaddress
import json
import threading
from http.server import BaseHTTPRequestHandler

import pytest

from facemllm.serve.guard.fetching import Fetcher, is_public
from facemllm.serve.guard.links import FetchImages
from facemllm.serve.language import Refused
from tests.answering import Loopback

PICTURE = b"\xff\xd8\xff picture"


class Pictures(BaseHTTPRequestHandler):
    def do_GET(self):
        status, headers, body = {
            "/face.jpg": (200, {"Content-Type": "image/jpeg"}, PICTURE),
            "/page": (200, {"Content-Type": "text/html"}, b"<html>"),
            "/packed": (200, {"Content-Type": "image/png", "Content-Encoding": "gzip"}, b"x"),
            "/large": (200, {"Content-Type": "image/png"}, b"x" * 5000),
            "/moved": (302, {"Location": "/face.jpg"}, b""),
            "/round": (302, {"Location": "/round"}, b""),
            "/away": (302, {"Location": f"http://other.test:{self.server.server_port}/face.jpg"}, b""),
            "/inside": (302, {"Location": f"http://inside.test:{self.server.server_port}/face.jpg"}, b""),
            "/file": (302, {"Location": "file:///etc/passwd"}, b""),
        }.get(self.path, (404, {}, b""))
        self.server.asked.append((self.headers["Host"], self.path))
        if self.path == "/slow":
            self.server.over.wait(30)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def server():
    with Loopback(Pictures) as made:
        made.asked, made.over = [], threading.Event()
        yield made
        made.over.set()


@pytest.fixture
def get(server):
    """`get(path)`: what a fetcher says that may connect to 127.0.0.1 and to nothing else."""
    port, resolved = server.server_port, []
    server.asked.clear()

    def go(path, host="faces.test", addresses=None, seconds=30.0, scheme="http"):
        known = {"faces.test": ["127.0.0.1"], "inside.test": ["127.0.0.2"], **(addresses or {})}

        async def resolve(name, number):
            resolved.append(name)
            found = known[name]
            return found.pop(0) if found and isinstance(found[0], list) else found

        fetcher = Fetcher(
            [f"{name}:{port}" for name in ("faces.test", "inside.test")],
            max_bytes=1000,
            seconds=seconds,
            resolve=resolve,
            allowed=lambda address: str(address) == "127.0.0.1",
        )
        return asyncio.run(fetcher.get(f"{scheme}://{host}:{port}{path}", "image"))

    go.resolved = resolved
    return go


@pytest.fixture
def through(server):
    """`through(body)`: the body that a route sees behind the middleware, or the status and line of a refusal."""
    port = server.server_port

    async def resolve(name, number):
        return ["127.0.0.1"]

    fetcher = Fetcher(
        [f"faces.test:{port}"], max_bytes=1000, seconds=30, resolve=resolve, allowed=lambda address: address.is_loopback
    )

    def go(body, max_bytes=1000):
        received, data = [], json.dumps(body).replace("HOST", f"http://faces.test:{port}").encode()

        async def app(scope, receive, send):
            received.append(await receive())

        async def receive():
            return {"type": "http.request", "body": data, "more_body": False}

        def refuse(path, refused):
            async def answer(scope, receive, send):
                received.append((refused.status, refused.reason))

            return answer

        scope = {"type": "http", "method": "POST", "path": "/"}
        asyncio.run(FetchImages(app, fetcher, max_bytes, refuse)(scope, receive, None))
        (found,) = received
        return json.loads(found["body"]) if isinstance(found, dict) else found

    return go


def test_addresses_in_bodies_of_two_forms_become_pictures(through, server):
    server.asked.clear()
    link, picture = {"url": "HOST/face.jpg"}, base64.b64encode(PICTURE).decode()
    asked = {"instances": [{"image": link, "question": "a"}, {"image": link, "question": "see http://x"}]}
    first, second = through(asked)["instances"]
    assert (first["image"], second) == ({"b64": picture}, {"image": {"b64": picture}, "question": "see http://x"})
    assert len(server.asked) == 1
    chat = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {**link, "detail": "low"}}]}]}
    (part,) = through(chat)["messages"][0]["content"]
    assert part["image_url"] == {"url": f"data:image/jpeg;base64,{picture}", "detail": "low"}
    plain = {"image": {"b64": "x"}, "url": "HOST/face.jpg", "tasks": ["http"]}
    assert through(plain)["image"] == {"b64": "x"}


def test_too_many_addresses_too_much_and_other_hosts_are_refused(through):
    many = {"instances": [{"image": {"url": "HOST/face.jpg"}}] * 9}
    assert through(many) == (413, "the body names 9 addresses; this server fetches 8")
    assert through({"image": {"url": "http://other.test/a.jpg"}})[0] == 403
    four = {"instances": [{"image": {"url": "HOST/face.jpg"}}] * 4}
    assert through(four, max_bytes=30)[0] == 413


def refused(act, *arguments, **options):
    with pytest.raises(Refused) as caught:
        act(*arguments, **options)
    assert "\n" not in caught.value.reason
    assert caught.value.reason.startswith("image ")
    return caught.value.status, caught.value.reason


def test_a_picture_and_a_redirect_to_one(get, server):
    assert get("/face.jpg") == PICTURE
    assert get("/moved") == PICTURE
    assert {host for host, _ in server.asked} == {f"faces.test:{server.server_port}"}


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/page", "does not call it an image"),
        ("/packed", "sends it compressed"),
        ("/large", "more than 1,000 bytes"),
        ("/none", "answers 404"),
        ("/round", "more than 3 redirects"),
        ("/away", "not fetched from other.test"),
        ("/inside", "leads to an address that is not public"),
        ("/file", "only plain https and http"),
    ],
)
def test_what_is_not_fetched(get, path, words):
    assert words in refused(get, path)[1]


def test_only_named_hosts_are_looked_up_at_all(get):
    assert refused(get, "/face.jpg", host="elsewhere.test")[0] == 403
    assert get.resolved == []


def test_a_name_with_one_private_address_among_public_ones_is_refused(get, server):
    addresses = {"faces.test": ["127.0.0.1", "10.0.0.1"]}
    assert "not public" in refused(get, "/face.jpg", addresses=addresses)[1]
    assert server.asked == []


def test_a_name_is_resolved_once_a_connection_so_that_it_cannot_change_its_mind(get):
    addresses = {"faces.test": [["127.0.0.1"], ["10.0.0.1"]]}
    assert get("/face.jpg", addresses=addresses) == PICTURE
    assert get.resolved == ["faces.test"]


def test_a_slow_server_is_given_up(get):
    assert "not fetched within 0.3 s" in refused(get, "/slow", seconds=0.3)[1]


@pytest.mark.parametrize(
    "url",
    [
        "ftp://faces.test/a", "file:///etc/passwd", "http://", "http://user:word@faces.test/", "http://faces.test\\@x/",
        "http://faces.test:99999/",
        "data:image/png;base64,AAAA", "http://fäces.test/", "http://faces.test/a b", "x" * 5000,
    ],
)  # fmt: skip
def test_addresses_that_are_no_plain_ones(url):
    fetcher = Fetcher(["faces.test"], max_bytes=10, seconds=5)
    assert refused(lambda: asyncio.run(fetcher.get(url, "image")))[0] == 422


PRIVATE = """127.0.0.1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 255.255.255.255
198.18.0.1 192.0.2.1 ::1 :: fe80::1 fc00::1 ff02::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 64:ff9b::7f00:1 2002:7f00:1::
2001:0:7f00:1:: 2001:db8::1 fec0::1"""


@pytest.mark.parametrize("address", PRIVATE.split())
def test_addresses_that_are_not_public(address):
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946", "::ffff:93.184.216.34"])
def test_public_ones(address):
    assert is_public(ipaddress.ip_address(address))
