"""The model server under twice the load that it can carry: what it serves, what it refuses, and whether it stays well.

    .venv/bin/python benchmarks/serving_overload.py --model FOLDER --minutes 10 --server-cpus 0 --client-cpus 1

What it can carry is measured first, with 16 connections that each wait for their answers. Then requests (a picture
that the server has not seen and eight closed questions, as in `serving.py`) come at random times at `--times` that
rate, whatever becomes of those before them, from eight addresses of loopback: the clients of the server's
fair queue. Nobody asks again after a 429. Beside them a probe asks for the health four times a second. Reported are
counts by status, the latency of served requests (overall and by fifths of the time), that of the probe, and the
server's memory: after a tenth of the time and at its end.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import serving
from common import report

ADDRESSES = 8
FIFTHS = 5
PATIENCE_S = 60.0
_Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass
class Observed:
    """What came of the load: statuses (0: the connection broke, -1: no answer in time), latencies of served requests
    and when they were sent, the probe's latencies and failures, memory in MiB and when it was read."""

    statuses: Counter[int] = field(default_factory=Counter)
    served: list[tuple[float, float]] = field(default_factory=list)
    health: list[float] = field(default_factory=list)
    unwell: int = 0
    memory: list[tuple[float, float]] = field(default_factory=list)


async def one_request(
    port: int, address: str, free: dict[str, list[_Connection]], whole: bytes, observed: Observed
) -> None:
    """Send a request on a connection that is free, or a new one, and note what came of it."""
    sent = time.monotonic()
    try:
        async with asyncio.timeout(PATIENCE_S):
            while free[address] and free[address][-1][0].at_eof():  # the server has closed it, as it may
                free[address].pop()
            if free[address]:
                connection = free[address].pop()
            else:
                connection = await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0))
            status, answers = await serving.asked_once(*connection, whole)
    except TimeoutError:
        observed.statuses[-1] += 1
        return
    except (OSError, EOFError):
        observed.statuses[0] += 1
        return
    observed.statuses[status] += 1
    if status == 200 and answers == serving.QUESTIONS:
        observed.served.append((sent, time.monotonic() - sent))
    free[address].append(connection)


async def probe(port: int, observed: Observed) -> None:
    """Ask for the health until cancelled."""
    whole = b"GET /v2/health/ready HTTP/1.1\r\nHost: localhost\r\n\r\n"
    while True:
        began = time.monotonic()
        try:
            async with asyncio.timeout(PATIENCE_S):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                status, _ = await serving.asked_once(reader, writer, whole)
                writer.close()
            observed.unwell += status != 200
        except (TimeoutError, OSError, EOFError):
            observed.unwell += 1
        observed.health.append(time.monotonic() - began)
        await asyncio.sleep(0.25)


async def watch_memory(server: serving.Server, observed: Observed) -> None:
    """Read the server's memory every second until cancelled."""
    process = psutil.Process(server.process.pid)
    while True:
        observed.memory.append((time.monotonic(), process.memory_info().rss / 2**20))
        await asyncio.sleep(1)


async def overload(
    server: serving.Server, rate: float, seconds: float, material: list[bytes], asked: list[str]
) -> Observed:
    """Requests at random times at a mean rate, for so long; all are waited for."""
    observed, free = Observed(), defaultdict[str, list[_Connection]](list)
    number, chance = itertools.count(time.monotonic_ns()), random.Random(0)
    beside = [asyncio.create_task(probe(server.port, observed)), asyncio.create_task(watch_memory(server, observed))]
    running: set[asyncio.Task[None]] = set()
    due = time.monotonic()
    end = due + seconds
    while due < end:
        due += chance.expovariate(rate)
        if (rest := due - time.monotonic()) > 0:
            await asyncio.sleep(rest)
        picture = serving.named(material[next(number) % len(material)], next(number))
        address = f"127.0.0.{chance.randrange(2, 2 + ADDRESSES)}"
        one = asyncio.create_task(one_request(server.port, address, free, serving.request(picture, asked), observed))
        running.add(one)
        one.add_done_callback(running.discard)
        await asyncio.sleep(0)
    await asyncio.gather(*running)
    for one in beside:
        one.cancel()
    return observed


