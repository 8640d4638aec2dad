"""Each door's translation: what it takes, what it gives, and what it refuses in one line."""

import io
import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from kserve import InferInput, InferRequest
from kserve.model_repository import ModelRepository
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from PIL import Image

from facemllm import tasks
from facemllm.serve.asked.policy import Policy
from facemllm.serve.doors import infer, openai
from facemllm.serve.doors.errors import add_handlers
from facemllm.serve.doors.instances import write_answer
from facemllm.serve.evaluated import Evaluated, of_metrics
from facemllm.serve.language import Answer, Refused
from facemllm.serve.observer import Observer
from tests.serving import FakePredictor, Loaded, b64, data_url, loaded, png

HAT = "Is the person wearing a hat?"
FACE = png(10, 0, 0)


@pytest.fixture(scope="module")
def served() -> Loaded:
    figures = {"attributes": {"metric": "balanced_accuracy", "value": 0.8, "calibration": [[0.5, 0.5], [1.0, 0.9]]}}
    return loaded(FakePredictor(), ("attributes", "age", "caption"), evaluated=Evaluated(figures, "test"))


@pytest.fixture(scope="module")
def client(served: Loaded) -> TestClient:
    app, registry = FastAPI(), ModelRepository()
    registry.update(served.model)
    for router in served.routers(DataPlane(registry), dict):
        app.include_router(router)
    add_handlers(app)
    return TestClient(app, raise_server_exceptions=False)


def picture(url: str = "") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url or data_url(FACE)}}


def chat(text: str = HAT, **fields: Any) -> dict[str, Any]:
    content = [picture(), {"type": "text", "text": text}]
    return {"model": "m", "messages": [{"role": "user", "content": content}], **fields}


def schema(**properties: Any) -> dict[str, Any]:
    whole = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "json_schema", "json_schema": {"name": "face", "strict": True, "schema": whole}}


def ask(client: TestClient, body: Any, path: str = "/openai/v1/chat/completions") -> tuple[int, Any]:
    reply = client.post(path, content=body) if isinstance(body, bytes) else client.post(path, json=body)
    return reply.status_code, reply.json()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/openai/v1/chat/completions"])
def test_a_chat_completion_has_openais_form(client: TestClient, path: str):
    status, said = ask(client, chat(logprobs=True, top_logprobs=2, max_tokens=50, temperature=0.2), path)
    (choice,) = said["choices"]
    assert (status, said["object"], said["model"], said["system_fingerprint"]) == (
        200,
        "chat.completion",
        "m",
        "d" * 64,
    )
    assert choice["message"] == {"role": "assistant", "content": "yes", "refusal": None}
    assert (choice["finish_reason"], choice["index"]) == ("stop", 0)
    (token,) = choice["logprobs"]["content"]
    assert (token["token"], token["bytes"]) == ("yes", list(b"yes"))
    assert token["logprob"] == pytest.approx(np.log(0.75))
    assert [one["token"] for one in token["top_logprobs"]] == ["yes", "no"]
    assert said["usage"] == {"prompt_tokens": 6, "completion_tokens": 2, "total_tokens": 8}
    assert said["perception"][0]["item"] == "Wearing_Hat"
    assert said["perception"][0]["probability"] == pytest.approx(0.7)  # as calibrated


def test_what_is_written_freely_has_no_logprobs_and_ends_where_it_is_told_to(client: TestClient):
    said = ask(client, chat("What do you see?", logprobs=True))[1]
    assert said["choices"][0]["message"]["content"] == "10 None"
    assert said["choices"][0]["logprobs"] is None
    assert said["perception"][0]["kind"] == "free"
    assert ask(client, chat("What do you see?", max_tokens=1))[1]["choices"][0]["finish_reason"] == "length"
    talk = chat()
    talk["messages"] += [{"role": "assistant", "content": "yes", "refusal": None, "tool_calls": None}]
    talk["messages"] += [{"role": "user", "content": "Are you sure?"}]
    assert ask(client, talk)[1]["choices"][0]["message"]["content"] == "chat of 10 [None]"


