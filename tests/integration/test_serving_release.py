"""Releases under load with real processes: one model after the other, worse canaries, what is killed meanwhile.

Most servers are small ones that answer as told: the switch is the same. The last test switches real model servers.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from facemllm.core import digests, servers, services
from facemllm.errors import UserError
from facemllm.serve import deploy
from facemllm.serve.local import production
from facemllm.serve.probe import Probe
from facemllm.settings import Settings, load
from facemllm.signing import local
from tests.approved import ADA, Home
from tests.integration.test_serving import HAT
from tests.integration.test_serving import model as model
from tests.integration.test_serving import probe as probe
from tests.ports import free_port
from tests.refusing import refuses
from tests.waiting import wait_until

pytestmark = pytest.mark.integration

SERVER = """
import asyncio, itertools, json, sys
from aiohttp import web
port, kind, posts = int(sys.argv[1]), sys.argv[2], itertools.count()
async def handle(request):
    if request.method == "GET":
        return web.json_response({"ready": True})
    await request.read()
    await asyncio.sleep(0.004 if kind != "slow" else 0.1)
    if kind == "failing" and next(posts) % 3 == 2:
        return web.json_response({"error": "internal error"}, status=500)
    said = "no" if kind != "different" or "hat" in (await request.json())["instances"][0]["question"] else "yes"
    return web.json_response({"predictions": [{"answer": said, "value": said, "model": kind}]})
async def main():
    app = web.Application(client_max_size=2**20)
    app.router.add_route("*", "/{rest:.*}", handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=8)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(15, stop.set)
    await stop.wait()
    await runner.cleanup()
asyncio.run(main())
"""
QUESTIONS = [Probe(b"", HAT, "no", "no"), *(Probe(b"", f"Is it {n}?", "no", "no") for n in range(9))]


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    base = free_port(40)
    sets = [f"storage.home={tmp_path / 'home'}", "services.start_timeout_s=90", f"services.staging_port={base}"]
    sets += [f"services.staging_grpc_port={base + 2}", f"services.production_grpc_port={base + 3}"]
    sets += [f"services.production_port={base + 1}", "serve.canary.min_requests=30", "serve.canary.step_seconds=0.3"]
    sets += ["serve.canary.max_p95_ratio=3"]  # machines of tests are busy
    loaded = load("laptop", sets)
    yield loaded
    services.down(loaded)


@pytest.fixture
def small(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model servers that answer as the digest tells, in place of KServe's."""

    def fake(
        chosen: Settings, name: str, folder: Path, digest: str, version: str, port: int = 0, grpc_port: int = 0
    ) -> servers.Service:
        url = f"http://127.0.0.1:{port}"
        return servers.Service(name, (sys.executable, "-c", SERVER, str(port), digest, version), port, url, (url,))

    monkeypatch.setattr(servers, "model_server", fake)


def release(settings: Settings, digest: str, version: str, put: list[str] | None = None, **more: Any) -> Any:
    put_back = None if put is None else put.append
    given: dict[str, Any] = {"put_back": put_back, "questions": QUESTIONS, **more}
    return deploy.release(settings, Path("/model"), digest, version, QUESTIONS[0], **given)


class Load:
    """Clients that ask production one thing after the other; what they were told, and what broke."""

    def __init__(self, settings: Settings, body: Any, clients: int = 4) -> None:
        self.url = f"http://127.0.0.1:{settings.services.production_port}/v1/models/face-mllm:predict"
        self._body, self._clients = body, clients
        self.replies: list[tuple[int, str]] = []
        self.stop = threading.Event()

    def __enter__(self) -> "Load":
        self._pool = ThreadPoolExecutor(self._clients)
        self._running = [self._pool.submit(self._ask) for _ in range(self._clients)]
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for one in self._running:
            one.result()
        self._pool.shutdown()

    def _ask(self) -> None:
        with httpx.Client(trust_env=False, timeout=60) as client:
            while not self.stop.is_set():
                try:
                    reply = client.post(self.url, json=self._body)
                    self.replies.append((reply.status_code, reply.headers.get("X-Backend", "")))
                except httpx.HTTPError as error:
                    self.replies.append((0, type(error).__name__))
                time.sleep(0.005)

    @property
    def failed(self) -> list[tuple[int, str]]:
        return [one for one in self.replies if one[0] != 200]

    @property
    def servers(self) -> Counter[str]:
        return Counter(name for _, name in self.replies)


BODY = {"instances": [{"question": HAT}]}


def states(settings: Settings) -> dict[str, str]:
    return {row.name: row.state for row in services.status(settings) if row.state != "down"}


