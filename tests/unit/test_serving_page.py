"""The page of the model server and its door for corrections, as a browser without scripts and a stranger meet them."""

import base64
import io
import json
import logging
import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from prometheus_client import CollectorRegistry

from facemllm import tasks
from facemllm.core import digests
from facemllm.core.corrections import PICTURES, Correction, read
from facemllm.serve.language import Answer
from facemllm.serve.metrics import Metrics
from facemllm.serve.observer import Observer
from facemllm.serve.page import parts, views
from tests.conftest import picture
from tests.pictures import encode
from tests.serving_page import HOSTILE, INFO, Fake, application

IMAGE = digests.of_bytes(picture(1))
OWN = {"origin": "http://testserver", "accept": "text/html,*/*;q=0.8"}


@pytest.fixture
def service() -> Fake:
    return Fake()


@pytest.fixture
def client(service: Fake, tmp_path: Path) -> TestClient:
    return TestClient(application(tmp_path / "corrections", service), headers=OWN)


def post(client: TestClient, data: Any = None, files: Any = None, **options: Any) -> Any:
    given = {"picture": ("face.jpg", picture(1), "image/jpeg")} if files is None else files
    return client.post("/", data=data or {}, files=given, **options)


def words(html: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


def test_answers_of_every_kind_are_shown_with_what_they_are(client: TestClient, service: Fake) -> None:
    own = f"Who is this?\nHow is the weather?\n\nToo dark?\n{HOSTILE}"
    answer = post(client, {"task": ["expression", "age"], "questions": own})
    assert answer.status_code == 200
    (ask,) = service.asked
    assert [(one.task, one.text) for one in ask.questions] == [
        ("expression", None),
        ("age", None),
        *((None, line) for line in own.splitlines() if line),
    ]
    assert ask.image.digest == IMAGE
    visible = words(answer.text)
    for text in (
        "What expression does the face show? sad",
        "70.0 %",
        "How old is the person?",
        "refused: identification nobody is named or recognised",
        "not taught this model was not taught that",
        "not said: too dark the picture is darker",
        "in free text a person",
        IMAGE,
        "Ada Lovelace as reviewer",
        INFO["digest"],
    ):
        assert text in visible, text
    assert HOSTILE not in answer.text
    assert "&lt;script&gt;alert" in answer.text
    shown = re.search(r'id="own"[^>]*src="data:image/jpeg;base64,([^"]+)"', answer.text)
    assert shown is not None
    assert base64.b64decode(shown[1]) == picture(1)
    with_scripts = post(client, {"task": "age", "script": "1"}).text
    assert "data:image/jpeg" not in with_scripts, "the browser has the picture"


def test_no_page_runs_or_fetches_anything_but_its_own(client: TestClient) -> None:
    for answer in (client.get("/"), client.get("/page.css"), client.get("/page.js"), post(client, {"task": "age"})):
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; style-src 'self'; img-src 'self' data: blob:; form-action 'self'")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
    html = client.get("/").text
    assert re.findall(r"<script[^>]*>", html) == ['<script src="/page.js" defer>']
    assert not re.search(r"\son\w+=|\sstyle=|<style|https?://", html)
    assert "set-cookie" not in client.get("/").headers


@pytest.mark.parametrize("accept", ["*/*", "application/json", ""])
def test_who_asks_for_no_html_hears_that_the_server_is_alive(client: TestClient, accept: str) -> None:
    """As kserve's `is_server_live` asks by V1."""
    assert client.get("/", headers={"accept": accept}).json() == {"status": "alive"}


def test_what_can_be_asked_and_what_cannot_is_on_the_form(client: TestClient) -> None:
    html = client.get("/").text
    checked = re.findall(r'name="task" value="(\w+)"( checked)?( disabled)?', html)
    assert checked == [
        ("expression", " checked", ""),
        ("age", " checked", ""),
        ("attributes", " checked", ""),
        ("gender", "", " disabled"),
    ]
    assert "only with a written reason" in html


@pytest.mark.parametrize(
    ("data", "files", "status", "said"),
    [
        ({"task": "age"}, {"picture": ("", b"", "image/jpeg")}, 422, "choose a picture first"),
        ({"task": "age"}, {"picture": ("x.jpg", b"GIF89a....", "image/jpeg")}, 400, "the picture cannot be read"),
        ({}, None, 422, "choose what to ask"),
        ({"task": "none"}, None, 422, "choose what to ask"),
        ({"questions": "x" * 101}, None, 422, "a question has 101 characters"),
        ({"questions": "a\n" * 17}, None, 422, "these are 17 questions"),
        ({"questions": "busy"}, None, 429, "the server is busy"),
        (
            {"task": "age"},
            {"picture": ("x.jpg", b"\xff\xd8\xff" * 800_000, "image/jpeg")},
            413,
            "the body is too large",
        ),
        ({"task": "age", "questions": "a" * 70_000}, None, 400, "that form cannot be read"),
        ({"task": ["age"] * 70}, None, 400, "that form cannot be read"),
    ],
)
def test_what_is_refused_is_one_line_with_its_status(
    client: TestClient, data: Any, files: Any, status: int, said: str
) -> None:
    answer = post(client, data, files)
    assert answer.status_code == status
    alert = re.search(r'role="alert">([^<]+)<', answer.text)
    assert alert is not None
    assert said in unescape(alert[1])
    if status == 429:
        assert answer.headers["retry-after"] == "3"
    if status != 413 and "cannot be read" not in said:  # the form was read
        typed = re.search(r"<textarea[^>]*>([^<]*)<", answer.text)
        assert typed is not None
        assert unescape(typed[1]).strip() == data.get("questions", "").strip(), "what was typed stands there again"
        assert re.findall(r'value="(\w+)" checked', answer.text) == [one for one in [data.get("task")] if one == "age"]


def test_a_large_picture_does_not_touch_the_disk(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def to_disk(*_: Any, **__: Any) -> None:
        raise AssertionError("a picture was written to disk")

    monkeypatch.setattr("tempfile.SpooledTemporaryFile.rollover", to_disk)
    noise = np.random.default_rng(3).integers(0, 255, (660, 660, 3), dtype=np.uint8)
    large = encode(noise)
    assert len(large) > 1.2 * 2**20
    assert post(client, {"task": "age"}, {"picture": ("face.png", large, "image/png")}).status_code == 200


@pytest.mark.parametrize("mode", ["L", "P"])
def test_a_map_is_shown_in_colours_without_being_decoded(client: TestClient, service: Fake, mode: str) -> None:
    numbers = np.zeros((40, 32), np.uint8)
    numbers[10:20, 8:16], numbers[30:, :] = 2, 13
    image = Image.fromarray(numbers)
    if mode == "P":
        image.putpalette(bytes(range(57)))
        image = image.convert("P") if image.mode != "P" else image
    files = {"picture": ("face.jpg", picture(1), "image/jpeg"), "map": ("map.png", encode(image), "image/png")}
    html = post(client, {"task": "age"}, files).text
    found = re.search(r'class="map" src="data:image/png;base64,([^"]+)"', html)
    assert found is not None
    shown = Image.open(io.BytesIO(base64.b64decode(found[1]))).convert("RGBA")
    assert shown.getpixel((0, 0))[3] == 0, "the background is clear"
    for place, part in (((10, 12), 2), ((0, 35), 13)):
        assert "#{:02x}{:02x}{:02x}".format(*shown.getpixel(place)[:3]) == parts.COLOURS[part]
    assert service.asked[0].map is not None
    assert parts.COLOURS[13] in html, "the legend"
    with pytest.raises(ValueError, match="no map"):
        parts.coloured(encode(np.zeros((8, 8, 3), np.uint8)))


@pytest.mark.parametrize(("text", "shown"), [("34", "34 years"), ("about 34 years old", "about 34 years old")])
def test_a_bare_number_is_shown_with_its_unit(text: str, shown: str) -> None:
    row = views._row("How old?", Answer("taught", text, "34", None, 0.5, "age", "age"), {"age": tasks.get("age")})
    assert row.answer == shown


def correction(**changed: Any) -> dict[str, Any]:
    given = {"image": IMAGE, "task": "age", "item": "age", "answer": "about 30 years old", "correction": "42"}
    given |= {
        "consent": True,
        "consent_text": "1",
        "picture": {"b64": base64.b64encode(picture(1)).decode()},
        **changed,
    }
    return {name: value for name, value in given.items() if value is not None}


def stored(tmp_path: Path) -> list[Correction]:
    folder = tmp_path / "corrections"
    if not (folder / "corrections.jsonl").exists():
        return []
    return [one for _, one in read(folder) if isinstance(one, Correction)]


def test_a_correction_is_stored_with_the_consent_that_was_given(client: TestClient, tmp_path: Path) -> None:
    feedback = client.get("/feedback").json()
    assert feedback["consent"]["version"] == "1"
    answer = client.post("/feedback", json=correction())
    assert answer.json() == {"stored": True, "image": IMAGE, "picture": True, "label": "42"}
    (one,) = stored(tmp_path)
    assert (one.label, one.consent, one.consent_text, one.model, one.picture) == ("42", True, "1", "5e" * 32, True)
    assert (tmp_path / "corrections" / PICTURES / IMAGE).read_bytes() == picture(1)
    without = correction(
        consent=False, consent_text=None, picture=None, task="expression", item=None, correction="happy"
    )
    assert client.post("/feedback", json=without).json()["label"] == "happiness"
    free = correction(task=None, item=None, question="Is it raining?", correction="yes", picture=None)
    assert client.post("/feedback", json=free).json()["label"] is None
    assert len(list((tmp_path / "corrections" / PICTURES).iterdir())) == 1


@pytest.mark.parametrize(
    ("changed", "status", "said"),
    [
        ({"consent": None}, 422, "consent must be true or false"),
        ({"consent": "yes"}, 422, "consent must be true or false"),
        ({"consent_text": "0"}, 422, "now '1'"),
        ({"consent": False}, 422, "a picture is taken with consent only"),
        ({"image": "ab" * 32}, 422, "not the one of that digest"),
        ({"image": "../../etc/passwd", "picture": None}, 422, "64 hexadecimal digits"),
        ({"picture": {"url": "http://x"}}, 422, "picture must be"),
        ({"picture": {"b64": "R0lGODlh"}}, 400, "cannot be read"),
        ({"task": "gone"}, 422, "task: one of expression, age"),
        ({"task": "attributes", "item": "gone"}, 422, "item: one of hair_style"),
        ({"correction": "purple"}, 422, "no answer to age.age"),
        ({"correction": "999"}, 422, "no answer to age.age"),
        ({"correction": ""}, 422, "say what is right"),
        ({"correction": "x" * 201}, 422, "at most 200 characters"),
        ({"correction": "a\u202eb"}, 422, "cannot be printed"),
        ({"question": "x"}, 422, "either question, or task"),
        ({"answer": 3}, 422, "answer must be a text"),
        ({"more": 1}, 422, "unknown field 'more'"),
        ({"answer": "This is Anna Smith"}, 422, "answer holds what is not stored (identification)"),
        ({"task": None, "item": None, "question": "Who is this?"}, 422, "question holds what is not stored"),
        (
            {"task": None, "item": None, "question": "Is it so?", "correction": "Anna Smith, 12 Main Street, has HIV"},
            422,
            "correction holds what is not stored",
        ),
    ],
)
def test_a_correction_that_is_not_in_order_is_refused(
    client: TestClient, tmp_path: Path, changed: dict[str, Any], status: int, said: str
) -> None:
    answer = client.post("/feedback", json=correction(**changed))
    assert answer.status_code == status
    assert said in answer.json()["error"]
    assert stored(tmp_path) == []


def test_corrections_come_as_json_and_not_too_often(client: TestClient, tmp_path: Path) -> None:
    form = client.post("/feedback", content=json.dumps(correction()), headers={"content-type": "text/plain"})
    assert form.status_code == 415, "a browser asks first before it sends JSON to another site"
    assert (
        client.post("/feedback", content="[" * 50_000, headers={"content-type": "application/json"}).status_code == 400
    )
    assert client.post("/feedback", json=[1]).status_code == 422
    statuses = [client.post("/feedback", json=correction()).status_code for _ in range(22)]
    assert statuses == [200] * 20 + [429] * 2


def test_the_form_of_a_correction_without_scripts(client: TestClient, tmp_path: Path) -> None:
    html = post(client, {"task": "age"}).text
    about = unescape(re.findall(r'<option value="([^"]+)"', html)[0])
    data = {"image": IMAGE, "about": about, "correction": "42", "consent_text": "1"}
    files = {"picture": ("face.jpg", picture(1), "image/jpeg")}
    answer = client.post("/page/feedback", data=data, files=files)
    assert "stored without the picture" in answer.text, "the box was not ticked"
    answer = client.post("/page/feedback", data={**data, "consent": "yes"}, files=files)
    assert "stored with the picture" in answer.text
    assert [(one.item, one.label, one.picture) for one in stored(tmp_path)] == [
        ("age", "42", False),
        ("age", "42", True),
    ]
    wrong = client.post("/page/feedback", data={**data, "about": "[[]]"}, files=files)
    assert (wrong.status_code, "choose the answer that is wrong" in wrong.text) == (422, True)


def test_no_corrections_are_taken_where_no_folder_is_given(service: Fake) -> None:
    client = TestClient(application(None, service), headers=OWN)
    assert client.get("/feedback").status_code == 404
    assert client.post("/feedback", json=correction()).status_code == 404
    assert client.post("/page/feedback", data={"x": "y"}, files={"picture": ("", b"")}).status_code == 404
    assert "An answer is wrong" not in post(client, {"task": "age"}).text


def test_requests_are_counted_and_nothing_of_them_is_logged(
    service: Fake, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.DEBUG)
    registry = CollectorRegistry()
    client = TestClient(application(tmp_path, service, Observer(Metrics((), (), registry=registry))), headers=OWN)
    post(client, {"task": "age", "questions": "Is this Ada Lovelace?"})
    post(client, {"questions": "busy Ada Lovelace"})
    client.post("/feedback", json=correction(answer="Ada Lovelace"))
    for door, status in (("page", "200"), ("page", "429"), ("feedback", "422")):
        assert registry.get_sample_value("facemllm_requests_total", {"door": door, "status": status}) == 1
    assert "Lovelace" not in caplog.text
