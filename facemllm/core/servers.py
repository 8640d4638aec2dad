"""The local servers as data: MLflow, a Ray head, the model servers of staging and production, production's proxy.

Everything listens on 127.0.0.1, except Ray: see `ray`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from facemllm.core.files import atomic_write, read_json
from facemllm.core.machine import cores, own_folder, short_name
from facemllm.core.processes import Service
from facemllm.errors import UserError

if TYPE_CHECKING:
    from facemllm.settings import Settings

NAMES = ("mlflow", "ray", "staging", "production")
BACKENDS = ("production-a", "production-b")
"""Model servers behind production's proxy: one serves, the other one takes over at the next release."""
HOST = "127.0.0.1"
KEY_VARIABLE = "FACEMLLM_SERVING_KEY"
"""Environment variable of the API key with which servers are proved."""
_RAY_STORE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Deployed:
    """A model directory in service, its digest and its version in the registry; of production, the server behind the
    proxy and its ports (0: none was chosen yet, or no gRPC)."""

    model: Path
    digest: str
    version: str
    name: str = ""
    port: int = 0
    grpc_port: int = 0

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Deployed:
        """From its JSON. Raises KeyError, TypeError or ValueError for anything else."""
        ports = int(data.get("port", 0)), int(data.get("grpc_port", 0))
        return cls(Path(data["model"]), data["digest"], data["version"], str(data.get("name", "")), *ports)

    @property
    def url(self) -> str:
        """Where the server behind the proxy answers."""
        return f"http://{HOST}:{self.port}"


