"""Local servers with real processes on loopback: no test may leave one behind."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from facemllm.core import services
from facemllm.core.processes import Record, Service, boot_id, trouble
from facemllm.errors import UserError
from facemllm.settings import Settings, load
from facemllm.settings.operations import RAY_PORTS
from tests.ports import free_port
from tests.refusing import refuses
from tests.waiting import wait_until

pytestmark = pytest.mark.integration

ANSWERING = """
import http.server, signal, subprocess, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"ok")
    def log_message(self, *_): pass
if "stubborn" in sys.argv: signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "daemon" in sys.argv: subprocess.Popen(["sleep", "300"], start_new_session=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    base = free_port(7 + RAY_PORTS)
    ports = {"mlflow": base, "staging": base + 1, "production": base + 2, "ray": base + 6}
    ports |= {"staging_grpc": base + 3, "production_grpc": base + 4}
    overrides = [f"services.{name}_port={port}" for name, port in ports.items()]
    home = tmp_path / 'my "faces" & Ada\'s ünï 100%2F? #1'
    loaded = load("laptop", [f"storage.home={json.dumps(str(home))}", "services.start_timeout_s=90", *overrides])
    yield loaded
    services.down(loaded)


def fake(settings: Settings, *flags: str, **changes: object) -> Service:
    port = settings.services.staging_port
    url = f"http://127.0.0.1:{port}"
    command = (sys.executable, "-c", ANSWERING, str(port), *flags)
    return Service("staging", command, port, url, (url,), **changes)  # type: ignore[arg-type]


def record(settings: Settings, name: str = "staging") -> Record:
    found = Record.read(settings.home / "services" / f"{name}.json")
    assert found is not None
    return found


def state(settings: Settings, name: str = "staging") -> services.Row:
    return next(row for row in services.status(settings) if row.name == name)


def test_started_once_then_adopted_then_stopped_with_its_daemons(settings: Settings) -> None:
    service = fake(settings, "daemon")
    first = services.up(settings, "staging", service)
    second = services.up(settings, "staging", service)
    assert (first.adopted, second.adopted) == (False, True)
    assert first.pid == second.pid
    assert (state(settings).state, state(settings).pid) == ("up", first.pid)
    members = record(settings).members()
    assert "sleep" in {p.name() for p in members}
    assert services.down(settings) == ["staging"]
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in members)
    assert state(settings).state == "down"
    assert services.down(settings) == []


def test_another_command_replaces_the_running_one(settings: Settings) -> None:
    first = services.up(settings, "staging", fake(settings, "a"))
    second = services.up(settings, "staging", fake(settings, "b"))
    assert not second.adopted
    assert not psutil.pid_exists(first.pid)


def test_two_at_once_start_one(settings: Settings) -> None:
    service = fake(settings)
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda _: services.up(settings, "staging", service).pid, range(2))
    assert one == two


def test_a_crashed_server_comes_back(settings: Settings) -> None:
    running = services.up(settings, "staging", fake(settings))
    os.kill(running.pid, signal.SIGKILL)
    wait_until(lambda: state(settings).restarts == 1 and state(settings).state == "up")
    assert state(settings).pid != running.pid


@pytest.mark.parametrize("then", ["up", "down"])
def test_a_killed_supervisor_leaves_nothing_that_is_not_found(settings: Settings, then: str) -> None:
    service = fake(settings, "daemon", *(["stubborn"] if then == "down" else []))
    running = services.up(settings, "staging", service)
    before = record(settings)
    supervisor = before.supervised()
    assert supervisor
    supervisor.kill()
    wait_until(lambda: before.supervised() is None)
    assert {p.name() for p in before.members()} >= {"sleep"}  # the server itself is told by the kernel
    assert state(settings).state == "orphaned"
    if then == "up":
        assert services.up(settings, "staging", service).pid != running.pid
    else:
        services.down(settings)
    assert before.members() == []


def test_a_server_that_hangs_is_replaced(settings: Settings, tmp_path: Path) -> None:
    service, path = fake(settings), tmp_path / "hanging.json"
    quick = {"check_every_s": 0.3, "failures": 2, "grace_s": 0.5}
    Record(service, "t", boot_id(), time.time(), 20, **quick).write(path)  # type: ignore[arg-type]
    supervisor = subprocess.Popen([sys.executable, "-m", "facemllm.core.processes", str(path)])
    try:
        wait_until(lambda: (found := Record.read(path)) and found.answered)
        first = Record.read(path)
        assert first
        assert first.child
        os.kill(first.child.pid, signal.SIGSTOP)
        wait_until(lambda: (found := Record.read(path)) and found.restarts == 1 and not trouble(service.health))
        assert first.child.process() is None
    finally:
        supervisor.terminate()
        assert supervisor.wait(20) == 0


def test_a_port_of_someone_else_is_named_with_its_holder(settings: Settings) -> None:
    port = settings.services.staging_port
    stranger = subprocess.Popen([sys.executable, "-c", ANSWERING, str(port)])
    try:
        wait_until(lambda: not trouble((f"http://127.0.0.1:{port}",)))
        with pytest.raises(UserError, match=rf"port {port} .*process {stranger.pid} .*services.staging_port="):
            services.up(settings, "staging", fake(settings))
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_server_that_ends_while_starting_shows_its_log(settings: Settings) -> None:
    service = fake(settings)
    broken = Service("staging", (sys.executable, "-c", "print('no such model'); exit(3)"), service.port, "", ("",))
    started = time.monotonic()
    refuses(r"ended while starting(.|\n)*no such model", services.up, settings, "staging", broken)
    assert time.monotonic() - started < 10
    assert state(settings).state == "down"


def test_mlflow_for_real(settings: Settings) -> None:
    running = services.up(settings, "mlflow")
    try:
        assert services.up(settings, "mlflow").adopted
        members = record(settings, "mlflow").members()
        listening = [
            c.laddr.ip for p in members for c in p.connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr
        ]
        assert set(listening) == {"127.0.0.1"}
        assert (settings.home / "mlflow" / "mlflow.db").is_file()
        assert running.env["MLFLOW_TRACKING_URI"] == running.url
        for host, status in {"localhost": 200, "127.0.0.1:9999": 200, "[::1]:5000": 200, "evil.example": 403}.items():
            for page in ("", "/api/2.0/mlflow/experiments/search?max_results=1"):
                asked = urllib.request.Request(running.url + page, headers={"Host": host})
                try:
                    answer = urllib.request.urlopen(asked, timeout=10).status
                except urllib.error.HTTPError as error:
                    answer = error.code
                assert (host, page, answer) == (host, page, status)
    finally:
        services.down(settings, ["mlflow"])
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in members)


def test_ray_for_real(settings: Settings) -> None:
    before = {p.pid for p in psutil.process_iter()}
    running = services.up(settings, "ray")
    known = record(settings, "ray")
    try:
        program = (
            "import ray; ray.init(log_to_driver=False, logging_level='ERROR')\n"
            "print(ray.get(ray.remote(lambda: 6 * 7).remote()))"
        )
        environment = {**os.environ, **running.env}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.stdout.strip() == "42", done.stderr
        # Ray listens on every interface: what keeps strangers out is its token
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"http://127.0.0.1:{settings.services.ray_port + 4}/logs", timeout=10)
        assert any(p.name().startswith("raylet") for p in known.members())
    finally:
        services.down(settings, ["ray"])
    assert known.members() == []
    left = [p.info for p in psutil.process_iter(["pid", "cmdline"]) if p.pid not in before]
    assert [one for one in left if f"{settings.services.ray_port}" in " ".join(one["cmdline"] or [])] == []