def test_events_say_the_same_as_a_whole_answer(client: TestClient):
    for text, content in ((HAT, "yes"), ("What do you see?", "10 None")):
        body = chat(text, stream=True, stream_options={"include_usage": True}, logprobs=True)
        reply = client.post("/v1/chat/completions", json=body)
        assert reply.headers["content-type"].startswith("text/event-stream")
        *events, last = reply.text.strip().split("\n\n")
        chunks = [json.loads(event.removeprefix("data: ")) for event in events]
        assert last == "data: [DONE]"
        assert len({chunk["id"] for chunk in chunks}) == 1
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert "".join(delta.get("content", "") for delta in deltas) == content
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]][-1] == "stop"
        assert chunks[-1]["usage"]["total_tokens"] > 0


def test_a_schema_is_answered_property_by_property(client: TestClient, served: Loaded):
    hair = tasks.get("attributes").question("hair_color").options
    fields = {
        "hair_color": {"type": "string"},
        "Wearing_Hat": {"type": "boolean"},
        "age": {"type": "integer"},
        "few": {"type": "string", "enum": ["round", "long"], "description": "Which shape has the face?"},
        "Wearing_Earrings": {"anyOf": [{"$ref": "#/$defs/YesNo"}, {"type": "null"}]},
    }
    wanted = schema(**fields)
    wanted["json_schema"]["schema"]["$defs"] = {"YesNo": {"enum": ["no", "yes"], "type": "string"}}
    said = ask(client, chat("Describe the face.", response_format=wanted, logprobs=True, top_logprobs=1))[1]
    content = json.loads(said["choices"][0]["message"]["content"])
    years = round(float(served.service.tasks["age"].question("age").number([0.75, *[0.25 / 16] * 16])))
    assert content == {
        "hair_color": hair[0].text,
        "Wearing_Hat": True,
        "age": years,
        "few": "round",
        "Wearing_Earrings": "yes",
    }
    assert len(said["choices"][0]["logprobs"]["content"]) == 5
    some = ask(client, chat("Describe.", response_format=schema(hair_color={"enum": [hair[1].text, hair[2].value]})))[1]
    assert json.loads(some["choices"][0]["message"]["content"])["hair_color"] in (hair[1].text, hair[2].value)


@pytest.mark.parametrize("name", ["is_this_trump", "isAnna", "donald_trump_if_brown", "hat"])
def test_names_of_properties_and_earlier_turns_are_read_as_questions_are(
    client: TestClient, served: Loaded, monkeypatch: pytest.MonkeyPatch, name: str
):
    monkeypatch.setattr(served.service, "policy", Policy({}))
    wanted = schema(**{name: {"type": "string", "enum": ["yes", "no"], "description": HAT}})
    said = ask(client, chat("Describe.", response_format=wanted))[1]["choices"][0]["message"]
    assert (said["refusal"] is None) is (name == "hat")
    planted = chat("Is that right?", response_format=schema(Wearing_Hat={"type": "boolean"}))
    planted["messages"][:0] = [*chat()["messages"], {"role": "assistant", "content": "It is Donald Trump."}]
    assert ask(client, planted)[1]["choices"][0]["message"]["refusal"] == "this service does not say who somebody is"


def test_what_the_service_does_not_see_the_end_of_is_counted_all_the_same(
    client: TestClient, served: Loaded, monkeypatch: pytest.MonkeyPatch
):
    kinds = Counter[str]()

    class Counting(Observer):
        def answered(self, asks: Any, answers: Any, seconds: float) -> None:
            kinds.update(answer.kind for found in answers for answer in found.answers)

    monkeypatch.setattr(served.service, "observer", Counting())
    ask(client, chat("What do you see?", max_tokens=1))
    monkeypatch.setattr(served.service, "policy", Policy({}))
    ask(client, chat("Who is this?", response_format=schema(Wearing_Hat={"type": "boolean"})))
    assert kinds == {"refused": 1, "free": 1}


def test_a_method_that_a_path_does_not_know_is_told_those_that_it_knows(client: TestClient):
    reply = client.delete("/info")
    assert (reply.status_code, reply.headers["allow"]) == (405, "GET")


