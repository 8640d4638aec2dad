"""Thousands of requests that nobody should send, to a real server: no 5xx, no hang, no growth, right answers after.

`make test-fuzz` sends the whole; here a seeded part of it. FUZZ_REQUESTS and FUZZ_SEED choose others.
"""

import http.client
import json
import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import psutil
import pytest

from facemllm.serve import deploy
from facemllm.settings import Settings
from tests.fuzzing import DOORS, Case, case, good
from tests.integration.test_serving import endpoint, model, probe, settings  # noqa: F401

pytestmark = pytest.mark.integration
REQUESTS, SEED = int(os.environ.get("FUZZ_REQUESTS", "600")), int(os.environ.get("FUZZ_SEED", "0"))
CLIENTS, SECONDS, WARM = 4, 60, 200
MOST_GROWTH = 192 * 2**20
"""Kept pictures (`serve.guard.decode_cache_mb`), and what decoders of the largest ones leave with the allocator."""
_here = threading.local()


@dataclass(frozen=True)
class Server:
    """The server under test."""

    port: int
    grpc_port: int

    def send(self, one: Case) -> tuple[int, Any]:
        """HTTP status, or gRPC code as one, and the answer."""
        return self.grpc(one) if one.door == "grpc" else self.rest(one)

    def rest(self, one: Case) -> tuple[int, bytes]:
        """Over a connection that is kept; another one where the server closed it."""
        for _ in range(2):
            held = getattr(_here, "held", None) or http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
            try:
                held.request("POST", one.path, one.body, one.headers)
                reply = held.getresponse()
                answer = reply.status, reply.read()
            except (ConnectionError, http.client.HTTPException):
                held.close()
                _here.held = None
                continue
            _here.held = held
            return answer
        raise AssertionError(f"no answer to {one}")

    def grpc(self, one: Case) -> tuple[int, bytes]:
        """0 for OK; codes that mean a fault of the server (UNKNOWN, INTERNAL, UNAVAILABLE, DATA_LOSS) as 500."""
        import grpc

        if (channel := getattr(_here, "channel", None)) is None:
            channel = _here.channel = grpc.insecure_channel(f"127.0.0.1:{self.grpc_port}")
        try:
            return 0, channel.unary_unary(one.path)(one.body, timeout=SECONDS)
        except grpc.RpcError as error:
            code = error.code().name
            undecodable = code == "INTERNAL" and "deserializ" in (error.details() or "")  # gRPC's own word for it
            faults = ("UNKNOWN", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "DEADLINE_EXCEEDED")
            return (500 if code in faults and not undecodable else 400), f"{code}: {error.details()}".encode()


@pytest.fixture(scope="module")
def server(settings: Settings, endpoint: deploy.Endpoint) -> Server:  # noqa: F811
    return Server(settings.services.staging_port, settings.services.staging_grpc_port)


def answers(server: Server) -> dict[str, Any]:
    """What every door says of a good picture, without ids and times."""
    found = {}
    for door in DOORS:
        status, data = server.send(good(door))
        assert status in (0, 200), (door, data)
        if door == "grpc":
            found[door] = data
            continue
        said = json.loads(data) if door != "v2 binary" else data
        if door == "chat":
            said = said["choices"]
        found[door] = said
    return found


def test_no_fault_no_hang_no_growth_and_right_answers_afterwards(server: Server, endpoint: deploy.Endpoint) -> None:  # noqa: F811
    process, before = psutil.Process(endpoint.pid), answers(server)
    counted: Counter[tuple[str, int]] = Counter()
    faults: list[str] = []

    def ask(number: int) -> None:
        one = case(SEED, number)
        status, answer = server.send(one)
        counted[one.door, status] += 1
        if status >= 500 and status != 501:
            faults.append(f"seed {SEED}, number {number}, {one}: {status} {bytes(answer)[:300]!r}")

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(ask, range(WARM)))
        warm = process.memory_info().rss
        list(pool.map(ask, range(WARM, REQUESTS)))
    growth = process.memory_info().rss - warm
    summary = ", ".join(f"{door} {status}: {count}" for (door, status), count in sorted(counted.items()))
    print(f"\n{counted.total()} requests; memory {warm / 2**20:.0f} MB and {growth / 2**20:+.0f}; {summary}")
    assert not faults, "\n".join(faults[:20])
    assert growth < MOST_GROWTH
    assert process.is_running()
    assert answers(server) == before
    assert {status for (_, status) in counted} >= {200, 400, 422}, "the cases reach no further than the first check"
