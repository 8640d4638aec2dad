"""The KServe server over real HTTP with a tiny random model: answers, refusals, deployment."""

import base64
import contextlib
import dataclasses
import functools
import io
import json
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image

from facemllm import tasks
from facemllm.core import digests, servers, services
from facemllm.errors import UserError
from facemllm.model.inference import Predictor, Query
from facemllm.model.pretrained import save_model
from facemllm.model.tiny import build_tiny
from facemllm.serve import deploy
from facemllm.serve.probe import Probe
from facemllm.settings import Settings, load
from facemllm.signing import local
from facemllm.tasks.answers import Answer, answer
from tests.approved import ADA, Home, flip
from tests.asked import phrases
from tests.pictures import encode, png_of
from tests.ports import free_port
from tests.refusing import refuses
from tests.waiting import wait_until

pytestmark = pytest.mark.integration
HAT = "Is the person wearing a hat?"


def picture(kind: str = "PNG", size: tuple[int, int] = (128, 128)) -> bytes:
    grey = Image.radial_gradient("L").resize(size)
    return encode(Image.merge("RGB", [grey, grey.point(lambda value: value // 2), grey]), kind)  # grey ones are refused


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = [t for name in tasks.all_names() for q in tasks.get(name).questions() for t in q.templates]
    answers = phrases()
    out = tmp_path_factory.mktemp("model") / "tiny"
    save_model(*build_tiny(load("laptop").model, words + answers, answers, 0), out)
    return out


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    home = tmp_path_factory.mktemp("home")
    base, stages = free_port(4), ("staging_port", "production_port", "staging_grpc_port", "production_grpc_port")
    ports = [f"services.{name}={base + n}" for n, name in enumerate(stages)]
    limits = ["serve.max_body_mb=1", "serve.max_pixels=4000000", "serve.max_instances=8"]
    loaded = load(
        "laptop",
        [
            f"storage.home={home}",
            "services.start_timeout_s=90",
            *ports,
            *limits,
            f"serve.feedback.folder={home / 'corrections'}",
        ],
    )
    yield loaded
    services.down(loaded)


def answered(model: Path) -> Answer:
    """What evaluation answers about the hat, computed here."""
    question = tasks.get("attributes").question("Wearing_Hat")
    query = Query(HAT, tuple(option.text for option in question.options))
    scored = Predictor.load(model).score([Image.open(io.BytesIO(picture()))], [[query]])[0][0]
    return answer(question, scored.probabilities, scored.greedy)


@pytest.fixture(scope="module")
def probe(model: Path) -> Probe:
    found = answered(model)
    return Probe(picture(), HAT, found.text, found.value)


@pytest.fixture(scope="module")
def endpoint(settings: Settings, model: Path, probe: Probe) -> deploy.Endpoint:
    return deploy.deploy(settings, model, digests.of_tree(model), "7", probe)


def post(endpoint: deploy.Endpoint, body: Any, path: str = "") -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    url = endpoint.url + (path or f"/v1/models/{endpoint.model}:predict")
    reply = httpx.post(url, content=data, headers={"Content-Type": "application/json"}, timeout=60)
    return reply.status_code, reply.json()


def get(endpoint: deploy.Endpoint, path: str) -> Any:
    return httpx.get(endpoint.url + path, timeout=30).raise_for_status().json()


def one(data: bytes | None = None, **fields: Any) -> dict[str, Any]:
    return {"instances": [{"image": {"b64": b64(data or picture())}, **fields}]}


def webp_bomb() -> bytes:
    body = b"VP8X" + (10).to_bytes(4, "little") + bytes(4) + (16382).to_bytes(3, "little") * 2
    return b"RIFF" + (len(body) + 4).to_bytes(4, "little") + b"WEBP" + body


def test_it_answers_as_evaluation_does_and_is_adopted(
    settings: Settings, endpoint: deploy.Endpoint, model: Path, probe: Probe
) -> None:
    status, body = post(endpoint, one(question="  is the person wearing a HAT "))
    found = body["predictions"][0]
    assert status == 200
    assert (found["answer"], found["value"]) == (probe.answer, probe.value)
    assert (found["task"], found["item"]) == ("attributes", "Wearing_Hat")
    assert sum(found["scores"].values()) == pytest.approx(1)
    again = deploy.deploy(settings, model, endpoint.digest, "7", probe)
    assert (again.adopted, again.pid) == (True, endpoint.pid)


def test_every_form_of_asking(endpoint: deploy.Endpoint) -> None:
    chat = [
        {"role": "user", "content": [{"type": "image", "b64": b64(picture("JPEG"))}, {"type": "text", "text": HAT}]}
    ]
    longer = [*chat, {"role": "assistant", "content": "no"}, {"role": "user", "content": "Are you sure?"}]
    image = {"b64": b64(picture("WEBP"))}
    instances = [
        {"image": image, "task": "attributes", "item": "hair_color"},
        {"image": image, "task": "age"},
        {"image": image, "task": "caption"},
        {"image": image, "question": "What else does this face show?"},
        {"messages": chat},
        {"messages": longer},
    ]
    status, body = post(endpoint, {"instances": instances})
    hair, age, caption, free, hat, sure = body["predictions"]
    assert status == 200
    colours = next(q for q in tasks.get("attributes").questions() if q.item == "hair_color").options
    assert hair["answer"] in {option.text for option in colours}
    assert f"{float(age['answer']):.2f}" == age["answer"]
    assert (caption["task"], caption["scores"]) == ("caption", None)
    assert (free["task"], free["value"], free["scores"]) == (None, None, None)
    assert hat["item"] == "Wearing_Hat"
    assert sure["task"] is None


def test_a_crowd_is_answered_and_health_stays_prompt(endpoint: deploy.Endpoint) -> None:
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(post, endpoint, one(task="caption")) for _ in range(16)]
        while not all(future.done() for future in waiting):
            started = time.monotonic()
            assert get(endpoint, "/v2/health/ready") == {"ready": True}
            assert time.monotonic() - started < 3
    replies = [future.result() for future in waiting]
    assert {status for status, _ in replies} == {200}
    assert len({body["predictions"][0]["answer"] for _, body in replies}) == 1


def test_readiness_what_it_serves_and_that_it_listens_on_loopback_only(endpoint: deploy.Endpoint) -> None:
    status = get(endpoint, f"/v1/models/{endpoint.model}")
    assert (status["name"], status["ready"]) == (endpoint.model, True)
    info = get(endpoint, "/info")
    assert (info["digest"], info["version"], info["authorized"]) == (endpoint.digest, "7", None)
    sockets = [c for c in psutil.net_connections("tcp") if c.pid == endpoint.pid and c.status == psutil.CONN_LISTEN]
    assert {c.laddr.ip.removeprefix("::ffff:") for c in sockets} == {"127.0.0.1"}
    assert len(sockets) == 2  # REST and gRPC


def test_the_curl_example_works_as_pasted(endpoint: deploy.Endpoint, tmp_path: Path) -> None:
    face = tmp_path / "face of mine.jpg"
    face.write_bytes(picture("JPEG"))
    example = deploy.curl_example(endpoint.predict_url, 'Is the person\'s hair 100% "black"?')
    command = ["sh", "-c", example.replace("FACE.jpg", shlex.quote(str(face)))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    (said,) = json.loads(done.stdout)["predictions"]
    assert isinstance(said["answer"], str), done.stderr  # free text of random weights: any, even none
    assert said["task"] == "attributes"


REFUSED: dict[str, tuple[Any, int, str]] = {
    "not json": (b"{", 400, "valid JSON"),
    "a list": ([], 422, "instances"),
    "no instances": ({}, 422, "instances"),
    "empty": ({"instances": []}, 422, "at least one"),
    "a scalar": ({"instances": 3}, 400, "list"),
    "too many": ({"instances": [{}] * 9}, 413, "8 a request"),
    "unknown field": (one(question=HAT, colour="red"), 422, "colour"),
    "extra at the top": ({**one(question=HAT), "parameters": {}}, 422, "nothing else"),
    "nothing asked": (one(), 422, "exactly one"),
    "two things asked": (one(question=HAT, task="age"), 422, "exactly one"),
    "question not a text": (one(question=["x"]), 422, "text"),
    "question too long": (one(question="x" * 501), 422, "500"),
    "unknown task": (one(task="identity"), 422, "known are"),
    "unknown item": (one(task="attributes", item="name"), 422, "hair_color"),
    "item missing": (one(task="attributes"), 422, "hair_color"),
    "an address": (one(image={"url": "http://127.0.0.1/x"}, question=HAT), 422, "b64"),
    "image missing": ({"instances": [{"question": HAT}]}, 422, "b64"),
    "bad base64": (one(image={"b64": "@@@"}, question=HAT), 400, "base64"),
    "not an image": (one(b"hello" * 50, question=HAT), 400, "JPEG"),
    "a gif": (one(picture("GIF"), question=HAT), 400, "JPEG"),
    "cut off": (one(picture()[:-600], question=HAT), 400, "damaged"),
    "a bomb": (one(png_of(60000, 60000, bytes(1000)), question=HAT), 413, "pixels"),
    "a small bomb": (one(png_of(3000, 3000, bytes(1000)), question=HAT), 413, "pixels"),
    "a webp bomb": (one(webp_bomb(), question=HAT), 413, "pixels"),
    "a needle": (one(picture(size=(9, 900)), question=HAT), 400, "1:8"),
    "huge": (b'{"instances": "' + b"x" * 2**21 + b'"}', 413, "too large"),
    "assistant first": (one(messages=[{"role": "assistant", "content": "hi"}]), 422, "user"),
    "two images": (one(messages=[{"role": "user", "content": [{"type": "image", "b64": "x"}]}]), 422, "one text"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_one_clear_line(endpoint: deploy.Endpoint, name: str) -> None:
    body, expected, words = REFUSED[name]
    status, reply = post(endpoint, body)
    assert status == expected, reply
    assert set(reply) == {"error"}
    assert words in reply["error"]
    assert "\n" not in reply["error"]
    assert "Traceback" not in reply["error"]


def test_a_fault_of_ours_tells_the_client_nothing() -> None:
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    from facemllm.serve.doors.errors import add_handlers

    app = FastAPI()
    add_handlers(app)

    @app.get("/")
    async def fail() -> None:
        raise RuntimeError("secret path /home/someone")

    reply = TestClient(app, raise_server_exceptions=False).get("/")
    assert reply.status_code == 500
    assert "secret" not in reply.text


def test_nobody_can_unload_the_model(endpoint: deploy.Endpoint) -> None:
    assert post(endpoint, {}, f"/v2/repository/models/{endpoint.model}/unload")[0] == 501
    assert post(endpoint, {"inputs": []}, f"/v2/models/{endpoint.model}/infer")[0] == 422  # nothing is asked
    assert post(endpoint, one(question=HAT), "/v1/models/other:predict")[0] == 404


def test_the_log_holds_digests_and_no_images(settings: Settings, endpoint: deploy.Endpoint) -> None:
    assert post(endpoint, one(question=HAT))[0] == 200  # after all those refusals it still answers
    log = (settings.home / "services" / "staging.log").read_text()
    assert digests.of_bytes(picture())[:12] in log
    assert b64(picture())[40:80] not in log
    assert HAT not in log
    assert "Traceback" not in log


@pytest.fixture(scope="module")
def home(settings: Settings, model: Path) -> Home:
    """The decisions in which the model is approved, as version 7."""
    local.policy(settings)
    made = Home(settings)
    made.person(ADA, "requester", "approver")
    made.approve(model, 7)
    return made


def released(settings: Settings, model: Path, digest: str, probe: Probe) -> deploy.Endpoint:
    return deploy.release(settings, model, digest, "7", probe, put_back=None)


def test_what_is_not_approved_is_not_served(settings: Settings, home: Home, model: Path, probe: Probe) -> None:
    refuses(r"refused: \[missing\] model 0000", released, settings, model, "0" * 64, probe)


def test_weights_swapped_after_the_check_never_answer(
    settings: Settings, home: Home, model: Path, probe: Probe, tmp_path: Path
) -> None:
    folder, digest = tmp_path / "model", digests.of_tree(model)
    shutil.copytree(model, folder)
    scratch, sizes = settings.home / "work" / "serving", {p.name: p.stat().st_size for p in model.iterdir()}
    swapped = threading.Event()

    def swap() -> None:
        """Once all of it is copied, and so was hashed, put other weights in the served folder."""
        while not swapped.is_set():
            for copy in scratch.glob("*/model"):
                with contextlib.suppress(OSError):
                    if {p.name: p.stat().st_size for p in copy.iterdir()} == sizes:
                        flip(folder / "model.safetensors")
                        swapped.set()
            time.sleep(0.001)

    swapping = threading.Thread(target=swap, daemon=True)
    swapping.start()
    endpoint = released(settings, folder, digest, probe)  # proves that it answers as the approved weights do
    assert swapped.is_set()
    info = get(endpoint, "/info")
    assert (info["digest"], info["version"]) == (digest, "7")
    authorized = info["authorized"]
    assert ([one["person"] for one in authorized["approvals"]], authorized["withdrawn"]) == ([ADA], None)
    assert authorized["expires"] > authorized["checked"]
    assert not list(scratch.iterdir())

    services.down(settings, ["production"])
    refuses(r"refused: \[digest\] .*model\.safetensors was changed", released, settings, folder, digest, probe)


def test_a_revoked_model_leaves_service_and_does_not_start_again(
    settings: Settings, home: Home, model: Path, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = servers.model_server

    def quicker(*given: Any) -> servers.Service:
        service = real(*given)
        code = (
            "import sys; from facemllm.serve import approval, server; approval.EVERY_S = 0.2; sys.exit(server.main())"
        )
        return dataclasses.replace(service, command=(sys.executable, "-c", code, *service.command[3:]))

    monkeypatch.setattr(servers, "model_server", quicker)
    digest = digests.of_tree(model)
    endpoint = released(settings, model, digest, probe)
    assert get(endpoint, "/v2/health/ready") == {"ready": True}
    bundle = home.decisions.bundles()[0]
    home.say("revoke", bundle, ADA, "found a leak")
    wait_until(lambda: get(endpoint, "/info")["authorized"]["withdrawn"])
    assert "found a leak" in get(endpoint, "/info")["authorized"]["withdrawn"]
    with pytest.raises(httpx.HTTPStatusError, match="503"):
        get(endpoint, "/v2/health/ready")
    assert post(endpoint, one(question=HAT))[0] == 503
    row = next(row for row in services.status(settings) if row.name == "production")
    assert row.state == "unhealthy" or row.state == "starting"
    services.down(settings, ["production"])
    refuses(r"refused: \[revoked\] .*found a leak", released, settings, model, digest, probe)
    home.say("approve", bundle, ADA, "it was none")
    assert released(settings, model, digest, probe).digest == digest
    services.down(settings, ["production"])


FAKE = """
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def reply(self, value):
        data = json.dumps(value).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(data))); self.end_headers()
        self.wfile.write(data)
    def do_GET(self): self.reply({})
    def do_POST(self): self.reply({"predictions": [{"answer": sys.argv[2], "value": sys.argv[2]}]})
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_release_that_answers_otherwise_is_taken_back(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = servers.model_server

    def fake(chosen: Settings, name: str, folder: Path, digest: str, version: str, *ports: int) -> servers.Service:
        service = real(chosen, name, folder, digest, version, *ports)
        command = (sys.executable, "-c", FAKE, str(service.port), digest)
        return servers.Service(name, command, service.port, service.url, (service.url,))

    monkeypatch.setattr(servers, "model_server", fake)
    expected = Probe(b"", HAT, "good", "good")
    with pytest.raises(UserError, match=r"'bad' \(value bad\) instead of 'good'(.|\n)*serves nothing now"):
        deploy.release(settings, tmp_path, "bad", "1", expected, put_back=None)
    deploy.release(settings, tmp_path, "good", "2", expected, put_back=None)
    put: list[str] = []
    again = functools.partial(deploy.release, settings, tmp_path, "bad", "3", expected)
    refuses("production serves version 2 again", again, put_back=put.append)
    assert [why[:25] for why in put] == ["production answers otherw"]
    url = f"http://127.0.0.1:{settings.services.production_port}"
    assert deploy.ask(url, "m", {})["answer"] == "good"
    found = servers.deployed(settings, "production")
    assert found is not None
    assert (found.model, found.digest, found.version) == (tmp_path, "good", "2")
    services.down(settings, ["production"])