def test_one_model_after_the_other_without_a_failed_request(settings: Settings, small: None) -> None:
    put: list[str] = []
    first = release(settings, "equal", "1", put)
    assert not first.adopted
    assert release(settings, "equal", "1", put).adopted
    with Load(settings, BODY) as load:
        for version in ("2", "3"):
            wait_until(lambda: len(load.replies) > 20)
            release(settings, "equal", version, put)
            found = servers.deployed(settings, "production")
            assert found is not None
            assert (found.version, states(settings)) == (version, {"production": "up", found.name: "up"})
            before = len(load.replies)
            wait_until(lambda: len(load.replies) > before + 20)  # noqa: B023
            assert {name for _, name in load.replies[before + 8 :]} == {found.name}
    assert load.failed == []
    assert set(load.servers) == set(servers.BACKENDS)
    assert put == []
    assert services.down(settings, ["production"]) == ["production", "production-a"]
    assert production.up(settings).url == f"http://127.0.0.1:{settings.services.production_port}"
    assert states(settings) == {"production": "up", "production-a": "up"}
    assert get(settings, "/anything") == {"ready": True}


def get(settings: Settings, path: str) -> Any:
    with urllib.request.urlopen(f"http://127.0.0.1:{settings.services.production_port}{path}", timeout=30) as reply:
        return json.load(reply)


@pytest.mark.parametrize(
    ("kind", "said"),
    [("failing", "requests failed"), ("slow", "95th percentile"), ("different", "differ from evaluation's")],
)
def test_a_worse_model_is_rolled_back_by_itself(settings: Settings, small: None, kind: str, said: str) -> None:
    put: list[str] = []
    release(settings, "equal", "1", put)
    with Load(settings, BODY) as load:
        message = refuses(rf"{said}(.|\n)*production serves version 1 again", release, settings, kind, "2", put)
        assert "% of the requests it was worse" in message
        before = len(load.replies)
        wait_until(lambda: len(load.replies) > before + 30)
    assert len(put) == 1
    assert said in put[0]
    assert {status for status, _ in load.replies} <= ({200, 500} if kind == "failing" else {200})
    assert set(Counter(name for _, name in load.replies[before + 8 :])) == {"production-a"}
    assert states(settings) == {"production": "up", "production-a": "up"}


def test_what_fails_before_it_got_a_request_leaves_the_former_model_alone(settings: Settings, small: None) -> None:
    put: list[str] = []
    release(settings, "equal", "1", put)

    def differs(url: str) -> None:
        assert url != f"http://127.0.0.1:{settings.services.production_port}"
        raise UserError("3 of 40 answers differ")

    with Load(settings, BODY) as load:
        refuses(
            "3 of 40 answers differ\nproduction serves version 1 again",
            release,
            settings,
            "slow",
            "2",
            put,
            parity=differs,
        )
    assert load.failed == []
    assert set(load.servers) == {"production-a"}
    refuses(
        "instead of 'yes'",
        deploy.release,
        settings,
        Path("/m"),
        "equal",
        "3",
        Probe(b"", HAT, "yes", "yes"),
        put_back=put.append,
    )
    refuses(
        "serves nothing now",
        deploy.release,
        settings,
        Path("/m"),
        "equal",
        "1",
        Probe(b"", HAT, "yes", "yes"),
        put_back=None,
    )
    assert states(settings) == {}


KILLED = """
import sys, threading
sys.path[:0] = {path!r}
import pytest
from pathlib import Path
from tests.integration import test_serving_release as t
from facemllm.core import servers
from facemllm.settings import load
settings = load("laptop", {sets!r})
t.small.__wrapped__(settings, pytest.MonkeyPatch())
t.release(settings, "equal", "2", [])
"""


def test_a_killed_release_leaves_the_former_model_serving_and_its_own_is_named_and_ended(
    settings: Settings, small: None, tmp_path: Path
) -> None:
    release(settings, "equal", "1", [])
    named = {"storage.home": settings.home, "services.staging_port": settings.services.staging_port}
    ports = ("production_port", "staging_grpc_port", "production_grpc_port")
    named |= {f"services.{name}": getattr(settings.services, name) for name in ports}
    named |= {"services.start_timeout_s": 90}
    named |= {"serve.canary.step_seconds": 600, "serve.canary.steps": "[50, 100]", "serve.canary.max_p95_ratio": 9}
    code = KILLED.format(
        path=sys.path[:1] + [str(Path(__file__).parents[2])], sets=[f"{k}={v}" for k, v in named.items()]
    )
    with Load(settings, BODY) as load:
        killed = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
        try:
            wait_until(lambda: load.servers["production-b"] > 10)
            assert states(settings) == {"production": "up", "production-a": "up", "production-b": "up"}
        finally:
            killed.kill()
            killed.wait()
        time.sleep(0.6)  # the proxy looks for the release four times a second
        before = len(load.replies)
        wait_until(lambda: len(load.replies) > before + 50)
        assert set(Counter(name for _, name in load.replies[before + 8 :])) == {"production-a"}
        row = next(row for row in services.status(settings) if row.name == "production-b")
        assert (row.state, row.why[:24]) == ("orphaned", "no request goes to it: i")
        found = servers.deployed(settings, "production")
        assert found is not None
        assert found.version == "1"
        release(settings, "equal", "3", [])
        assert states(settings) == {"production": "up", "production-b": "up"}
    assert load.failed == []


