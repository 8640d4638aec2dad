"""A real server on loopback with a tiny random model, asked by the unchanged clients of every protocol."""

import asyncio
import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import grpc
import httpx
import numpy as np
import openai
import psutil
import pytest
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub
from pydantic import BaseModel

from facemllm import tasks
from facemllm.core import digests, servers
from facemllm.settings import load
from tests.integration.conftest import stop_tree
from tests.integration.test_serving import HAT, answered, picture
from tests.integration.test_serving import model as model
from tests.ports import free_port
from tests.waiting import wait_until

pytestmark = pytest.mark.integration
NAME = "face-mllm"
B64 = base64.b64encode(picture()).decode()
URL = f"data:image/png;base64,{B64}"


@pytest.fixture(scope="module")
def expected(model: Path) -> Any:
    return answered(model)


def shown(expected: Any) -> str:
    """What a chat says: the option, or why there is none."""
    return str(expected.text) if expected.value else "the model would have written something else than an option"


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen[bytes]
    port: int
    grpc_port: int
    digest: str
    log: Path

    @property
    def url(self) -> str:
        """Its REST address."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def grpc(self) -> str:
        """Its gRPC address."""
        return f"127.0.0.1:{self.grpc_port}"


def start(model: Path, folder: Path, *code: str) -> Server:
    """A server as `services up` would start it, of `code` instead of the module if given."""
    port = free_port(2)
    changes = [f"storage.home={folder}", f"services.staging_port={port}", f"services.staging_grpc_port={port + 1}"]
    settings = load("laptop", [*changes, "serve.max_body_mb=1", "serve.max_instances=8"])
    digest = digests.of_tree(model)
    service = servers.model_server(settings, "staging", model, digest, "7")
    command = [sys.executable, *code, *service.command[3:]] if code else list(service.command)
    log = folder / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | service.env)
    server = Server(process, port, port + 1, digest, log)

    def ready() -> bool:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{server.url}/v2/health/ready", timeout=5).status_code == 200
        return False

    wait_until(ready, seconds=300)
    return server


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = start(model, tmp_path_factory.mktemp("server"))
    yield running
    stop_tree(running.process)


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/openai/v1", api_key="none", max_retries=0)


def messages(text: str, url: str = URL) -> list[Any]:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def instance(**fields: Any) -> dict[str, Any]:
    return {"image": {"b64": B64}, **fields}


def test_openai_plain_with_logprobs_and_usage(server: Server, client: openai.OpenAI, expected: Any) -> None:
    asked: dict[str, Any] = {"model": NAME, "messages": messages(HAT), "logprobs": True, "top_logprobs": 2}
    said = client.chat.completions.create(**asked)
    (choice,) = said.choices
    assert choice.message.content == shown(expected)
    assert choice.finish_reason == "stop"
    assert choice.logprobs is not None
    (token,) = choice.logprobs.content or []
    assert np.exp(token.logprob) == pytest.approx(max(expected.scores.values()), abs=1e-4)
    assert sum(np.exp(one.logprob) for one in token.top_logprobs) == pytest.approx(1, abs=1e-4)
    assert said.usage is not None
    assert said.usage.prompt_tokens > 16  # the picture's own among them
    assert said.system_fingerprint == server.digest
    other = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    assert other.chat.completions.create(**asked).choices[0].message.content == shown(expected)
    assert [one.id for one in other.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == other.models.retrieve(NAME).id == NAME


def test_openai_streams(client: openai.OpenAI, expected: Any) -> None:
    for text in (HAT, "Describe this face."):
        whole = client.chat.completions.create(model=NAME, messages=messages(text)).choices[0].message.content
        options = {"include_usage": True}
        chunks = [
            *client.chat.completions.create(
                model=NAME,
                messages=messages(text),
                stream=True,
                stream_options=options,  # type: ignore[call-overload]
            )
        ]
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert "".join(pieces).strip() == whole
        assert chunks[-1].usage.total_tokens > 0
        assert chunks[-2].choices[0].finish_reason in ("stop", "length")


class Looks(BaseModel):
    """Part of a face."""

    Wearing_Hat: bool | None
    hair_color: str | None
    shape: Literal["round", "long"] | None


def test_openai_fills_a_schema(client: openai.OpenAI, expected: Any) -> None:
    said = client.chat.completions.parse(model=NAME, messages=messages("Describe it."), response_format=Looks)
    found = said.choices[0].message.parsed
    assert found is not None
    assert found.Wearing_Hat == (None if expected.value is None else expected.value == "yes")
    colours = {option.text for option in tasks.get("attributes").question("hair_color").options}
    assert found.hair_color is None or found.hair_color in colours
    assert found.shape is None  # options that this model was not taught


def test_openai_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has"):
        client.chat.completions.create(model="gpt-4o", messages=messages(HAT))
    with pytest.raises(openai.BadRequestError, match="not fetched from addresses"):
        client.chat.completions.create(model=NAME, messages=messages(HAT, "http://127.0.0.1:9/face.png"))
    with pytest.raises(openai.BadRequestError, match="must be a list of 1 to"):
        client.chat.completions.create(model=NAME, messages=[])
    broken = f"data:image/png;base64,{base64.b64encode(picture()[:-600]).decode()}"
    with pytest.raises(openai.BadRequestError, match="damaged"):  # before the first event
        client.chat.completions.create(model=NAME, messages=messages(HAT, broken), stream=True)
    with pytest.raises(openai.APIStatusError, match="too large") as refusal:
        client.chat.completions.create(model=NAME, messages=messages("x" * 2**21))
    assert refusal.value.status_code == 413


def tensors(raw: bool) -> InferRequest:
    inputs = []
    for name, data in (("image", picture("JPEG") if raw else B64.encode()), ("question", HAT.encode())):
        one = InferInput(name, [1], "BYTES", None if raw else [data.decode()])
        if raw:
            one.set_data_from_numpy(np.array([data], object))
        inputs.append(one)
    return InferRequest(NAME, inputs)


def outputs(response: Any) -> dict[str, Any]:
    found = {}
    for output in response.outputs:
        value = output.as_numpy().tolist()[0]
        found[output.name] = value.decode() if isinstance(value, bytes) else value
    return found


def test_kserve_clients_over_rest(server: Server, expected: Any) -> None:
    async def go() -> None:
        async with InferenceRESTClient(RESTConfig(protocol="v1")) as v1:
            assert await v1.is_model_ready(server.url, NAME)
            said = await v1.infer(server.url, {"instances": [instance(question=HAT)]}, model_name=NAME)
            assert said["predictions"][0]["answer"] == expected.text
        async with InferenceRESTClient(RESTConfig(protocol="v2")) as v2:
            assert await v2.is_server_ready(server.url)
            assert await v2.is_model_ready(server.url, NAME)
            for raw in (False, True):
                found = outputs(await v2.infer(server.url, tensors(raw), model_name=NAME))
                assert (found["answer"], found["task"]) == (expected.text, "attributes")
                assert json.loads(found["scores"]).keys() == expected.scores.keys()

    asyncio.run(go())


@pytest.mark.parametrize("raw", [False, True])
def test_kserve_client_over_grpc(server: Server, expected: Any, raw: bool) -> None:
    async def go() -> None:
        async with InferenceGRPCClient(server.grpc) as client:
            assert await client.is_server_ready()
            assert await client.is_model_ready(NAME)
            request = tensors(raw)
            found = outputs(await client.infer(request))
            assert (found["answer"], found["item"]) == (expected.text, "Wearing_Hat")

    asyncio.run(go())


def stub(server: Server) -> GRPCInferenceServiceStub:
    return GRPCInferenceServiceStub(grpc.insecure_channel(server.grpc))


def test_grpc_tells_of_the_model_and_refuses_with_a_line(server: Server) -> None:
    calls = stub(server)
    metadata = calls.ModelMetadata(pb.ModelMetadataRequest(name=NAME))
    assert [one.name for one in metadata.inputs] == ["image", "question"]
    assert {one.name for one in metadata.outputs} >= {"answer", "value", "probability", "kind"}
    assert httpx.get(f"{server.url}/v2/models/{NAME}").json()["outputs"][2]["datatype"] == "FP64"
    bad = {
        "question": (pb.ModelInferRequest(model_name=NAME), grpc.StatusCode.INVALID_ARGUMENT, "give image"),
        "model": (pb.ModelInferRequest(model_name="other"), grpc.StatusCode.NOT_FOUND, "no such model"),
        "contents": (
            pb.ModelInferRequest(
                model_name=NAME,
                inputs=[{"name": "image", "datatype": "BYTES", "shape": [1]}],
                raw_input_contents=[b"\xff\xff\xff\x7fabc"],
            ),
            grpc.StatusCode.INVALID_ARGUMENT,
            "no BYTES",
        ),
        "type": (
            pb.ModelInferRequest(model_name=NAME, inputs=[{"name": "image", "datatype": "odd", "shape": [1]}]),
            grpc.StatusCode.INVALID_ARGUMENT,
            "",
        ),
        "size": (
            pb.ModelInferRequest(model_name=NAME, raw_input_contents=[b"x" * 2**21]),
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "",
        ),
    }
    for name, (request, code, words) in bad.items():
        with pytest.raises(grpc.RpcError) as refusal:
            calls.ModelInfer(request)
        assert refusal.value.code() == code, name
        assert words in refusal.value.details(), name


def test_nobody_loads_or_unloads_the_model_and_no_page_of_others_may_ask(server: Server) -> None:
    for way in (pb.RepositoryModelLoadRequest, pb.RepositoryModelUnloadRequest):
        call = getattr(stub(server), way.__name__.removesuffix("Request"))
        with pytest.raises(grpc.RpcError) as refusal:
            call(way(model_name=NAME))
        assert refusal.value.code() == grpc.StatusCode.UNIMPLEMENTED
    for what in ("load", "unload"):
        assert httpx.post(f"{server.url}/v2/repository/models/{NAME}/{what}").status_code == 501
    other = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    reply = httpx.options(f"{server.url}/tasks", headers=other)
    assert reply.status_code == 405
    assert not [name for name in reply.headers if name.startswith("access-control")]


def test_it_listens_on_loopback_alone_and_names_its_model(server: Server) -> None:
    found = [one.laddr for one in connections(server, psutil.CONN_LISTEN)]
    listening = {(at.ip.removeprefix("::ffff:"), at.port) for at in found}  # gRPC takes IPv4 through an IPv6 socket
    assert listening == {("127.0.0.1", server.port), ("127.0.0.1", server.grpc_port)}
    reply = httpx.get(f"{server.url}/v2/health/live")
    assert (reply.headers["x-model-digest"], reply.headers["x-model-version"]) == (server.digest, "7")


def test_raw_requests_as_curl_sends_them(server: Server, expected: Any) -> None:
    body = json.dumps({"instances": [instance(question=HAT)]})
    command = ["curl", "-sS", "--data-binary", "@-", f"{server.url}/v1/models/{NAME}:predict"]
    done = subprocess.run(command, input=body, capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout)["predictions"][0]["answer"] == expected.text, done.stderr
    asked = {"image": {"b64": B64}, "tasks": ["attributes.Wearing_Hat"]}
    (said,) = httpx.post(f"{server.url}/tasks", json=asked, timeout=60).json()["answers"]
    assert (said["answer"], said["value"], said["scores"]) == (
        expected.text,
        expected.value,
        pytest.approx(expected.scores, abs=1e-5),
    )
    listed = httpx.get(f"{server.url}/tasks").json()
    assert "attributes" in [task["name"] for task in listed["tasks"]]
    assert httpx.get(f"{server.url}/policy").json()["sensitive"]["gender"]["allowed"]
    assert "gender" in httpx.get(f"{server.url}/info").json()["tasks"]
    assert "request_predict_seconds" in httpx.get(f"{server.url}/metrics").text
    log = server.log.read_text()
    assert B64[40:80] not in log
    assert HAT not in log


SLOW = """
import os, sys, time
mark = sys.argv[-1]  # the server takes the others away
from facemllm.model import inference
def slow(real):
    def slowly(self, *given):
        if os.path.exists(mark):  # not while it warms up
            open(mark, "a").write("x")
            time.sleep(3)
        return real(self, *given)
    return slowly
