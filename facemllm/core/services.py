"""Local servers of a laptop run: start, adopt, stop, by recorded process id.

`up(settings, "mlflow")` returns a server that answers: one that already runs is adopted, else a detached supervisor
(`facemllm.core.processes`) starts it and keeps it up. `down(settings)` leaves no process behind. The servers themselves
are described in `facemllm.core.servers`; records, logs and locks are in `<home>/services/`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from facemllm.core.files import locked
from facemllm.core.processes import TOKEN, Record, Service, boot_id, end, end_tree, trouble
from facemllm.core.routes import Routes
from facemllm.core.servers import BACKENDS, HOST, NAMES, deployed, mlflow, model_server, note_of, proxy, ray, ray_folder
from facemllm.errors import UserError

if TYPE_CHECKING:
    from facemllm.settings import Settings

_LOG_LINES = 12
# Settings of other servers and of a calling step must not leak into a server that outlives it.
_FOREIGN = ("RAY_", "MLFLOW_", "FACEMLLM_", "KSERVE_")


@dataclass(frozen=True)
class Running:
    """A server that answered. `env` is what a client's environment needs to reach it."""

    pid: int
    url: str
    adopted: bool
    env: dict[str, str]


@dataclass(frozen=True)
class Row:
    """One line of `status`: state is `up`, `starting`, `unhealthy`, `orphaned` or `down`; `since` in seconds UTC; `why`
    it is not up, where that is known."""

    name: str
    state: str
    pid: int | None
    port: int
    url: str
    since: float | None
    restarts: int
    why: str = ""


def up(settings: Settings, name: str, service: Service | None = None) -> Running:
    """A server of this name that answers: adopted if the same one runs, else started (replacing another).

    Without a `service`, `staging` serves the model last deployed there, and `production` is its proxy alone
    (`facemllm.serve.local.production` starts the server behind it). Raises UserError when the port belongs to someone
    else, or when the server does not answer within `services.start_timeout_s` (with the end of its log).
    """
    service = service or _built_in(settings, name)
    with _held(settings, settings.home, name) as path:
        if record := Record.read(path):
            if record.service == service and _answers(record, settings.services.start_timeout_s):
                return _running(record, adopted=True)
            _stop(record, path)
        _refuse_taken_port(service)
        return _running(_start(settings, service, path), adopted=False)


def down(settings: Settings, names: Sequence[str] | None = None, home: Path | None = None) -> list[str]:
    """Stop the named servers (all, if none is named) with every process they started; the names of those stopped.

    With `production` the servers behind its proxy stop, too, after it. `home` is another one than that of the settings.
    Raises UserError for a name that no server has, and for a record that cannot be read.
    """
    home, stopped = home or settings.home, []
    if unknown := [name for name in names or () if name not in NAMES + BACKENDS]:
        raise _unknown(unknown[0])
    named = names or NAMES
    for name in dict.fromkeys([*named, *(BACKENDS if "production" in named else ())]):
        if not _path(home, name).exists():
            continue
        with _held(settings, home, name) as path:
            if record := Record.read(path):
                _stop(record, path)
                stopped.append(name)
            elif path.exists():
                what = f"stop {name} with the version that started it, or by hand, then remove the file"
                raise UserError(f"{path} cannot be read; {what}")
            if name == "ray":
                shutil.rmtree(ray_folder(home), ignore_errors=True)
    return stopped


def recorded(settings: Settings, name: str) -> Service | None:
    """What was last started under a name and not stopped since, whether it runs or not."""
    record = Record.read(_path(settings.home, name))
    return record.service if record else None


def homes(settings: Settings) -> list[Path]:
    """The home of the settings, and those that other profiles have beside it."""
    return sorted({settings.home, *(path.parent for path in settings.home.parent.glob(".facemllm*/services"))})


def status(settings: Settings) -> list[Row]:
    """One row a service, whether it runs or not, and one for each server behind production's proxy that runs."""
    backends = [name for name in BACKENDS if _path(settings.home, name).exists()]
    routes = Routes.read(note_of(settings, "production"))
    rows = [_row(settings, name) for name in (*NAMES, *backends)]
    return [_left_over(row) if row.name in backends and not _routed(routes, row.name) else row for row in rows]


def _routed(routes: Routes | None, name: str) -> bool:
    """Whether a server behind production's proxy is one that requests go to, or will in a release under way."""
    if routes is None:
        return False
    return name == routes.stable.name or (routes.driven() and routes.canary is not None and name == routes.canary.name)


def _left_over(row: Row) -> Row:
    way = f"the next release, or `facemllm services down {row.name}`, ends it"
    why = f"no request goes to it: its release ended half-way, or has only begun; {way}"
    return row if row.state == "down" else replace(row, state="orphaned", why=why)


