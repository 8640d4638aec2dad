"""The door of the review page: hosts, origins, sessions, form tokens, sizes, paths, headers."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest
from starlette.testclient import TestClient

from facemllm.review.app import application
from facemllm.review.pages import Pages
from facemllm.review.security import MOST_BODY, Sessions
from tests.review_example import ADA, GRACE, PASSPHRASE, PIPELINE, Example, example, hidden

HOST = "127.0.0.1:15080"
ORIGIN = {"origin": f"http://{HOST}"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Example:
    made = example(tmp_path_factory.mktemp("review") / "home")
    made.say("request", made.bundle(1), PIPELINE, "")
    return made


@pytest.fixture
def bundle(workspace: Example) -> str:
    return workspace.decisions.bundles()[0]


def client_of(workspace: Example, read_only: bool = False, enter: bool = True) -> TestClient:
    sessions = Sessions(reusable=read_only)
    app = application(Pages(workspace.settings, read_only), sessions, [HOST])
    client = TestClient(app, f"http://{HOST}", raise_server_exceptions=False, follow_redirects=False)
    client.token = sessions.token  # type: ignore[attr-defined]
    if enter:
        assert client.get("/login", params={"token": sessions.token}).status_code == 200
    return client


@pytest.fixture
def client(workspace: Example) -> Iterator[TestClient]:
    with client_of(workspace) as made:
        yield made


def form(client: TestClient, workspace: Example, bundle: str, **fields: str) -> dict[str, str]:
    page = client.get(f"/requests/{bundle}").text
    asked = {"decision": "reject", "reason": "no", "key": workspace.keys[GRACE]}
    return {**hidden(page), **asked, **fields}


def test_without_a_session_nothing_is_shown(workspace: Example, bundle: str) -> None:
    client = client_of(workspace, enter=False)
    for path in ("/", f"/requests/{bundle}", f"/requests/{bundle}/files/bundle.json", "/nothing"):
        answer = client.get(path)
        assert answer.status_code == 401
        assert bundle[:12] not in answer.text
    assert client.get("/", headers={"cookie": "facemllm_review=made-up"}).status_code == 401
    assert client.get("/style.css").status_code == 200


def test_the_link_opens_one_session_once(workspace: Example) -> None:
    client = client_of(workspace, enter=False)
    assert client.get("/login", params={"token": "x" * 43}).status_code == 403
    answer = client.get("/login", params={"token": client.token})  # type: ignore[attr-defined]
    cookie = answer.headers["set-cookie"].lower()
    assert all(word in cookie for word in ("httponly", "samesite=strict", "path=/"))
    client.cookies.clear()
    assert client.get("/login", params={"token": client.token}).status_code == 403  # type: ignore[attr-defined]
    assert client.get("/").status_code == 401


def test_a_read_only_link_may_be_opened_by_several_and_nothing_can_be_posted(workspace: Example, bundle: str) -> None:
    client = client_of(workspace, read_only=True)
    client.cookies.clear()
    assert client.get("/login", params={"token": client.token}).status_code == 200  # type: ignore[attr-defined]
    page = client.get(f"/requests/{bundle}").text
    assert "<form" not in page
    assert "facemllm promote approve 1 --by" in page
    assert bundle[:12] in page
    for path in ("confirm", "sign"):
        answer = client.post(f"/requests/{bundle}/{path}", data={"csrf": "x"}, headers=ORIGIN)
        assert answer.status_code in (404, 405)


def test_a_session_ends() -> None:
    now = [0.0]
    sessions = Sessions(clock=lambda: now[0])
    cookie = sessions.enter(sessions.token)
    session = sessions.find(cookie)
    assert session is not None
    number = sessions.offer(session, "this")
    assert sessions.offered(session, number) == "this"
    now[0] = 3600.0
    assert sessions.offered(session, number) is None
    now[0] = 9 * 3600.0
    assert sessions.find(cookie) is None


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1:9", "127.0.0.1", "", "localhost.evil.example:15080"])
def test_another_host_name_is_refused(client: TestClient, host: str) -> None:
    assert client.get("/", headers={"host": host}).status_code == 421


@pytest.mark.parametrize(
    "origin", [None, "null", "http://evil.example", "http://127.0.0.1:9", f"http://{HOST}.evil.example", "file://"]
)
def test_a_form_of_another_site_is_refused(
    client: TestClient, workspace: Example, bundle: str, origin: str | None
) -> None:
    fields = form(client, workspace, bundle)
    headers = {} if origin is None else {"origin": origin}
    assert client.post(f"/requests/{bundle}/confirm", data=fields, headers=headers).status_code == 403
    assert client.post(f"/requests/{bundle}/confirm", data=fields, headers=ORIGIN).status_code == 200


@pytest.mark.parametrize("token", ["", "x", None])
def test_a_form_without_this_sessions_token_is_refused(
    client: TestClient, workspace: Example, bundle: str, token: str | None
) -> None:
    fields = form(client, workspace, bundle)
    fields = {**fields, "csrf": token} if token is not None else {k: v for k, v in fields.items() if k != "csrf"}
    answer = client.post(f"/requests/{bundle}/confirm", data=fields, headers=ORIGIN)
    assert answer.status_code == 403
    other = form(client_of(workspace), workspace, bundle)
    assert client.post(f"/requests/{bundle}/confirm", data=other, headers=ORIGIN).status_code == 403


def test_forms_are_bounded_and_read_strictly(client: TestClient, workspace: Example, bundle: str) -> None:
    path, fields = f"/requests/{bundle}/confirm", form(client, workspace, bundle)
    kind = {**ORIGIN, "content-type": "application/x-www-form-urlencoded"}
    statuses = {}
    for name, body in {
        "large": urlencode({**fields, "reason": "x" * MOST_BODY}).encode(),
        "twice": (urlencode(fields) + "&key=" + "0" * 64).encode(),
        "many": "&".join(f"a{i}=1" for i in range(99)).encode(),
        "no pairs": b"\xff\x00",
        "no text": (urlencode(fields) + "&x=%ff").encode(),
    }.items():
        statuses[name] = client.post(path, content=body, headers=kind).status_code
    assert statuses == {"large": 413, "twice": 400, "many": 400, "no pairs": 400, "no text": 400}
    assert client.post(path, json=fields, headers=ORIGIN).status_code == 415
    assert client.post(path, data=fields, files={"f": b"x"}, headers=ORIGIN).status_code == 415


@pytest.mark.parametrize(
    "path",
    [
        "/requests/{bundle}/files/policy.yaml",
        "/requests/{bundle}/files/..%2f..%2fpolicy.yaml",
        "/requests/{bundle}/files/samples%2f00.jpg",
        "/requests/{bundle}/images/bundle.json",
        "/requests/{bundle}/images/../bundle.json",
        "/requests/{bundle}/images/samples/..%2f..%2f..%2fsigning/policy.yaml",
        "/requests/{bundle}/images//etc/passwd",
        "/requests/{bundle}/images/samples/99.jpg",
        "/requests/..%2f..%2fetc",
        "/requests/" + "0" * 64,
        "/requests/{bundle}/",
        "/requests",
        "/docs",
        "/openapi.json",
        "/static/style.css",
        "/?state=nothing",
        "/?state=%00",
    ],
)
def test_no_other_path_leads_anywhere(client: TestClient, bundle: str, path: str) -> None:
    answer = client.get(path.replace("{bundle}", bundle))
    assert answer.status_code in (400, 404)
    assert "public_key" not in answer.text
    assert answer.text.count('role="alert"') == 1


def test_every_answer_forbids_scripts_frames_and_caches(client: TestClient, bundle: str) -> None:
    paths = ("/", f"/requests/{bundle}", f"/requests/{bundle}/files/card.md", "/nothing", "/style.css")
    for answer in [client.get(path) for path in paths] + [client.get("/", headers={"host": "x"})]:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["referrer-policy"] == "same-origin"
        assert "style=" not in answer.text
        assert "<script" not in answer.text.lower()


def test_files_are_downloads_and_pictures_pictures(client: TestClient, workspace: Example, bundle: str) -> None:
    card = client.get(f"/requests/{bundle}/files/card.md")
    assert card.headers["content-disposition"].startswith("attachment")
    assert card.content == workspace.decisions.bundle_file(bundle, "card.md")
    picture = client.get(f"/requests/{bundle}/images/samples/00.jpg")
    assert picture.headers["content-type"] == "image/jpeg"
    assert picture.content.startswith(b"\xff\xd8")


def test_a_method_of_another_kind_is_refused(client: TestClient) -> None:
    for method in ("PUT", "DELETE", "OPTIONS", "TRACE", "PATCH"):
        assert client.request(method, "/").status_code == 405


def test_a_failure_is_one_line(client: TestClient, bundle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret of the machine")

    monkeypatch.setattr(Pages, "queue", broken)
    answer = client.get("/")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.headers["content-security-policy"]


def test_a_passphrase_is_never_sent_back(client: TestClient, workspace: Example, bundle: str) -> None:
    fields = form(client, workspace, bundle, key=workspace.keys[ADA])
    offered = hidden(client.post(f"/requests/{bundle}/confirm", data=fields, headers=ORIGIN).text)
    answer = client.post(f"/requests/{bundle}/sign", data={**offered, "passphrase": PASSPHRASE[:-1]}, headers=ORIGIN)
    assert answer.status_code == 403
    assert "wrong passphrase" in answer.text
    assert PASSPHRASE[:-1] not in answer.text


def test_keys_and_policy_lie_in_no_answer(client: TestClient, workspace: Example, bundle: str) -> None:
    pem = next(Path(workspace.settings.home).glob("signing/keys/*.pem")).read_text()
    for path in ("/", f"/requests/{bundle}"):
        assert pem.splitlines()[1] not in client.get(path).text
