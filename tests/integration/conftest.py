"""Servers that integration tests share, started once a session and stopped by their process ids."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from facemllm.asking.store import Account, Counters, Replies
from facemllm.core.processes import trouble
from facemllm.settings import Settings, load
from tests.ports import free_port


@dataclass(frozen=True)
class MlflowServer:
    """A running MLflow server: its address, and the folder its artifacts lie in."""

    uri: str
    artifacts: Path


def stop_tree(process: subprocess.Popen[Any], how: int = signal.SIGTERM) -> None:
    """Stop a process that this session started, and all that it started."""
    try:
        tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        return
    for one in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.send_signal(how)
    for one in psutil.wait_procs(tree, timeout=5)[1]:
        one.kill()
    process.wait(10)


@pytest.fixture(scope="module")
def ray_head() -> Iterator[str]:
    """A Ray head for all drivers of a module: what a SIGKILL of one leaves is cleared away by Ray, as on a cluster."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_worker_niceness", "0")  # Ray's own of 15 lets the lane beside this one starve the workers
        context = ray.init(num_cpus=2, include_dashboard=False, object_store_memory=128 * 2**20, log_to_driver=False)
    yield context.address_info["address"]
    ray.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's chromium, by Playwright."""
    from tests.integration.browsing import launched

    with launched() as made:
        yield made


def counted(home: Path) -> Counters:
    """What the one account of an endpoint under a home has counted."""
    with contextlib.closing(Replies(home)) as replies:
        with replies.transaction() as database:
            ((name,),) = database.execute("SELECT name FROM accounts").fetchall()
        return Account(replies, name).read()


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A real MLflow server on SQLite, on a free loopback port."""
    folder = tmp_path_factory.mktemp("mlflow")
    port = free_port()
    artifacts = folder / "artifacts"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(artifacts), "--serve-artifacts"]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
    try:
        deadline = time.monotonic() + 300
        while trouble((f"http://127.0.0.1:{port}/health",)):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"MLflow did not start:\n{(folder / 'log').read_text()[-2000:]}")
            time.sleep(0.2)
        yield MlflowServer(f"http://127.0.0.1:{port}", artifacts)
    finally:
        stop_tree(process)


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A fresh bucket, `faces`, of a server of this test's own, or of the one that S3_SERVER and AWS's variables name; a
    boto3 client of it."""
    boto3 = pytest.importorskip("boto3", reason="pip install dvc-s3")
    running, url = None, os.environ.get("S3_SERVER")
    if url is None:
        server = pytest.importorskip("moto.server", reason="pip install 'moto[server]'")
        running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        running.start()
        url = "http://{}:{}".format(*running.get_host_and_port())
        reset = urllib.request.Request(f"{url}/moto-api/reset", method="POST")
        urllib.request.urlopen(reset).close()  # its state is the process's
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    for name, value in {
        "AWS_ENDPOINT_URL": url,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(tmp_path / "no-config"),
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    if running is None:
        for listed in client.list_objects_v2(Bucket="faces").get("Contents", []):
            client.delete_object(Bucket="faces", Key=listed["Key"])
    else:
        client.create_bucket(Bucket="faces")
    yield client
    if running is not None:
        running.stop()


@pytest.fixture
def settings(mlflow_server: MlflowServer, tmp_path: Path, request: pytest.FixtureRequest) -> Settings:
    """Laptop settings with the session's MLflow server; experiment, model name and home are the test's own."""
    name = f"{request.node.name}-{tmp_path.parent.name}-{tmp_path.name}".replace("[", "-").replace("]", "")
    places = [f"storage.home={tmp_path / 'home'}", f"storage.runs={tmp_path / 'runs'}"]
    named = [f"tracking.experiment={name}", f"promote.model_name={name}"]
    return load("laptop", [f"tracking.uri={mlflow_server.uri}", *named, *places])