def _row(settings: Settings, name: str) -> Row:
    path = _path(settings.home, name)
    if (record := Record.read(path)) is None:
        return Row(name, "down", None, getattr(settings.services, f"{name}_port"), "", None, 0)
    child = record.child.process() if record.child else None
    if record.supervised():
        why = trouble((*record.service.health, *record.service.ready))
        why = why and (_refusal(path.with_suffix(".log")) or why)
        late = time.time() - record.since >= settings.services.start_timeout_s
        state = "up" if not why else "unhealthy" if late else "starting"
    elif record.members():
        state, why = "orphaned", "its supervisor is gone; `facemllm services down` ends what is left"
    else:
        state, why = "down", f"it ended by itself; see {path.with_suffix('.log')}"
    place = record.service.port, record.service.url
    return Row(name, state, child.pid if child else None, *place, record.since, record.restarts, why)


def _path(home: Path, name: str) -> Path:
    return home / "services" / f"{name}.json"


@contextlib.contextmanager
def _held(settings: Settings, home: Path, name: str) -> Iterator[Path]:
    """The path of a service's record, kept from other commands."""
    path, wait_s = _path(home, name), 2.0 * settings.services.start_timeout_s
    with locked(path.with_suffix(".lock"), f"another command is busy with {name}; try again", wait_s):
        path.parent.chmod(0o700)  # records say what may be stopped, and one file holds Ray's token
        yield path


def _built_in(settings: Settings, name: str) -> Service:
    if name in ("mlflow", "ray"):
        return (mlflow if name == "mlflow" else ray)(settings)
    if name not in NAMES:
        raise _unknown(name)
    if (known := deployed(settings, name)) is None:
        way = "python pipeline.py release VERSION" if name == "production" else "facemllm deploy VERSION"
        raise UserError(f"no model was deployed to {name} yet; do it with: {way}")
    if name == "production":
        return proxy(settings)
    return model_server(settings, name, known.model, known.digest, known.version)


def _unknown(name: str) -> UserError:
    return UserError(f"no service '{name}'; choose one of {', '.join(NAMES)}")


def _answers(record: Record, timeout_s: float) -> bool:
    """Whether a recorded server is there; one that is only just starting is waited for."""
    while record.supervised():
        if not trouble(record.service.health):
            return True
        if time.time() > record.since + timeout_s:
            return False
        time.sleep(0.25)
    return False


def _start(settings: Settings, service: Service, path: Path) -> Record:
    timeout, log = settings.services.start_timeout_s, path.with_suffix(".log")
    _prepare(service, path.parent)
    record = Record(service, secrets.token_hex(16), boot_id(), time.time(), timeout)
    record.write(path)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(_FOREIGN)}
    with log.open("wb") as file:
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "facemllm.core.processes", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
            cwd=path.parent,
            env={**kept, **service.env, "PYTHONUNBUFFERED": "1", TOKEN: record.token},
        )
    deadline = time.monotonic() + timeout
    try:
        while supervisor.poll() is None and time.monotonic() < deadline:
            record = Record.read(path) or record
            if record.answered:
                return record
            time.sleep(0.2)
        why = f"did not answer within {timeout} s" if supervisor.poll() is None else "ended while starting"
        raise UserError(f"{service.name} {why}; the end of {log}:\n{_tail(log)}")
    except BaseException:
        _stop(record, path)
        end_tree(supervisor.pid)
        raise


def _prepare(service: Service, records: Path) -> None:
    folder = Path(service.folder)
    if service.name == "ray":
        shutil.rmtree(folder, ignore_errors=True)
        token = records / "ray.token"
        if not token.exists():
            with os.fdopen(os.open(token, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
                file.write(secrets.token_hex(32))
    if service.folder:
        folder.mkdir(parents=True, exist_ok=True)


def _stop(record: Record, path: Path) -> None:
    """End a server: through its supervisor if that lives, then whatever is left of it."""
    record = Record.read(path) or record
    if supervisor := record.supervised():
        with contextlib.suppress(psutil.Error):
            supervisor.terminate()
            psutil.wait_procs([supervisor], timeout=25)  # its own grace and kill take 16 s at most
    record = Record.read(path) or record  # it may have restarted its child meanwhile
    end(record.members())
    path.unlink(missing_ok=True)


def _running(record: Record, *, adopted: bool) -> Running:
    who = record.child or record.supervisor
    assert who is not None  # it answered
    return Running(who.pid, record.service.url, adopted, record.service.client_env)


def _refuse_taken_port(service: Service) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            probe.bind(("" if service.any_interface else HOST, service.port))
            return
    raise UserError(
        f"port {service.port} is in use by {_holder(service.port)}, which was not started from here; stop that, "
        f"or choose another port: --set services.{service.name.partition('-')[0]}_port={service.port + 1000}"
    )


def _holder(port: int) -> str:
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            listens = connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN
            if listens and connection.pid:
                return f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return "another program"


def _refusal(log: Path) -> str:
    """The line with which a model server refused to start, if that is among the last ones of its log."""
    with contextlib.suppress(OSError):
        said = log.read_bytes()[-4000:].decode("utf-8", "replace").splitlines()[-4:]
        return next((line for line in reversed(said) if line.startswith("refused: ")), "")
    return ""


def _tail(path: Path) -> str:
    lines = path.read_text("utf-8", errors="replace").splitlines()[-_LOG_LINES:]
    return "\n".join(f"  {line[:300]}" for line in lines) or "  (empty)"
