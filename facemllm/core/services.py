"""Local servers of a laptop run: start, adopt, stop, by recorded process id.

`up(settings, "mlflow")` returns a server that answers: one that already runs is adopted, else a detached supervisor
(`facemllm.core.processes`) starts it and keeps it up. `down(settings)` leaves no process behind. The servers themselves
are described in `facemllm.core.servers`; records, logs and locks are in `<home>/services/`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from facemllm.core.processes import TOKEN, Record, Spec, end, end_tree, healthy
from facemllm.core.servers import HOST, NAMES, Service, deployed, mlflow, model_server, ray
from facemllm.errors import UserError

if TYPE_CHECKING:
    from facemllm.settings import Settings

__all__ = ["NAMES", "Running", "Service", "down", "end_tree", "orphans", "status", "up"]

_LOG_LINES = 12
# Settings of other servers and of a calling step must not leak into a server that outlives it.
_FOREIGN = ("RAY_", "MLFLOW_", "FACEMLLM_", "KSERVE_")


@dataclass(frozen=True)
class Running:
    """A server that answered. `env` is what a client's environment needs to reach it; `log` is its log file."""

    name: str
    pid: int
    port: int
    url: str
    log: Path
    adopted: bool
    env: dict[str, str]


@dataclass(frozen=True)
class Row:
    """One line of `status`: state is `up`, `starting`, `unhealthy`, `orphaned` or `down`; `since` in seconds UTC."""

    name: str
    state: str
    pid: int | None
    port: int
    url: str
    since: float | None
    restarts: int


def up(settings: Settings, name: str, service: Service | None = None) -> Running:
    """A server of this name that answers: adopted if it runs with the same command, else started (replacing another).

    Without a `service`, `staging` and `production` serve the model last deployed there. Raises UserError when the port
    belongs to someone else, or when the server does not answer within `services.start_timeout_s` (with the end of its
    log).
    """
    service = service or _built_in(settings, name)
    places = _Places(settings.home / "services", name)
    with _lock(places.lock, 2.0 * settings.services.start_timeout_s):
        record = Record.read(places.record)
        if record:
            if record.digest == service.digest and _answers(record, service, settings.services.start_timeout_s):
                return _running(service, record, places, adopted=True)
            _stop(record, places)
        _refuse_taken_port(service)
        return _running(service, _start(settings, service, places), places, adopted=False)


def down(settings: Settings, names: Sequence[str] | None = None) -> list[str]:
    """Stop the named servers (all, if none is named) with every process they started; the names of those stopped."""
    stopped = []
    for name in names or NAMES:
        places = _Places(settings.home / "services", name)
        if not places.record.exists():
            continue
        with _lock(places.lock, 2.0 * settings.services.start_timeout_s):
            if record := Record.read(places.record):
                _stop(record, places)
                stopped.append(name)
            if name == "ray" and (folder := ray(settings).folder):
                shutil.rmtree(folder, ignore_errors=True)
    return stopped


def status(settings: Settings) -> list[Row]:
    """One row a service, whether it runs or not."""
    rows = []
    for name in NAMES:
        record = Record.read(settings.home / "services" / f"{name}.json")
        port = getattr(settings.services, f"{name}_port")
        if record is None:
            rows.append(Row(name, "down", None, port, "", None, 0))
            continue
        child = record.child.process() if record.child else None
        rows.append(
            Row(
                name,
                _state(settings, record),
                child.pid if child else None,
                record.port,
                record.url,
                record.since,
                record.restarts,
            )
        )
    return rows


def orphans(settings: Settings) -> list[psutil.Process]:
    """Processes of servers whose supervisor is gone. `down` ends them, and so does the next `up` of their service."""
    left = []
    for name in NAMES:
        record = Record.read(settings.home / "services" / f"{name}.json")
        if record and record.supervisor.process() is None:
            left += record.members()
    return left