def test_what_a_killed_first_release_left_in_the_place_of_the_former_server_gets_no_request(
    settings: Settings, small: None
) -> None:
    release(settings, "equal", "1")
    services.down(settings, ["production"])
    known = servers.deployed(settings, "production")
    assert known is not None
    left = servers.model_server(settings, known.name, Path("/m"), "slow", "2", known.port)
    services.up(settings, known.name, left)
    assert production.serving(settings) is None
    assert states(settings) == {}


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_that_is_ended_under_load_loses_at_most_what_it_had_begun(
    settings: Settings, small: None, how: int
) -> None:
    running = release(settings, "equal", "1", [])
    with Load(settings, BODY, clients := 4) as load:
        wait_until(lambda: len(load.replies) > 50)
        os.kill(running.pid, how)
        wait_until(lambda: any(status == 503 for status, _ in load.replies))
        wait_until(lambda: load.replies[-1][0] == 200)  # its supervisor brought it back
    lost = [one for one in load.failed if one[0] != 503]
    assert len(lost) <= clients, lost
    counted = production.counts(settings)["backends"]["production-a"]
    assert counted["broken"] == len(lost)
    assert counted["refused"] == sum(status == 503 for status, _ in load.replies)
    print(f"{signal.Signals(how).name}: {len(lost)} requests lost, {counted['refused']} refused while none served")


def test_a_proxy_that_is_killed_comes_back_by_itself_with_the_model_it_had(settings: Settings, small: None) -> None:
    def rows() -> dict[str, Any]:
        return {row.name: row for row in services.status(settings)}

    release(settings, "equal", "1", [])
    before = rows()
    with Load(settings, BODY, clients := 4) as load:
        wait_until(lambda: len(load.replies) > 50)
        os.kill(before["production"].pid, signal.SIGKILL)
        wait_until(lambda: any(status == 0 for status, _ in load.replies))
        wait_until(lambda: load.replies[-1][0] == 200)  # its supervisor brought it back
    after = rows()
    assert (after["production"].state, after["production"].restarts) == ("up", before["production"].restarts + 1)
    assert after["production"].pid != before["production"].pid
    assert after["production-a"].pid == before["production-a"].pid, "the model server stayed as it was"
    assert load.servers.keys() - {name for _, name in load.failed} == {"production-a"}
    in_flight = [name for status, name in load.failed if (status, name) != (0, "ConnectError")]
    assert len(in_flight) <= clients, in_flight
    print(f"{len(in_flight)} requests lost, {len(load.failed) - len(in_flight)} found nobody until it was back")


def test_real_model_servers_are_switched_without_a_failed_request(
    settings: Settings, model: Path, probe: Probe
) -> None:
    quick = {"min_requests": 10, "max_p95_ratio": 50.0, "steps": [50.0, 100.0]}
    serve = settings.serve.model_copy(update={"canary": settings.serve.canary.model_copy(update=quick)})
    settings = settings.model_copy(update={"serve": serve})
    local.policy(settings)
    home = Home(settings)
    home.person(ADA, "requester", "approver")
    home.approve(model, 7)
    digest = digests.of_tree(model)
    deploy.release(settings, model, digest, "7", probe, put_back=None)
    with Load(settings, {"instances": [probe.instance]}, clients=2) as load:
        wait_until(lambda: len(load.replies) > 10)
        endpoint = deploy.release(settings, model, digest, "8", probe, put_back=None)
        before = len(load.replies)
        wait_until(lambda: len(load.replies) > before + 10)
    assert load.failed == []
    assert set(load.servers) == set(servers.BACKENDS)
    assert (get(settings, "/info")["version"], get(settings, "/v2/health/ready")) == ("8", {"ready": True})
    assert deploy.ask(endpoint.url, endpoint.model, probe.instance)["answer"] == probe.answer
