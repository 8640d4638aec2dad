"""The local servers as data: MLflow, a Ray head, and the model servers of staging and production.

Each is a `Service`: what to run, where it answers, how to tell that it does, and what its clients need to know.
Everything listens on 127.0.0.1, except Ray: see `ray`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from facemllm.core.processes import write_text

if TYPE_CHECKING:
    from facemllm.settings import Settings

NAMES = ("mlflow", "ray", "staging", "production")
HOST = "127.0.0.1"
RAY_PORTS = 320
_RAY_STORE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Service:
    """One server as data: what to run, where it answers, how to tell that it does, and what its clients need."""

    name: str
    command: tuple[str, ...]
    port: int
    url: str
    health: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    client_env: dict[str, str] = field(default_factory=dict)
    restart: bool = True
    folder: Path | None = None
    any_interface: bool = False

    @property
    def digest(self) -> str:
        """Digest of what is run: a server with another one is not this service."""
        text = json.dumps([self.command, self.port, self.env], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Deployed:
    """A model directory in service, its digest and its version in the registry."""

    model: Path
    digest: str
    version: str


def mlflow(settings: Settings) -> Service:
    """MLflow's tracking server and registry over SQLite, artifacts beside it."""
    folder, port = settings.home / "mlflow", settings.services.mlflow_port
    url = f"http://{HOST}:{port}"
    flags = [
        "--host",
        HOST,
        "--port",
        str(port),
        "--workers",
        "1",
        "--serve-artifacts",
        "--uvicorn-opts=--log-level=warning",
    ]
    flags += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/artifacts"]
    env = {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # else seven idle worker processes, 600 MB
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
    }
    command = (sys.executable, "-m", "mlflow", "server", *flags)
    client = {"MLFLOW_TRACKING_URI": url, "MLFLOW_DISABLE_TELEMETRY": "true"}
    return Service("mlflow", command, port, url, (f"{url}/health",), env, client, folder=folder)


def ray(settings: Settings) -> Service:
    """A Ray head for the time of a pipeline run, without dashboard, on `services.ray_port` and the 320 ports after it.

    Ray cannot be bound to loopback: its daemons listen on every interface whatever address they are given. What
    protects it is Ray's token authentication, with a token of our own that only this user can read. Where other
    machines reach this one and that is not enough, close the ports or run inside `unshare -n`.
    """
    base = settings.services.ray_port
    token = settings.home / "services" / "ray.token"
    # Unix sockets allow 107 characters, and Ray appends 65 of its own: so not under `home`, which may be long.
    unique = hashlib.sha256(str(settings.home).encode()).hexdigest()[:8]
    folder = Path("/tmp") / f"facemllm-{os.getuid()}" / unique
    names = (
        "node-manager",
        "object-manager",
        "ray-client-server",
        "dashboard-agent-listen",
        "dashboard-agent-grpc",
        "runtime-env-agent",
        "metrics-export",
        "dashboard",
    )
    ports = {f"--{name}-port": base + 1 + n for n, name in enumerate(names)}
    ports |= {"--port": base, "--min-worker-port": base + 20, "--max-worker-port": base + RAY_PORTS}
    flags = [f"{name}={port}" for name, port in ports.items()]
    flags += ["--include-dashboard=false", f"--num-cpus={os.cpu_count()}", f"--temp-dir={folder}"]
    flags += [f"--object-store-memory={_RAY_STORE_BYTES}", "--disable-usage-stats", "--log-color=false"]
    client = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    # workers do the run's main work: Ray's own niceness of 15 would starve them beside anything else
    env = {
        **client,
        "RAY_worker_niceness": "0",
        "AUTOSCALER_METRIC_PORT": str(base + 9),
        "DASHBOARD_METRIC_PORT": str(base + 10),
    }
    address = f"{HOST}:{base}"
    # The node's agent answers only once the raylet is ready; the head's own port opens long before.
    health = f"http://{HOST}:{ports['--dashboard-agent-listen-port']}/api/local_raylet_healthz"
    return Service(
        "ray",
        (sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *flags),
        base,
        address,
        (health,),
        env,
        {**client, "RAY_ADDRESS": address},
        restart=False,
        folder=folder,
        any_interface=True,
    )


def model_server(settings: Settings, name: str, model: Path, digest: str, version: str) -> Service:
    """A KServe server of one model directory, as `staging` or `production`. Its digest stands in the command."""
    port = settings.services.staging_port if name == "staging" else settings.services.production_port
    url, limits = f"http://{HOST}:{port}", settings.serve
    flags = {
        "model": model.resolve(),
        "digest": digest,
        "version": version,
        "name": settings.promote.model_name,
        "host": HOST,
        "port": port,
        "tasks": ",".join(settings.reformat.tasks),
        "max-new-tokens": settings.evaluate.max_new_tokens,  # so that captions end where evaluation ended them
        **{key.replace("_", "-"): value for key, value in limits.model_dump().items()},
    }
    command = [sys.executable, "-m", "facemllm.serve.server"]
    command += [part for key, value in flags.items() for part in (f"--{key}", str(value))]
    health = (f"{url}/v2/health/ready", f"{url}/v1/models/{settings.promote.model_name}")
    env = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1"}
    return Service(name, tuple(command), port, url, health, env)


def deployed(settings: Settings, stage: str) -> Deployed | None:
    """The model last proved at a stage, whether it runs or not; None if there is none."""
    try:
        data = json.loads(_note(settings, stage).read_text("utf-8"))
        return Deployed(Path(data["model"]), data["digest"], data["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def note_deployed(settings: Settings, stage: str, model: Deployed) -> None:
    """Remember which model a stage serves, so that it can be started again, or put back."""
    data = {"model": str(model.model), "digest": model.digest, "version": model.version}
    write_text(_note(settings, stage), json.dumps(data, indent=2))


def _note(settings: Settings, stage: str) -> Path:
    return settings.home / "services" / f"{stage}.model"
