"""JSON that every parser reads alike, and API keys, in front of a real server."""

import asyncio
import json
import os
import urllib.error
import urllib.request

import pytest

from facemllm.errors import UserError
from facemllm.serve.caller import CALLER, Caller
from facemllm.serve.doors.errors import refusal
from facemllm.serve.engine.room import UnderWay
from facemllm.serve.guard import keys as guard_keys
from facemllm.serve.guard.bodies import BodyLimit
from facemllm.serve.guard.json_bodies import check_json, unique
from facemllm.serve.guard.keys import Keys, made
from facemllm.serve.guard.middleware import Admission
from facemllm.serve.language import Refused
from tests.guarded import guard, serving


def post(port, body, headers=None, path="/v1/models/one:predict"):
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", body, {"Content-Type": "application/json", **(headers or {})}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.fixture(scope="module")
def port():
    with serving(guard(json_values=1000)) as found:
        yield found


REFUSED = {
    "deep lists": (b"[" * 33 + b"]" * 33, 400, "nested 33 levels deep; this server reads 32"),
    "very deep": (b"[" * 200_000, 413, "200001 values"),
    "deep objects": (b'{"a":' * 40 + b"1" + b"}" * 40, 400, "nested 40 levels"),
    "open": (b'{"a": 1', 400, "not valid JSON"),
    "twice": (b'{"a": {"b": 1, "b": 2}}', 400, 'says "b" twice'),
    "nan": (b'{"a": NaN}', 400, "NaN"),
    "infinity": (b'{"a": -Infinity}', 400, "-Infinity"),
    "1e999": (b'{"a": 1e999}', 400, "1e999"),
    "digits": (b"[" + b"9" * 5000 + b"]", 400, "not valid JSON"),
    "values": (b"[" + b"0," * 1000 + b"0]", 413, "1002 values; this server takes 1000"),
    "not utf-8": (b'{"a": "\xff"}', 400, "not valid JSON"),
    "a string without end": (b'{"a": "' + b"\\" * 99, 400, "not valid JSON"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_json_that_parsers_read_differently_is_refused_in_one_line(port, name):
    body, status, words = REFUSED[name]
    code, reply = post(port, body)
    assert (code, list(reply)) == (status, ["error"])
    assert words in reply["error"]


def test_signs_inside_texts_do_not_count(port):
    body = json.dumps({"a": '[[[{{{"\\' * 5000, "b": [[[1.5e300]]]}).encode()
    assert post(port, body) == (200, {"bytes": len(body), "client": ""})
    with pytest.raises(Refused, match="2 values; this server takes 1"):
        check_json(b'["' + b"\\\\" * 2**21 + b'"]', 9, 1)
    check_json(b'{"[[[,": "{,", "a": ["", "]"]}', 2, 5)  # without an escape
    with pytest.raises(Refused, match="3 levels"):
        check_json(b'{"[": [["]"]]}', 2, 9)
    with pytest.raises(Refused, match="not valid"):
        check_json(b'["[[[[', 2, 9)


def test_requests_under_way_are_counted_before_the_next_is_admitted():
    counts: list[int] = []

    def check(client: str, under_way: UnderWay) -> None:
        counts.append(under_way.all)
        if under_way.all == 2:
            raise Refused(429, "busy")

    async def go() -> list[int]:
        gate = asyncio.Event()
        statuses: list[int] = []

        async def held(scope, receive, send) -> None:
            await gate.wait()
            raise OSError("the client has gone")

        async def send(message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        async def receive() -> dict[str, str]:
            return {"type": "http.disconnect"}

        door = Admission(held, check, refusal)
        scope = {"type": "http", "method": "POST", "path": "/v1/models/one:predict", "headers": []}
        two = [asyncio.create_task(door(scope, receive, send)) for _ in range(2)]
        await asyncio.sleep(0)
        await door(scope, receive, send)
        gate.set()
        await asyncio.gather(*two, return_exceptions=True)
        await asyncio.gather(door(scope, receive, send), return_exceptions=True)
        return statuses

    assert asyncio.run(go()) == [429]
    assert counts == [0, 1, 2, 0]


def test_of_a_body_with_tensors_the_json_is_checked(port):
    name, path = "Inference-Header-Content-Length", "/v2/models/one/infer"
    tensors = b'{"a": 1}' + b"\xff\0[[[" * 100
    assert post(port, tensors, {name: "8"}, path)[0] == 200
    assert post(port, tensors, {name: "9"}, path)[0] == 400
    for wrong in ("9999", "-1", "x", "1" * 400, "0" * 5000):
        assert "must be the length" in post(port, tensors, {name: wrong}, path)[1]["error"]
    assert post(port, b"")[0] == 200  # what a route makes of no body is its own affair


@pytest.mark.parametrize(
    "headers",
    [{"Content-Type": "image/jpeg"}, {"Content-Type": "multipart/x"}, {"Inference-Header-Content-Length": "0"}],
)
def test_no_header_keeps_json_from_being_checked(port, headers):
    assert post(port, b'{"a": 1, "a": 2}', headers)[0] == 400
    assert post(port, b'{"a": 1, "a": 2}', {**headers, "Content-Type": "multipart/form-data"}, "/")[0] == 200


def test_a_name_that_stands_twice_is_found_without_comparing_all_with_all():
    compared = 0

    class Name(str):
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

    names = [*map(str, range(1000)), "999"]
    with pytest.raises(Refused, match='"999" twice'):
        unique([(Name(name), 0) for name in names])
    assert compared < 10 * len(names)


def test_a_body_that_is_too_large_is_refused_before_its_json_is_read(port):
    assert post(port, b"[" * (2**20 + 1))[0] == 413
    assert post(port, b"{}", {"Content-Encoding": "gzip"})[0] == 415
    assert post(port, b"{}", {"ce-specversion": "1.0"})[0] == 415


def test_bodies_under_way_have_a_budget_and_who_holds_little_finds_room_beside_who_holds_all():
    clients, budget = ["greedy"] * 40 + ["modest"], 100_000
    piece = {"type": "http.request", "body": b"x" * 10_000, "more_body": True}

    async def go() -> tuple[list[object], int]:
        gate, reading = asyncio.Event(), 0

        async def read(scope, receive, send) -> None:
            await receive()
            await receive()

        async def held(client: str) -> None:
            CALLER.set(Caller(client))
            messages = iter([piece])

            async def receive() -> dict[str, object]:
                if (message := next(messages, None)) is not None:
                    return dict(message)
                await gate.wait()
                return {"type": "http.request", "body": b"", "more_body": False}

            await door({"type": "http", "headers": []}, receive, None)

        door = BodyLimit(read, 2**20, budget)
        tasks = [asyncio.create_task(held(client)) for client in clients]
        await asyncio.sleep(0.05)
        reading = sum(not task.done() for task in tasks)
        gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True), reading, door._held

    found, reading, left = asyncio.run(go())
    refused = [one for one in found if isinstance(one, Refused)]
    assert reading == 11  # ten of the one, and the other's
    assert {(one.status, one.retry_after) for one in refused} == {(503, 1.0)}
    assert len(refused) == 30
    assert found[-1] is None
    assert not left


@pytest.fixture(scope="module")
def ada(tmp_path_factory):
    """A keys file with one client, and her key."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    key, line = made("ada")
    file.write_text(f"# clients\n\n{line}  # of the clinic\n{made('bob')[1]}\n")
    return file, key


def test_a_request_needs_a_known_key_but_for_health_and_metrics(ada):
    file, key = ada
    with serving(guard(keys=str(file))) as port:
        predict = "/v1/models/one:predict"
        for headers in (
            {},
            {"Authorization": "Bearer other"},
            {"Authorization": key},
            {"Authorization": f"Basic {key}"},
        ):
            status, reply = post(port, b"{}", headers, predict)
            assert (status, list(reply)) == (401, ["error"])
        assert post(port, b"{}", {"Authorization": f"Bearer {key}"}, predict) == (200, {"bytes": 2, "client": "ada"})
        for path in ("/", "/metrics", "/v2/health/live", "/v2/health/ready", "/v1/models/one"):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as reply:
                assert reply.status == 200
        assert post(port, b"{}", {}, "/metrics")[0] == 401  # open to be read, not to be written
        assert post(port, b"{}", {}, "/")[0] == 200  # the page asks for the key in its form
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/long", timeout=30)
        assert (caught.value.code, caught.value.headers["WWW-Authenticate"]) == (401, "Bearer")


def test_a_keys_file_is_read_again_when_it_changed_and_kept_when_it_broke(tmp_path, monkeypatch):
    file, (one, first), (other, second) = tmp_path / "keys", made("ada"), made("bob")
    file.write_text(first)
    keys = Keys(file)
    clock = iter(range(0, 100, 10))
    monkeypatch.setattr(guard_keys.time, "monotonic", lambda: 1e9 + next(clock))
    assert keys.client(f"bearer {one}") == "ada"
    file.write_text(second)
    os.utime(file, ns=(1, 1))
    assert keys.client(f"Bearer {other}") == "bob"
    with pytest.raises(Refused, match="not known here"):
        keys.client(f"Bearer {one}")
    file.write_text("broken")
    os.utime(file, ns=(2, 2))
    assert keys.client(f"Bearer {other}") == "bob"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no key; make one"),
        ("ada", "line 1: must be a name and the SHA-256"),
        ("ada " + "0" * 64 + "\nbob " + "0" * 64, "line 2: this key is that of ada, too"),
        ("ada " + "g" * 64, "line 1: must be"),
    ],
)
def test_a_keys_file_with_a_fault_names_its_line(tmp_path, text, words):
    (tmp_path / "keys").write_text(text)
    with pytest.raises(UserError, match=words):
        Keys(tmp_path / "keys")
    with pytest.raises(UserError, match="cannot be read"):
        Keys(tmp_path / "none")


def test_a_name_that_no_file_can_hold():
    with pytest.raises(UserError, match="letters, digits"):
        made("two words")
