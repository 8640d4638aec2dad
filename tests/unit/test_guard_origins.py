"""What a page from elsewhere has a browser send is refused at every door."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from facemllm.serve.doors.errors import refusal
from facemllm.serve.guard import middleware
from tests.guarded import guard

OWN = "127.0.0.1:18080"


def client(host: str | None, **changes: object) -> TestClient:
    application = Starlette(
        routes=[Route("/{path:path}", lambda _: PlainTextResponse("well"), methods=["GET", "POST"])]
    )
    middleware.install(application, guard(**changes), 2**20, refusal, host=host)
    return TestClient(application)


@pytest.mark.parametrize("path", ["/", "/page/feedback", "/v1/models/face-mllm:predict", "/openai/v1/chat/completions"])
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site", "origin": f"http://{OWN}"}, 403),
        ({"sec-fetch-site": "same-origin", "origin": "https://behind.a.proxy"}, 200),
        ({"origin": f"http://{OWN}"}, 200),
        ({}, 200),
    ],
)
def test_what_another_sites_page_posts_is_refused(path: str, headers: dict[str, str], status: int) -> None:
    answer = client(None).post(path, json={}, headers={"host": OWN, **headers})
    assert answer.status_code == status
    assert client(None).get(path, headers={"host": OWN, **headers}).status_code == 200


@pytest.mark.parametrize(
    ("name", "status"),
    [
        *((one, 200) for one in (OWN, "localhost", "LOCALHOST:1", "[::1]:18080", "face.localhost", "127.0.0.9")),
        *((one, 421) for one in ("evil.example", "127.0.0.1.evil.example", "10.0.0.1", "localhost.evil.example:18080")),
        *((one, 421) for one in ("[::1", "", "evil.example@localhost.example")),
    ],
)
def test_on_loopback_it_answers_to_names_of_loopback(name: str, status: int) -> None:
    for host in ("127.0.0.1", "::1"):
        assert client(host).get("/", headers={"host": name}).status_code == status
    for host in ("0.0.0.0", None):
        assert client(host).get("/", headers={"host": name}).status_code == 200


def test_a_proxys_name_can_be_listed() -> None:
    listed = client("127.0.0.1", hosts=["faces.example.org"])
    assert listed.get("/", headers={"host": "faces.example.org"}).status_code == 200
    assert listed.get("/", headers={"host": "other.example.org"}).status_code == 421
