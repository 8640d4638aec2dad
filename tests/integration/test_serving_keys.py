"""The model server with API keys and a certificate of its own: nothing in plain, nothing without a key, but health."""

import contextlib
import json
import os
import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from facemllm.core import digests, servers
from facemllm.serve.guard.keys import made
from facemllm.settings import load
from tests.fuzzing import good
from tests.guarded import certificate
from tests.integration.test_serving import model  # noqa: F401
from tests.ports import free_port
from tests.waiting import wait_until

pytestmark = pytest.mark.integration


@dataclass(frozen=True)
class Server:
    port: int
    grpc_port: int
    key: str
    trusted: Path

    def ask(self, path: str, body: bytes | None = None, key: str | None = None) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        trusted, method = ssl.create_default_context(cafile=self.trusted), "GET" if body is None else "POST"
        url = f"https://localhost:{self.port}{path}"
        reply = httpx.request(method, url, content=body, headers=headers, timeout=60, verify=trusted)
        return reply.status_code, reply.content


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:  # noqa: F811
    folder = tmp_path_factory.mktemp("keys")
    (key, line), files, base = made("ada"), certificate(folder), free_port(2)
    (folder / "keys").write_text(line)
    changes = [f"storage.home={folder}", f"services.staging_port={base}", f"services.staging_grpc_port={base + 1}"]
    changes += [f"serve.guard.keys={folder / 'keys'}", f"serve.guard.tls={json.dumps(files)}"]
    service = servers.model_server(load("laptop", changes), "staging", model, digests.of_tree(model), "1")
    (folder / "work" / "serving").mkdir(parents=True)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(service.command, env={**os.environ, **service.env}, stdout=log, stderr=log)
    found = Server(base, base + 1, key, Path(files[0]))

    def ready() -> bool:
        assert process.poll() is None, (folder / "log").read_text()
        with contextlib.suppress(httpx.TransportError):
            return found.ask("/v2/health/ready")[0] == 200
        return False

    wait_until(ready, seconds=300)
    yield found
    process.terminate()
    assert process.wait(60) == 0


def test_a_request_needs_tls_and_a_key(server: Server) -> None:
    one = good("v1")
    for key in (None, "other"):
        status, body = server.ask(one.path, one.body, key)
        assert (status, list(json.loads(body))) == (401, ["error"])
    status, body = server.ask(one.path, one.body, server.key)
    assert (status, len(json.loads(body)["predictions"])) == (200, 1)
    assert server.ask("/info")[0] == 401
    assert server.ask("/metrics")[0] == 200
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://localhost:{server.port}/v2/health/live", timeout=30)


def test_a_grpc_call_needs_tls_and_a_key(server: Server) -> None:
    import grpc

    one, address = good("grpc"), f"localhost:{server.grpc_port}"
    trusted = grpc.ssl_channel_credentials(server.trusted.read_bytes())
    with grpc.secure_channel(address, trusted) as channel:
        call = channel.unary_unary(one.path)
        with pytest.raises(grpc.RpcError) as caught:
            call(one.body, timeout=60)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert call(one.body, metadata=(("authorization", f"Bearer {server.key}"),), timeout=60)
        assert channel.unary_unary("/inference.GRPCInferenceService/ServerLive")(b"", timeout=60)
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(one.path)(one.body, timeout=60)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
