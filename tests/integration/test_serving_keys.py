"""The model server with API keys and a certificate of its own: nothing in plain, nothing without a key, but health."""

import json
import os
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from facemllm.core import digests, servers
from facemllm.serve.guard.keys import made
from facemllm.settings import load
from tests.fuzzing import good
from tests.guarded import certificate
from tests.integration.test_serving import model  # noqa: F401
from tests.ports import free_port

pytestmark = pytest.mark.integration


@dataclass(frozen=True)
class Server:
    port: int
    grpc_port: int
    key: str
    trusted: Path

    def ask(self, path: str, body: bytes | None = None, key: str | None = None) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        request = urllib.request.Request(f"https://localhost:{self.port}{path}", body, headers)
        try:
            with urllib.request.urlopen(
                request, timeout=60, context=ssl.create_default_context(cafile=self.trusted)
            ) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:  # noqa: F811
    folder = tmp_path_factory.mktemp("keys")
    (key, line), files, base = made("ada"), certificate(folder), free_port(2)
    (folder / "keys").write_text(line)
    changes = [f"storage.home={folder}", f"services.staging_port={base}", f"serve.guard.keys={folder / 'keys'}"]
    changes.append(f"serve.guard.tls={json.dumps(files)}")
    grpc_port = 0
    if "staging_grpc_port" in type(load("laptop").services).model_fields:
        grpc_port = base + 1
        changes.append(f"services.staging_grpc_port={grpc_port}")
    service = servers.model_server(load("laptop", changes), "staging", model, digests.of_tree(model), "1")
    (folder / "work" / "serving").mkdir(parents=True)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(service.command, env={**os.environ, **service.env}, stdout=log, stderr=log)
    found = Server(base, grpc_port, key, Path(files[0]))
    while True:
        assert process.poll() is None, (folder / "log").read_text()
        try:
            if found.ask("/v2/health/ready")[0] == 200:
                break
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
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
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        urllib.request.urlopen(f"http://localhost:{server.port}/v2/health/live", timeout=30)


def test_a_grpc_call_needs_tls_and_a_key(server: Server) -> None:
    import grpc

    if not server.grpc_port:
        pytest.skip("this server speaks no gRPC")
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