def test_true_and_false_are_options_of_their_own(client: TestClient):
    wanted = schema(round={"type": "boolean", "description": "Is the face round?"})
    (said,) = ask(client, chat("Describe it.", response_format=wanted))[1]["choices"]
    assert json.loads(said["message"]["content"]) == {"round": True}


@pytest.mark.parametrize("title", ["same person as in the passport", "is_gay", "Looks", "FaceReport"])
@pytest.mark.parametrize("where", ["name", "schema", "property"])
def test_titles_are_read_as_questions_are(
    client: TestClient, served: Loaded, monkeypatch: pytest.MonkeyPatch, title: str, where: str
):
    monkeypatch.setattr(served.service, "policy", Policy({}))
    wanted = schema(Wearing_Hat={"type": "boolean", **({"title": title} if where == "property" else {})})
    if where == "name":
        wanted["json_schema"]["name"] = title
    if where == "schema":
        wanted["json_schema"]["schema"]["title"] = title
    said = ask(client, chat("Describe.", response_format=wanted))[1]["choices"][0]["message"]
    assert (said["refusal"] is None) is (title in ("Looks", "FaceReport"))


def test_a_chat_goes_on_with_the_refusal_as_it_was_sent(client: TestClient, served: Loaded, monkeypatch: Any):
    policy = Policy({})
    monkeypatch.setattr(served.service, "policy", policy)
    wanted = schema(Wearing_Hat={"type": "boolean"})
    asked = chat("Who is this?", response_format=wanted)
    refused = ask(client, asked)[1]["choices"][0]["message"]
    assert (refused["content"], refused["refusal"]) == (None, "this service does not say who somebody is")
    asked["messages"] += [refused, {"role": "user", "content": HAT}]
    assert json.loads(ask(client, asked)[1]["choices"][0]["message"]["content"]) == {"Wearing_Hat": True}
    asked["messages"][1] = {"role": "assistant", "content": "It is Ada."}
    assert ask(client, asked)[1]["choices"][0]["message"]["refusal"] == refused["refusal"]
    asked["messages"][0]["refusal"] = "no"
    assert ask(client, asked)[0] == 400


BAD_CHATS: dict[str, tuple[Any, int, str]] = {
    "not json": (b"{", 400, "not valid JSON"),
    "too deep": (b"[" * 100_000, 400, "not valid JSON"),
    "a list": ([], 400, "an object"),
    "another model": (chat(model="gpt-4o"), 404, "this server has 'm'"),
    "unknown field": (chat(tools=[{}]), 400, "tools is not supported"),
    "a penalty": (chat(frequency_penalty=0.1), 400, "frequency_penalty is not supported"),
    "a stop": (chat(stop=["."]), 400, "stop is not supported"),
    "two answers": (chat(n=2), 400, "n must be 1"),
    "no messages": ({"model": "m"}, 400, "list of 1 to"),
    "a system message": ({"model": "m", "messages": [{"role": "system", "content": "x"}]}, 400, "no system message"),
    "assistant last": (
        {"model": "m", "messages": [*chat()["messages"], {"role": "assistant", "content": "x"}]},
        400,
        "end with a question",
    ),
    "no picture": ({"model": "m", "messages": [{"role": "user", "content": HAT}]}, 400, "one picture"),
    "an address": (
        {"model": "m", "messages": [{"role": "user", "content": [picture("http://127.0.0.1/x.png")]}]},
        400,
        "not fetched from addresses",
    ),
    "a file": (
        {"model": "m", "messages": [{"role": "user", "content": [picture("file:///etc/passwd")]}]},
        400,
        "must be a data URL",
    ),
    "not base64": (
        {"model": "m", "messages": [{"role": "user", "content": [picture("data:image/png;base64,@@")]}]},
        400,
        "not valid base64",
    ),
    "no text": ({"model": "m", "messages": [{"role": "user", "content": [picture()]}]}, 400, "must hold a text"),
    "sound": (
        {"model": "m", "messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        400,
        "parts are text",
    ),
    "too long": (chat("x" * 101), 400, "101 characters"),
    "logprobs by number": (chat(logprobs=1), 400, "logprobs must be true or false"),
    "top without logprobs": (chat(top_logprobs=2), 400, "needs logprobs"),
    "no tokens": (chat(max_tokens=0), 400, "whole number"),
    "json without schema": (chat(response_format={"type": "json_object"}), 400, "json_schema"),
    "no properties": (chat(response_format=schema()), 400, "object with properties"),
    "free text property": (chat(response_format=schema(note={"type": "string"})), 400, "GET /tasks"),
    "nested": (
        chat(response_format=schema(a={"type": "object", "properties": {}})),
        400,
        "'properties' is not supported",
    ),
    "list": (chat(response_format=schema(a={"type": "array"})), 400, "type 'array'"),
    "wrong type": (chat(response_format=schema(hair_color={"type": "number"})), 400, "answered by a text"),
    "unknown ref": (chat(response_format=schema(a={"$ref": "#/$defs/B"})), 400, "#/$defs/NAME"),
    "empty enum": (chat(response_format=schema(a={"enum": []})), 400, "list of 1 to"),
    "odd enum": (chat(response_format=schema(a={"enum": [{}]})), 400, "texts, numbers"),
    "a union": (chat(response_format=schema(a={"anyOf": [{"type": "string"}, {"type": "number"}]})), 400, "choice"),
}


def test_what_clients_send_by_default_changes_nothing(client: TestClient):
    usual = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "tools": [], "stop": []}
    usual |= {"tool_choice": "auto", "reasoning_effort": "medium", "service_tier": "auto", "modalities": ["text"]}
    status, said = ask(client, chat(**usual))
    assert (status, said["choices"][0]["message"]["content"]) == (200, "yes")