def quantile(values: list[float], share: float) -> float:
    """Milliseconds."""
    ordered = sorted(values)
    return round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 1) if ordered else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a trained model directory")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--times", type=float, default=2, help="the load, in what the server can carry")
    parser.add_argument("--seconds", type=float, default=15, help="of measuring what it can carry")
    parser.add_argument("--server-cpus", help="cores of the server, as taskset takes them")
    parser.add_argument("--client-cpus", help="cores of the client")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for logs")
    given = parser.parse_args()

    from facemllm.core import digests

    given.scratch.mkdir(parents=True, exist_ok=True)
    asked, material = serving.questions(), serving.pictures()
    if given.client_cpus:
        os.sched_setaffinity(0, {int(core) for core in given.client_cpus.split(",")})
    port = serving.free_port()
    command = [sys.executable, "-m", "facemllm.serve.server", "--model", str(given.model), "--port", str(port)]
    command += ["--digest", digests.of_tree(given.model), "--tasks", ",".join(serving.TASKS)]
    server = serving.start("ours", command, given.server_cpus, port, given.scratch / "overload.log")
    try:
        serving.keep_busy(server, 2, 1, "fresh", material, asked, serving.Load())
        alone = serving.Load()
        serving.keep_busy(server, 16, given.seconds, "fresh", material, asked, alone)
        carried = alone.figures()
        print(f"carried: {json.dumps(carried)}", flush=True)
        rate, seconds, began = given.times * carried["per_s"], 60 * given.minutes, time.monotonic()
        cpu = server.cpu_s()
        observed = asyncio.run(overload(server, rate, seconds, material, asked))
        took, cpu = time.monotonic() - began, server.cpu_s() - cpu
        after = serving.Load()
        serving.keep_busy(server, 16, given.seconds, "fresh", material, asked, after)
        alive = server.process.poll() is None
    finally:
        server.process.terminate()
        server.process.wait(30)
    total = sum(observed.statuses.values())
    fifths = [
        quantile([took for sent, took in observed.served if int(FIFTHS * (sent - began) / seconds) == fifth], 0.95)
        for fifth in range(FIFTHS)
    ]
    warm = [mib for when, mib in observed.memory if 0.1 <= (when - began) / seconds <= 0.2]
    late = [mib for when, mib in observed.memory if 0.9 <= (when - began) / seconds <= 1]
    report(
        "serving_overload",
        {"requests_sent / carried": total / took / carried["per_s"]},
        ["torch", "transformers", "kserve", "uvicorn"],
        minutes=round(took / 60, 2),
        carried=carried,
        carried_afterwards=after.figures(),
        sent=total,
        statuses={str(status): count for status, count in sorted(observed.statuses.items())},
        server_errors=sum(count for status, count in observed.statuses.items() if status >= 500 or status <= 0),
        share_429=round(observed.statuses[429] / max(1, total), 3),
        served_per_s=round(len(observed.served) / took, 1),
        served_p50_ms=quantile([took for _, took in observed.served], 0.5),
        served_p95_ms=quantile([took for _, took in observed.served], 0.95),
        served_p95_ms_by_fifths=fifths,
        health={
            "asked": len(observed.health),
            "p95_ms": quantile(observed.health, 0.95),
            "max_ms": quantile(observed.health, 1),
        }
        | {"not_ready": observed.unwell},
        rss_mib={"warm": round(sum(warm) / max(1, len(warm))), "late": round(sum(late) / max(1, len(late)))}
        | {"most": round(max(mib for _, mib in observed.memory))},
        server_cpu_share=round(cpu / took, 2),
        alive=alive,
    )


if __name__ == "__main__":
    main()