@dataclass(frozen=True)
class _Places:
    folder: Path
    name: str

    @property
    def record(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def spec(self) -> Path:
        return self.folder / f"{self.name}.spec"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def lock(self) -> Path:
        return self.folder / f"{self.name}.lock"


def _built_in(settings: Settings, name: str) -> Service:
    if name == "mlflow":
        return mlflow(settings)
    if name == "ray":
        return ray(settings)
    if name in NAMES:
        known = deployed(settings, name)
        if known is None:
            raise UserError(f"no model was deployed to {name} yet; do it with: facemllm deploy VERSION")
        return model_server(settings, name, known.model, known.digest, known.version)
    raise UserError(f"no service '{name}'; choose one of {', '.join(NAMES)}")


def _state(settings: Settings, record: Record) -> str:
    if record.supervisor.process() is None:
        return "orphaned" if record.members() else "down"
    if healthy(record.health):
        return "up"
    return "starting" if time.time() - record.since < settings.services.start_timeout_s else "unhealthy"


@contextlib.contextmanager
def _lock(path: Path, timeout_s: float) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.parent.chmod(0o700)  # records say what may be stopped, and one file holds Ray's token
    deadline = time.monotonic() + timeout_s
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(f"another command is busy with {path.stem} (lock {path}); try again") from None
                time.sleep(0.1)
        yield


def _answers(record: Record, service: Service, timeout_s: float) -> bool:
    """Whether a recorded server is there; one that is only just starting is waited for."""
    deadline = record.since + timeout_s
    while record.supervisor.process():
        if healthy(service.health):
            return True
        if time.time() > deadline:
            return False
        time.sleep(0.25)
    return False


def _start(settings: Settings, service: Service, places: _Places) -> Record:
    timeout = settings.services.start_timeout_s
    _prepare(service, places)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(_FOREIGN)}
    spec = Spec(
        name=service.name,
        command=service.command,
        health=service.health,
        record=str(places.record),
        token=secrets.token_hex(16),
        digest=service.digest,
        port=service.port,
        url=service.url,
        restart=service.restart,
        start_timeout_s=timeout,
    )
    places.spec.write_text(json.dumps(asdict(spec)), "utf-8")
    with places.log.open("wb") as log:
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "facemllm.core.processes", str(places.spec)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd=places.folder,
            env={**kept, **service.env, "PYTHONUNBUFFERED": "1", TOKEN: spec.token},
        )
    deadline = time.monotonic() + timeout
    try:
        while supervisor.poll() is None and time.monotonic() < deadline:
            record = Record.read(places.record)
            if record and record.token == spec.token and record.answered:
                return record
            time.sleep(0.2)
        why = f"did not answer within {timeout} s" if supervisor.poll() is None else "ended while starting"
        raise UserError(f"{service.name} {why}; the end of {places.log}:\n{_tail(places.log)}")
    except BaseException:
        record = Record.read(places.record)
        if record and record.token == spec.token:
            _stop(record, places)
        end_tree(supervisor.pid)
        raise


def _prepare(service: Service, places: _Places) -> None:
    if service.name == "ray":
        folder = service.folder
        assert folder is not None
        folder.parent.mkdir(mode=0o700, exist_ok=True)
        if folder.parent.is_symlink() or folder.parent.stat().st_uid != os.getuid():
            raise UserError(f"{folder.parent} belongs to another user; Ray cannot keep its sockets there")
        folder.parent.chmod(0o700)  # Ray opens its own folder to everyone
        shutil.rmtree(folder, ignore_errors=True)
        token = places.folder / "ray.token"
        if not token.exists():
            with os.fdopen(os.open(token, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
                file.write(secrets.token_hex(32))
    if service.folder:
        service.folder.mkdir(parents=True, exist_ok=True)


def _stop(record: Record, places: _Places) -> None:
    """End a server: through its supervisor if that lives, then whatever is left of it."""
    if supervisor := record.supervisor.process():
        with contextlib.suppress(psutil.Error):
            supervisor.terminate()
            psutil.wait_procs([supervisor], timeout=25)  # its own grace and kill take 16 s at most
    record = Record.read(places.record) or record  # it may have restarted its child meanwhile
    end(record.members())
    places.record.unlink(missing_ok=True)
    places.spec.unlink(missing_ok=True)


def _running(service: Service, record: Record, places: _Places, *, adopted: bool) -> Running:
    pid = record.child.pid if record.child else record.supervisor.pid
    return Running(service.name, pid, service.port, service.url, places.log, adopted, service.client_env)


def _refuse_taken_port(service: Service) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("" if service.any_interface else HOST, service.port))
            return
        except OSError:
            pass
    key = f"services.{service.name}_port"
    raise UserError(
        f"port {service.port} is in use by {_holder(service.port)}, which was not started from here; stop that, "
        f"or choose another port: --set {key}={service.port + 1000}"
    )


def _holder(port: int) -> str:
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
                if not connection.pid:
                    break
                with contextlib.suppress(psutil.Error):
                    return f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
                return f"process {connection.pid}"
    return "another program"


def _tail(path: Path) -> str:
    lines = path.read_text("utf-8", errors="replace").splitlines()[-_LOG_LINES:]
    return "\n".join(f"  {line[:300]}" for line in lines) or "  (empty)"