@pytest.mark.parametrize("name", BAD_CHATS)
def test_bad_chats_are_refused_in_openais_form(client: TestClient, name: str):
    body, expected, words = BAD_CHATS[name]
    status, said = ask(client, body)
    assert status == expected, said
    assert set(said) == {"error"}
    assert words in said["error"]["message"]
    assert said["error"]["type"] == "invalid_request_error"


def test_a_loop_of_references_ends(client: TestClient):
    looping = schema(a={"$ref": "#/$defs/A"})
    looping["json_schema"]["schema"]["$defs"] = {"A": {"$ref": "#/$defs/A"}}
    assert ask(client, chat(response_format=looping))[0] == 400


def test_models_are_listed_for_openai_and_kserve_alike(client: TestClient):
    listed = client.get("/v1/models").json()
    assert (listed["data"][0]["id"], listed["models"], listed["object"]) == ("m", ["m"], "list")
    one = client.get("/v1/models/m").json()
    assert (one["ready"], one["id"], one["name"]) == (True, "m", "m")
    assert client.get("/openai/v1/models/other").json()["error"]["code"] == "model_not_found"


def tensor(name: str, *data: Any, kind: str = "BYTES") -> dict[str, Any]:
    return {"name": name, "datatype": kind, "shape": [len(data)], "data": list(data)}


def test_v2_asks_many_questions_about_one_picture_or_one_each(client: TestClient):
    body = {"id": "x", "inputs": [tensor("image", b64(FACE)["b64"]), tensor("question", HAT, "What do you see?")]}
    status, said = ask(client, body, "/v2/models/m/infer")
    found = {one["name"]: one["data"] for one in said["outputs"]}
    assert (status, said["id"], said["model_version"]) == (200, "x", "7")
    assert said["parameters"] == {"model_digest": "d" * 64}
    assert (found["answer"], found["kind"]) == (["yes", "10 None"], ["taught", "free"])
    assert found["probability"] == [pytest.approx(0.7), -1]
    assert (found["value"], found["item"]) == (["yes", ""], ["Wearing_Hat", ""])
    assert json.loads(found["scores"][0]) == {"yes": 0.75, "no": 0.25}
    each = [b64(png(red, 0, 0))["b64"] for red in (10, 20)]
    inputs = [tensor("image", *each), tensor("task", "caption", "age"), tensor("item", "", "")]
    said = ask(client, {"inputs": inputs, "outputs": [{"name": "answer"}]}, "/v2/models/m/infer")[1]
    assert [one["name"] for one in said["outputs"]] == ["answer"]
    assert said["outputs"][0]["data"][0] == "10 None"


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP"])
def test_v2_takes_files_as_they_are_behind_the_json(client: TestClient, form: str):
    file = io.BytesIO()
    Image.open(io.BytesIO(FACE)).save(file, form)
    inputs = [InferInput("image", [1], "BYTES"), InferInput("question", [1], "BYTES")]
    for one, data in zip(inputs, (file.getvalue(), HAT.encode()), strict=True):
        one.set_data_from_numpy(np.array([data], object))
    body, length = InferRequest("m", inputs, parameters={"binary_data_output": True}).to_rest()
    header = {"Inference-Header-Content-Length": str(length), "Content-Type": "application/octet-stream"}
    reply = client.post("/v2/models/m/infer", content=body, headers=header)
    size = int(reply.headers["Inference-Header-Content-Length"])
    outputs = {one["name"]: one for one in json.loads(reply.content[:size])["outputs"]}
    assert outputs["answer"]["parameters"]["binary_data_size"] == 7
    assert reply.content[size : size + 7] == b"\x03\0\0\0yes"


