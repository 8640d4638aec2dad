"""Services as data, records, and the ends of processes."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from facemllm.cli import main as cli
from facemllm.core import servers, services
from facemllm.core.processes import TOKEN, Identity, Record, Service, boot_id, end_tree, trouble
from facemllm.core.routes import Routes
from facemllm.errors import UserError
from facemllm.settings import Settings, load
from facemllm.settings.operations import RAY_PORTS
from facemllm.workflow import options


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load("laptop", [f"storage.home={tmp_path}/home"])


def record(**changes: object) -> Record:
    service = Service("staging", ("sleep", "1"), 1, "u", ("http://127.0.0.1:1/",), {"A": "1"})
    plain = Record(service, "t" * 32, boot_id(), 0.0, 9.0, supervisor=Identity.of(os.getpid()))
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_mlflow_stays_on_loopback_without_job_runners(settings: Settings):
    service = servers.mlflow(settings)
    assert "--host=127.0.0.1" in service.command
    assert service.env["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert service.client_env["MLFLOW_TRACKING_URI"] == f"http://127.0.0.1:{settings.services.mlflow_port}"


def test_ray_keeps_to_its_own_ports_and_a_short_path(settings: Settings):
    service = servers.ray(settings)
    base = settings.services.ray_port
    ports = [int(flag.rpartition("=")[2]) for flag in service.command if "port=" in flag]
    ports += [int(value) for key, value in service.env.items() if key.endswith("METRIC_PORT")]
    assert len(set(ports)) == len(ports)
    assert all(base <= port <= base + RAY_PORTS for port in ports)
    assert service.client_env["RAY_ADDRESS"] == f"127.0.0.1:{base}"
    assert len(str(service.folder)) + 65 < 107
    assert not service.restart
    with pytest.raises(UserError, match="Ray takes ports 16379 to 16699"):
        load("laptop", ["services.staging_port=16400"])


def test_another_model_is_another_service_and_the_last_one_proved_is_remembered(settings: Settings, tmp_path: Path):
    (settings.home / "services").mkdir(parents=True)
    assert servers.deployed(settings, "staging") is None
    servers.note_deployed(settings, "staging", servers.Deployed(tmp_path, "abc", "3"))
    assert servers.deployed(settings, "staging") == servers.Deployed(tmp_path, "abc", "3")
    first, second = (servers.model_server(settings, "staging", tmp_path, digest, "1") for digest in ("a", "b"))
    assert first != second
    assert first == servers.model_server(settings, "staging", tmp_path, "a", "1")


def test_what_is_not_there_is_said_plainly(settings: Settings):
    with pytest.raises(UserError, match="choose one of mlflow, ray"):
        services.up(settings, "redis")
    with pytest.raises(UserError, match="no model was deployed to staging"):
        services.up(settings, "staging")
    with pytest.raises(UserError, match="no service 'redis'"):
        services.down(settings, ["redis"])
    assert services.down(settings) == []
    assert {row.state for row in services.status(settings)} == {"down"}
    (settings.home / "services").mkdir(parents=True, exist_ok=True)
    (settings.home / "services" / "staging.json").write_text('{"supervisor": {"pid": 1}}')
    with pytest.raises(UserError, match=r"staging.json cannot be read"):  # not passed over
        services.down(settings)


@pytest.fixture
def orphan(tmp_path: Path, settings: Settings, monkeypatch) -> Iterator[Callable[[str], int]]:
    """`orphan(folder)`: what a killed supervisor left in a home beside the laptop's, which is `.facemllm`."""
    home = settings.storage.model_copy(update={"home": str(tmp_path / ".facemllm")})
    chosen = settings.model_copy(update={"storage": home})
    monkeypatch.setattr(cli, "load", lambda *_: chosen)
    monkeypatch.setattr(options, "load", lambda *_: chosen)
    left = []

    def leave(folder: str) -> int:
        token = f"{folder:x<32}"
        left.append(subprocess.Popen(["sleep", "60"], env={**os.environ, TOKEN: token}))
        record(token=token, supervisor=None).write(tmp_path / folder / "services" / "staging.json")
        return left[-1].pid

    yield leave
    for process in left:
        process.kill()
        process.wait()


def ask(*words: str) -> str:
    done = CliRunner().invoke(cli.app, ["services", *words])
    assert done.exit_code == 0, done.output
    return done.output


def test_down_says_what_it_stops_in_every_home_or_in_that_of_a_profile(orphan, tmp_path: Path):
    first, second = orphan(".facemllm"), orphan(".facemllm-ci")
    assert ask("down", "--profile", "laptop") == f"stopped staging of {tmp_path}/.facemllm\n"
    assert [psutil.pid_exists(pid) for pid in (first, second)] == [False, True]
    assert ask("down", "ray") == "no local server runs\n"
    assert ask("down") == f"stopped staging of {tmp_path}/.facemllm-ci\n"
    assert not psutil.pid_exists(second)
    assert ask("down") == "no local server runs\n"