def mlflow(settings: Settings) -> Service:
    """MLflow's tracking server and registry over SQLite, artifacts beside it."""
    folder, port = settings.home / "mlflow", settings.services.mlflow_port
    url = f"http://{HOST}:{port}"
    flags = [f"--host={HOST}", f"--port={port}", "--workers=1", "--uvicorn-opts=--log-level=warning"]
    # from its working folder: in a URI the path's own `?`, `#` and `%` would count as the URI's
    flags += ["--backend-store-uri=sqlite:///mlflow.db", "--serve-artifacts", "--artifacts-destination=artifacts"]
    client = {"MLFLOW_TRACKING_URI": url, "MLFLOW_DISABLE_TELEMETRY": "true"}
    env = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    env["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # else seven idle worker processes, 600 MB
    command = (sys.executable, "-m", "mlflow", "server", *flags)
    return Service("mlflow", command, port, url, (f"{url}/health",), env, client, folder=str(folder))


def ray(settings: Settings) -> Service:
    """A Ray head for the time of a pipeline run, without dashboard, on `services.ray_port` and the 320 ports after it.

    Ray cannot be bound to loopback: its daemons listen on every interface whatever address they are given. What
    protects it is Ray's token authentication, with a token of our own that only this user can read. Where other
    machines reach this one and that is not enough, close the ports or run inside `unshare -n`.
    """
    from facemllm.settings.operations import RAY_PORTS

    base, address = settings.services.ray_port, f"{HOST}:{settings.services.ray_port}"
    folder = ray_folder(settings.home)
    names = ["node-manager", "object-manager", "ray-client-server", "dashboard-agent-listen", "dashboard-agent-grpc"]
    names += ["runtime-env-agent", "metrics-export", "dashboard"]
    ports = {name: base + number for number, name in enumerate(names, start=1)}
    flags = [f"--port={base}", *(f"--{name}-port={port}" for name, port in ports.items())]
    flags += [f"--min-worker-port={base + 20}", f"--max-worker-port={base + RAY_PORTS}", "--include-dashboard=false"]
    flags += [f"--num-cpus={cores()}", f"--temp-dir={folder}", f"--object-store-memory={_RAY_STORE_BYTES}"]
    flags += ["--disable-usage-stats", "--log-color=false"]
    token = settings.home / "services" / "ray.token"
    client = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    metrics = {"AUTOSCALER_METRIC_PORT": str(base + 9), "DASHBOARD_METRIC_PORT": str(base + 10)}
    return Service(
        "ray",
        (sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *flags),
        base,
        address,
        # the node's agent answers only once the raylet is ready; the head's own port opens long before
        (f"http://{HOST}:{ports['dashboard-agent-listen']}/api/local_raylet_healthz",),
        # workers do the run's main work: Ray's own niceness of 15 would starve them beside anything else
        # and nobody is left to wait for when it is stopped: Ray would drain the node for 30 s
        {**client, **metrics, "RAY_worker_niceness": "0", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"},
        {**client, "RAY_ADDRESS": address},
        restart=False,
        folder=str(folder),
        any_interface=True,
    )


def ray_folder(home: Path) -> Path:
    """Where the Ray head of a home keeps its sockets: their paths may have 107 characters, and Ray appends 65 of its
    own, so it is not under `home`, which may be long."""
    return own_folder() / short_name(home)


def proxy(settings: Settings) -> Service:
    """Production's proxy, on production's port. It is restarted when it fails itself, not when no model answers."""
    port = settings.services.production_port
    url = f"http://{HOST}:{port}"
    routes = note_of(settings, "production").absolute()
    command = [sys.executable, "-m", "facemllm.serve.local.proxy", f"--port={port}", f"--routes={routes}"]
    if grpc_port := production_grpc_port(settings):
        command.append(f"--grpc-port={grpc_port}")
    return Service("production", tuple(command), port, url, (f"{url}/proxy/live",), ready=(f"{url}/v2/health/ready",))


def production_grpc_port(settings: Settings) -> int:
    """Where production's proxy takes gRPC; 0 where it does not."""
    return settings.services.production_grpc_port


def free_port(settings: Settings, wanted: int = 0, but: int = 0) -> int:
    """A port for a server behind production's proxy: `wanted` if free, else one above production's own, other than
    `but`, that is free now and of no other service.

    Not from the range that the kernel hands out: it must be free again when the server is restarted. Raises UserError
    if there is none.
    """
    from facemllm.settings.operations import RAY_PORTS

    known = settings.services
    taken = {port for name, port in known.model_dump().items() if name.endswith("_port")}
    taken |= {but, *range(known.ray_port, known.ray_port + RAY_PORTS + 1)}
    first = known.production_port + 10
    for port in ([wanted] if wanted else []) + sorted(set(range(first, min(first + 600, 65536))) - taken):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
            return port
    raise UserError(f"no port from {first} to {first + 599} is free; choose another services.production_port")


def model_server(
    settings: Settings, name: str, model: Path, digest: str, version: str, port: int = 0, grpc_port: int = 0
) -> Service:
    """A KServe server of one model directory, as `staging` or one of `BACKENDS`. Its digest stands in the command.

    Those of production get what they are authorized by, and start with an approved model only.
    """
    ports = settings.services
    if name == "staging":
        port, grpc_port = ports.staging_port, ports.staging_grpc_port
    url = f"http://{HOST}:{port}"
    flags = {
        "model": model.absolute(),  # a link in the folder's place is for the server to refuse
        **serving_flags(settings, digest, version, _served(settings)),
        "host": HOST,
        "port": port,
        "grpc-port": grpc_port,
        "scratch": settings.home / "work" / "serving",
        **(approved_by(settings) if name != "staging" else {}),
        "answers": settings.answers,
        **({"evaluated": figures} if (figures := evaluated_file(settings, digest)).is_file() else {}),
    }
    command = [sys.executable, "-m", "facemllm.serve.server"]
    command += [part for key, value in flags.items() for part in (f"--{key}", str(value))]
    health = (f"{url}/v2/health/ready", f"{url}/v1/models/{settings.promote.model_name}")
    env = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1"}
    return Service(name, tuple(command), port, url, health, env)


def serving_flags(settings: Settings, digest: str, version: str, config: Mapping[str, Any]) -> dict[str, str]:
    """The flags of a model server that are the same wherever it runs: what it serves, how it is called, what it may be
    asked, and how it computes (`config`, of the section `serve`)."""
    return {
        "digest": digest,
        "version": version,
        "name": settings.promote.model_name,
        "tasks": ",".join(settings.reformat.tasks),
        "max-new-tokens": str(settings.evaluate.max_new_tokens),  # so that captions end where evaluation ended them
        "config": json.dumps(config),
    }


def _served(settings: Settings) -> dict[str, Any]:
    """The section `serve` for a server, which runs anywhere: its folder is absolute."""
    chosen = settings.serve.model_dump(mode="json")
    chosen["feedback"]["folder"] = None if settings.corrections is None else str(settings.corrections)
    return chosen


def evaluated_file(settings: Settings, digest: str) -> Path:
    """Where the figures of a model's evaluation lie for its server."""
    return settings.home / "services" / "evaluated" / f"{digest}.json"


def approved_by(settings: Settings) -> dict[str, str | Path]:
    """The flags of a server that serves approved models alone: decisions, policy and checkpoint of the settings."""
    return {"decisions": settings.decisions, "policy": settings.policy_file, "checkpoint": settings.checkpoint}


def authorization() -> dict[str, str]:
    """Headers with which this machine's own requests reach a server that asks for API keys (`serve.guard.keys`)."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    return {"Authorization": f"Bearer {key}"} if key else {}


def deployed(settings: Settings, stage: str) -> Deployed | None:
    """The model last proved at a stage, whether it runs or not; None if there is none."""
    try:
        return Deployed.of(read_json(note_of(settings, stage)))
    except (KeyError, TypeError, ValueError):
        return None


def note_deployed(settings: Settings, stage: str, model: Deployed) -> None:
    """Remember which model a stage serves, so that it can be started again, or put back."""
    atomic_write(note_of(settings, stage), json.dumps(asdict(model), indent=2, default=str).encode())


def note_of(settings: Settings, stage: str) -> Path:
    """The file that says what a stage serves; production's is what its proxy reads (`facemllm.core.routes`)."""
    return settings.home / "services" / f"{stage}.model"