IMAGE, QUESTION = tensor("image", b64(FACE)["b64"]), tensor("question", HAT)
BAD_INFERS: dict[str, tuple[Any, int, str]] = {
    "not json": (b"{", 400, "not valid JSON"),
    "nothing": ({}, 400, "no v2 inference request"),
    "no list": ({"inputs": 3}, 400, "no v2 inference request"),
    "no inputs": ({"inputs": []}, 422, "give image"),
    "no data": ({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1]}]}, 400, "no v2 inference request"),
    "numbers": ({"inputs": [tensor("image", 1, kind="FP32"), QUESTION]}, 422, "datatype BYTES"),
    "unknown type": ({"inputs": [tensor("image", 1, kind="X"), QUESTION]}, 422, "datatype BYTES"),
    "not a text": ({"inputs": [tensor("image", 1), QUESTION]}, 400, "no BYTES"),
    "another shape": ({"inputs": [{**IMAGE, "shape": [3]}, QUESTION]}, 400, "no BYTES of its shape"),
    "an enormous shape": ({"inputs": [{**IMAGE, "shape": [10**9, 10**9]}, QUESTION]}, 400, "no BYTES of its shape"),
    "a shape of words": ({"inputs": [{**IMAGE, "shape": ["a"]}, QUESTION]}, 400, "no BYTES of its shape"),
    "unknown input": ({"inputs": [IMAGE, QUESTION, tensor("colour", "red")]}, 422, "unknown input 'colour'"),
    "twice": ({"inputs": [IMAGE, IMAGE, QUESTION]}, 422, "twice"),
    "nothing asked": ({"inputs": [IMAGE]}, 422, "either question or task"),
    "two things asked": ({"inputs": [IMAGE, QUESTION, tensor("task", "age")]}, 422, "either question or task"),
    "unknown output": ({"inputs": [IMAGE, QUESTION], "outputs": [{"name": "name"}]}, 422, "unknown output"),
    "too many": ({"inputs": [IMAGE, tensor("question", *["q"] * 9)]}, 413, "1 to 8"),
    "none": ({"inputs": [IMAGE, tensor("question")]}, 422, "1 to 8"),
    "not as many": ({"inputs": [IMAGE, tensor("task", "age", "age"), tensor("item", "age")]}, 422, "1 elements for 2"),
    "an address": ({"inputs": [tensor("image", "http://127.0.0.1/"), QUESTION]}, 400, "not valid base64"),
    "unknown task": ({"inputs": [IMAGE, tensor("task", "identity")]}, 422, "known are"),
    "odd parameters": ({"inputs": [{**IMAGE, "parameters": [1]}, QUESTION]}, 400, "no v2 inference request"),
    "odd output": ({"inputs": [IMAGE, QUESTION], "outputs": [3]}, 400, "no v2 inference request"),
}


@pytest.mark.parametrize("name", BAD_INFERS)
def test_bad_inference_requests_are_refused_in_one_line(client: TestClient, name: str):
    body, expected, words = BAD_INFERS[name]
    status, said = ask(client, body, "/v2/models/m/infer")
    assert (status, set(said)) == (expected, {"error"}), said
    assert words in said["error"]