def test_status_gives_times_people_read_and_says_why(orphan, tmp_path: Path):
    orphan(".facemllm")
    assert "orphaned" in ask("status")
    assert "its supervisor is gone" in ask("status")
    since = time.mktime((2026, 5, 17, 9, 30, 0, 0, 0, -1))
    record(since=since).write(tmp_path / ".facemllm" / "services" / "mlflow.json")
    assert re.search(r"mlflow +unhealthy +- +2026-05-17 09:30:00 ", ask("status"))
    assert "http://127.0.0.1:1/: [Errno 111] Connection refused" in ask("status")
    rows = json.loads(ask("status", "--json"))["services"]
    assert (rows[0]["since"], rows[0]["why"][:7], rows[3]["state"]) == (since, "http://", "down")


def test_ports_behind_the_proxy_are_those_of_no_other_service(settings: Settings):
    first = servers.free_port(settings)
    known = settings.services.model_dump()
    assert first >= settings.services.production_port + 10
    assert first not in known.values()
    assert servers.free_port(settings, first) == first
    assert servers.free_port(settings, but=first) > first
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first))
        taken.listen()
        assert servers.free_port(settings, first) > first
    beside = load("laptop", [f"services.ray_port={first - 1}"])
    assert servers.free_port(beside) > first - 1 + RAY_PORTS


@pytest.mark.parametrize("alive", [True, False])
def test_what_a_killed_release_left_is_named(settings: Settings, tmp_path: Path, alive: bool):
    folder = settings.home / "services"
    me = Identity.of(os.getpid())
    for name in servers.BACKENDS:
        record(service=replace(record().service, name=name), supervisor=me).write(folder / f"{name}.json")
    stable, canary = (servers.Deployed(tmp_path, name, "1", name, 1) for name in servers.BACKENDS)
    owner = me if alive else replace(me, started=me.started - 9)
    Routes(stable, canary, 10, owner).write(servers.note_of(settings, "production"))
    assert servers.deployed(settings, "production") == stable
    found = {row.name: row for row in services.status(settings)}
    assert found["production-a"].state == "unhealthy"
    assert found["production-b"].state == ("unhealthy" if alive else "orphaned")
    assert ("facemllm services down production-b" in found["production-b"].why) == (not alive)
    for name in servers.BACKENDS:
        (folder / f"{name}.json").unlink()
    assert not set(servers.BACKENDS) & {row.name for row in services.status(settings)}


def test_a_record_survives_its_file_and_a_damaged_one_is_none(tmp_path: Path):
    path = tmp_path / "staging.json"
    written = record(child=Identity.of(os.getpid()))
    written.write(path)
    assert Record.read(path) == written
    for damaged in (path.read_text()[:-9], "[1]"):
        path.write_text(damaged)
        assert Record.read(path) is None
    assert Record.read(tmp_path / "none.json") is None


def test_a_recycled_process_id_and_members_of_before_the_last_restart_of_the_machine_are_not_ours():
    me = Identity.of(os.getpid())
    assert me.process() is not None
    assert Identity(me.pid, me.started - 1).process() is None
    assert me.pid in {p.pid for p in record().members()}
    assert record(boot="another").members() == []


def test_ending_a_tree_ends_what_ignores_the_request():
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    inner = f"import signal, time; {deaf}; print('on', flush=True); time.sleep(60)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    process = subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "on\n"
    below = psutil.Process(process.pid).children(recursive=True)
    started = time.monotonic()
    end_tree(process.pid, grace_s=0.5)
    assert time.monotonic() - started < 5
    assert below
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in below)
    process.wait(5)
    end_tree(process.pid)  # gone already: no error


def test_what_is_wrong_with_a_server_is_said():
    assert trouble(("http://127.0.0.1:1/",), 0.5).startswith("http://127.0.0.1:1/: [Errno 111]")
    assert trouble(("no url",), 0.5).startswith("no url: unknown url type")


def test_supervisors_are_light():
    heavy = ("numpy", "pydantic", "pyarrow", "torch")
    code = f"import sys, facemllm.core.services; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.stdout.strip() == "[]", done.stderr


def test_sigterm_interrupts_a_process_that_a_background_shell_has_ignore_sigint():
    code = (
        "import os, signal, time; from facemllm.core.processes import interrupted_by_sigterm\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN); interrupted_by_sigterm()\n"
        "try:\n    os.kill(os.getpid(), signal.SIGTERM); time.sleep(20)\n"
        "except KeyboardInterrupt:\n    print('interrupted')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "interrupted\n"