inference.Predictor.encode = slow(inference.Predictor.encode)
from facemllm.serve import server
sys.exit(server.main(sys.argv[1:-1]))
"""


def test_sigterm_ends_requests_in_flight_well_on_every_door(model: Path, tmp_path: Path, expected: Any) -> None:
    """A request is in flight on each door when SIGTERM comes: each is answered, nothing new is taken, the exit is 0."""
    code = tmp_path / "slow.py"
    code.write_text(SLOW)
    begun = tmp_path / "mark"
    server = start_slow(model, tmp_path, code)
    begun.touch()
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

    def v1() -> Any:
        body = {"instances": [instance(question=HAT)]}
        return httpx.post(f"{server.url}/v1/models/{NAME}:predict", json=body, timeout=60).json()["predictions"][0][
            "answer"
        ]

    def v2() -> Any:
        body, _ = tensors(False).to_rest()
        said = httpx.post(f"{server.url}/v2/models/{NAME}/infer", json=body, timeout=60).json()
        return said["outputs"][0]["data"][0]

    def task() -> Any:
        body = {"image": {"b64": B64}, "tasks": ["attributes.Wearing_Hat"]}
        return httpx.post(f"{server.url}/tasks", json=body, timeout=60).json()["answers"][0]["answer"]

    def whole() -> Any:
        return client.chat.completions.create(model=NAME, messages=messages(HAT)).choices[0].message.content

    def streamed() -> Any:
        chunks = client.chat.completions.create(model=NAME, messages=messages(HAT), stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    def over_grpc() -> Any:
        return stub(server).ModelInfer(tensors(True).to_grpc(), timeout=60).outputs and expected.text

    doors: list[Callable[[], Any]] = [v1, v2, task, whole, streamed, over_grpc]
    try:
        with ThreadPoolExecutor(len(doors)) as pool:
            waiting = [pool.submit(door) for door in doors]
            wait_until(lambda: begun.stat().st_size and accepted(server) >= len(doors))
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: refuses_rest(server) and refuses_grpc(server))
            chats = [shown(expected)] * 2
            assert [one.result(60) for one in waiting] == [*[expected.text] * 3, *chats, expected.text]
        assert server.process.wait(30) == 0
    finally:
        stop_tree(server.process)
    assert "Traceback" not in server.log.read_text()


def start_slow(model: Path, folder: Path, code: Path) -> Server:
    mark = str(folder / "mark")
    return start(model, folder, "-c", f"import sys; sys.argv.append({mark!r}); exec(open({str(code)!r}).read())")


def accepted(server: Server) -> int:
    """Connections of clients that the server holds."""
    return len(connections(server, psutil.CONN_ESTABLISHED))


def connections(server: Server, status: str) -> list[Any]:
    """The server's TCP connections of a status."""
    return [one for one in psutil.Process(server.process.pid).connections("tcp") if one.status == status]


def refuses_rest(server: Server) -> bool:
    try:
        return httpx.get(f"{server.url}/v2/health/ready", timeout=5).status_code == 503
    except httpx.HTTPError:
        return True


def refuses_grpc(server: Server) -> bool:
    try:
        return not stub(server).ServerReady(pb.ServerReadyRequest(), timeout=5).ready
    except grpc.RpcError as error:
        return error.code() == grpc.StatusCode.UNAVAILABLE