@pytest.mark.parametrize(
    ("tail", "size", "length"),
    [
        (b"\xff\xff\xff\x7fabc", 7, None),
        (b"\x03\0\0\0abc", 99, None),
        (b"", -1, None),
        (b"", "x", None),
        (b"", 0, "9" * 9),
    ],
)
def test_bytes_behind_the_json_that_do_not_fit_are_refused(tail: bytes, size: Any, length: str | None):
    head = {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": size}}]}
    start = json.dumps(head).encode()
    with pytest.raises(Refused) as refusal:
        infer.read_body(start + tail, length or str(len(start)), "m")
    assert refusal.value.status == 400


def test_what_has_too_many_parts_is_refused_before_they_are_read(monkeypatch: pytest.MonkeyPatch):
    many = infer.MOST_ELEMENTS + 1
    head = {"inputs": [{"name": "question", "datatype": "BYTES", "shape": [many]}]}
    head["inputs"][0]["parameters"] = {"binary_data_size": 4 * many}
    start = json.dumps(head).encode()
    read = []
    monkeypatch.setattr(infer, "InferInput", read.append)
    with pytest.raises(Refused, match="more than 4096 elements") as refusal:
        infer.read_body(start + bytes(4 * many), str(len(start)), "m")
    assert (refusal.value.status, read) == (413, [])
    tensor = pb.ModelInferRequest.InferInputTensor
    contents = pb.InferTensorContents
    for message in (
        pb.ModelInferRequest(raw_input_contents=[bytes(4 * many)]),
        pb.ModelInferRequest(inputs=[tensor(contents=contents(bytes_contents=[b""] * many))]),
        pb.ModelInferRequest(inputs=[tensor(contents=contents(fp32_contents=[0.0] * many))]),
        pb.ModelInferRequest(inputs=[tensor()] * 65),
        pb.ModelInferRequest(inputs=[tensor(shape=[1] * 65)]),
        pb.ModelInferRequest(parameters={str(n): pb.InferParameter(bool_param=True) for n in range(65)}),
    ):
        with pytest.raises(Refused) as refusal:
            infer.require_few(message)
        assert refusal.value.status == 413
    infer.require_few(pb.ModelInferRequest(raw_input_contents=[b"\x09\0\0\0abc", bytes(4096)]))


def test_the_task_door_answers_by_name_and_holds_back_what_is_unsure(client: TestClient):
    body = {"image": b64(FACE), "tasks": ["attributes.Wearing_Hat", "age", "caption"], "box": [0, 0, 32, 40]}
    status, said = ask(client, body, "/tasks")
    assert (status, said["model"]) == (200, {"name": "m", "version": "7", "digest": "d" * 64})
    assert [(one["item"], one["kind"]) for one in said["answers"]] == [
        ("Wearing_Hat", "taught"),
        ("age", "taught"),
        ("caption", "taught"),
    ]
    sure = ask(client, {**body, "min_probability": 0.71}, "/tasks")[1]["answers"]
    assert [(one["kind"], one["value"] is None) for one in sure[:2]] == [("abstained", True), ("taught", False)]
    assert "below the 0.71 asked for" in sure[0]["reason"]
    every = ask(client, {"image": b64(FACE), "tasks": ["attributes"]}, "/tasks")[1]["answers"]
    assert [one["item"] for one in every] == [one.item for one in tasks.get("attributes").questions()]
    whole = ask(client, {"image": b64(FACE)}, "/tasks")[1]["answers"]
    assert {one["task"] for one in whole} == {"attributes", "age", "caption"}


BAD_TASKS: dict[str, tuple[Any, int, str]] = {
    "a list": ([], 422, "the body must be"),
    "unknown field": ({"image": b64(FACE), "question": HAT}, 422, "unknown field"),
    "no picture": ({"tasks": ["age"]}, 422, "image must be"),
    "none": ({"image": b64(FACE), "tasks": []}, 422, "1 to 256"),
    "a number": ({"image": b64(FACE), "tasks": [1]}, 422, "must be names"),
    "unknown": ({"image": b64(FACE), "tasks": ["identity"]}, 422, "known are"),
    "unknown item": ({"image": b64(FACE), "tasks": ["attributes.name"]}, 422, "hair_color"),
    "a box outside": ({"image": b64(FACE), "box": [0, 0, 33, 40]}, 422, "within the picture"),
    "no box": ({"image": b64(FACE), "box": [0, 0, 1]}, 422, "[left, top"),
    "no probability": ({"image": b64(FACE), "min_probability": "x"}, 422, "from 0 to 1"),
}


@pytest.mark.parametrize("name", BAD_TASKS)
def test_bad_task_requests_are_refused_in_one_line(client: TestClient, name: str):
    body, expected, words = BAD_TASKS[name]
    status, said = ask(client, body, "/tasks")
    assert (status, set(said)) == (expected, {"error"}), said
    assert words in said["error"]


def test_it_says_what_can_be_asked_and_how_well(client: TestClient):
    listed = {task["name"]: task for task in client.get("/tasks").json()["tasks"]}
    assert set(listed) == {"attributes", "age", "caption"}
    hat = next(item for item in listed["attributes"]["items"] if item["name"] == "Wearing_Hat")
    assert (hat["question"], [one["value"] for one in hat["options"]]) == (HAT, ["yes", "no"])
    assert listed["attributes"]["evaluated"]["value"] == 0.8
    assert listed["age"]["evaluated"] is None
    assert client.get("/policy").json()["allowed"] == {}


def test_a_sensitive_task_without_a_reason_is_refused_by_every_door(client: TestClient):
    text = tasks.get("gender").questions()[0].templates[0]
    said = ask(client, chat(text))[1]
    assert said["choices"][0]["message"]["content"] is None
    assert "gender is sensitive" in said["choices"][0]["message"]["refusal"]
    found = ask(client, {"image": b64(FACE), "tasks": ["gender"]}, "/tasks")[1]["answers"][0]
    assert (found["kind"], found["rule"], found["task"], found["value"]) == ("refused", "sensitive", "gender", None)
    allowed = loaded(FakePredictor(), ("gender",), allowed={"gender": "drawn heads only"})
    assert allowed.service.policy.refuses_task("gender") is None


def test_what_the_server_is_told_of_an_evaluation():
    bins = [{"confidence": c, "accuracy": a, "n": n} for c, a, n in ((0.5, 0.6, 10), (0.7, 0.4, 10), (0.9, 0.9, 80))]
    figure = {"metric": "accuracy", "value": 0.8, "low": 0.7, "high": 0.9, "n": 100, "also": {}, "unit": ""}
    metrics = {"split": "test", "tasks": {"expression": {**figure, "items": {"expression": figure}}}}
    evaluated = of_metrics({**metrics, "calibration": {"expression": {"ece": 0.1, "bins": bins}}})
    own = evaluated["tasks"]["expression"]
    assert (own["low"], own["items"]["expression"]["high"], own["ece"]) == (0.7, 0.9, 0.1)
    assert own["calibration"] == [[0.5, 0.5], [0.7, 0.5], [0.9, 0.9]]  # the two that fell are one
    read = Evaluated(evaluated["tasks"])
    assert read.calibrated("expression", 0.8) == pytest.approx(0.7)
    assert read.calibrated("age", 0.8) == 0.8


def test_numbers_carry_their_unit_and_an_abstention_is_not_read_as_an_answer():
    years = write_answer(Answer("taught", "34.20", "34.20", task="age", item="age"))
    assert years["unit"] == "years"
    assert write_answer(Answer("taught", "3.00", "3.00", task="head_pose", item="yaw"))["unit"] == "degrees"
    assert "unit" not in write_answer(Answer("taught", "yes", "yes", task="attributes", item="Bangs"))
    unsure = Answer("abstained", "yes", task="attributes", item="Bangs", reason="it would have said something else")
    assert openai._content(unsure) == "it would have said something else"
    assert write_answer(unsure)["answer"] == "yes"
    assert openai._content(Answer("taught", "yes")) == "yes"
