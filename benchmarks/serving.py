"""The model server against the plainest KServe predictor: one picture and eight closed questions a request.

    .venv/bin/python benchmarks/serving.py --model FOLDER --server-cpus 0 --client-cpus 1

Servers and client are processes of their own on loopback. The client keeps so many connections busy, each sending its
next request when it has its answer; contenders take turns at each number of clients. Every request brings a picture
that the server has not seen (`fresh`), or each client asks about the one it has (`same`). The peer
(`serving_plain.py`) takes the same bodies and calls `generate` a question. Reported are requests a second, p50 and p95
in milliseconds, the ratios, processor seconds of server and client a request, and how much longer than the bare
function (decode, prepare, score, by the engine's own pass) one client waits. Nothing else should run.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil
from common import report
from PIL import Image

QUESTIONS = 8
TASKS = ("attributes", "expression", "age", "head_pose")
PICTURES = 64
SIDE = 256
START_SECONDS = 240


@dataclass
class Server:
    """A contender that runs."""

    name: str
    process: subprocess.Popen[bytes]
    port: int
    ready_s: float = 0.0

    def cpu_s(self) -> float:
        """Processor seconds of the server and its children so far."""
        own = psutil.Process(self.process.pid)
        return sum(one.cpu_times().user + one.cpu_times().system for one in (own, *own.children(recursive=True)))


@dataclass
class Load:
    """What came of a time under load."""

    seconds: float = 0.0
    times: list[float] = field(default_factory=list)
    refused: int = 0
    failed: int = 0
    server_cpu_s: float = 0.0
    client_cpu_s: float = 0.0

    def figures(self) -> dict[str, float]:
        """Requests a second, latencies in ms, processor ms a request."""
        ordered, count = sorted(self.times), max(1, len(self.times))
        pick = (lambda share: 1000 * ordered[min(count - 1, int(share * count))]) if ordered else lambda share: 0.0
        found = {"per_s": len(self.times) / self.seconds, "p50_ms": pick(0.5), "p95_ms": pick(0.95)}
        found |= {"server_cpu_ms": 1000 * self.server_cpu_s / count, "client_cpu_ms": 1000 * self.client_cpu_s / count}
        return {name: round(value, 2) for name, value in found.items()} | {
            "refused": self.refused,
            "failed": self.failed,
        }


def questions() -> list[str]:
    """Eight closed questions of the tasks that a deployment knows."""
    from facemllm import tasks

    found = (q.templates[0] for name in TASKS for q in tasks.get(name).questions() if q.options)
    return list(itertools.islice(found, QUESTIONS))


def pictures() -> list[bytes]:
    """JPEGs of drawn faces, one a person."""
    from facemllm.heads.render import render_identity

    found = []
    for number in range(PICTURES):
        image = Image.open(io.BytesIO(render_identity(0, number, 1, SIDE)[0]["image"])).convert("RGB")
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return found


def named(picture: bytes, name: int) -> bytes:
    """The JPEG with a comment, so that its bytes are its own."""
    comment = name.to_bytes(8, "big")
    return picture[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + picture[2:]


def request(picture: bytes, asked: list[str]) -> bytes:
    """A whole HTTP request."""
    image = {"b64": base64.b64encode(picture).decode()}
    body = json.dumps({"instances": [{"image": image, "question": text} for text in asked]}).encode()
    head = "POST /v1/models/face-mllm:predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def client(port: int, requests: Iterator[bytes], end: float, load: Load) -> None:
    """One connection that asks until `end` (monotonic); what is begun is finished, a broken connection made anew."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while (started := time.monotonic()) < end:
        try:
            status, answers = await asked_once(reader, writer, next(requests))
        except (OSError, EOFError):
            load.failed += 1
            await asyncio.sleep(0.1)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            continue
        if status == 200 and answers == QUESTIONS:
            load.times.append(time.monotonic() - started)
        elif status == 429:
            load.refused += 1
            await asyncio.sleep(0.1)
        else:
            load.failed += 1
    writer.close()


async def asked_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, whole: bytes) -> tuple[int, int]:
    """Status of the reply to a request, and how many answers it holds."""
    writer.write(whole)
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
    length = next(int(line.split(":")[1]) for line in lines if line.startswith("content-length:"))
    body = json.loads(await reader.readexactly(length))
    return int(lines[0].split()[1]), len(body.get("predictions", ()))


def keep_busy(
    server: Server, clients: int, seconds: float, kind: str, material: list[bytes], asked: list[str], load: Load
) -> None:
    """Keep `clients` connections busy for so long, and add to `load` what came of it."""
    number = itertools.count(time.monotonic_ns())

    def fresh(start: int) -> Iterator[bytes]:
        for place in itertools.count(start):
            yield request(named(material[place % len(material)], next(number)), asked)

    def same(start: int) -> Iterator[bytes]:
        return itertools.repeat(request(named(material[start % len(material)], next(number)), asked))

    async def go() -> None:
        end = time.monotonic() + seconds
        one = fresh if kind == "fresh" else same
        await asyncio.gather(*(client(server.port, one(start), end, load) for start in range(clients)))

    own, theirs, started = time.process_time(), server.cpu_s(), time.monotonic()
    asyncio.run(go())
    load.seconds += time.monotonic() - started
    load.client_cpu_s += time.process_time() - own
    load.server_cpu_s += server.cpu_s() - theirs


def start(name: str, command: list[str], cpus: str | None, port: int, log: Path) -> Server:
    """Start a server and wait until it is ready."""
    pinned = ["taskset", "-c", cpus] if cpus else []
    began = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen([*pinned, *command], stdout=file, stderr=subprocess.STDOUT)
    while time.monotonic() < began + START_SECONDS and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models/face-mllm", timeout=5) as reply:
                if json.load(reply).get("ready"):
                    return Server(name, process, port, time.monotonic() - began)
        except OSError:
            time.sleep(0.1)
    process.kill()
    sys.exit(f"{name} did not start:\n{log.read_text()[-2000:]}")


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def bare(model: Path, threads: int, material: list[bytes], asked: list[str], seconds: float) -> dict[str, float]:
    """Median milliseconds of the bare function, which decodes a picture, prepares it and scores eight questions about
    it: as evaluation does (`evaluation`), and with the pass that the server computes with (`served`)."""
    from facemllm import tasks
    from facemllm.core import images
    from facemllm.model.inference import Predictor, Query
    from facemllm.serve.engine.own import OwnEngine

    predictor = Predictor.load(model, threads=threads)
    known = {q.templates[0]: q for name in TASKS for q in tasks.get(name).questions() if q.options}
    queries = [Query(text, tuple(option.text for option in known[text].options)) for text in asked]

    def median(scored_by: Any) -> float:
        times: list[float] = []
        end = time.monotonic() + seconds
        for picture in itertools.cycle(material):
            started = time.monotonic()
            visual = predictor.encode([predictor.pixels(images.opened(picture))])
            for layout in predictor.passes(queries):
                scored_by.score_rows(visual.flat_BNF, [layout])
            times.append(time.monotonic() - started)
            if started > end:
                break
        return round(1000 * statistics.median(times), 2)

    found = {"evaluation": median(predictor)}
    engine = OwnEngine(predictor, threads=threads)
    engine.make_ready()
    return found | {"served": median(engine.scoring)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a trained model directory")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=float, default=10, help="a contender and number of clients")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", default=["fresh", "same"], choices=["fresh", "same"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--server-cpus", help="cores of the servers, as taskset takes them")
    parser.add_argument("--client-cpus", help="cores of the client")
    parser.add_argument("--config", default="{}", help="more settings of the section serve for our server, as JSON")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for logs")
    given = parser.parse_args()

    from facemllm.core import digests

    given.scratch.mkdir(parents=True, exist_ok=True)
    asked, material = questions(), pictures()
    if given.client_cpus:
        os.sched_setaffinity(0, {int(core) for core in given.client_cpus.split(",")})
    ports = [free_port(), free_port()]
    ours = [sys.executable, "-m", "facemllm.serve.server", "--model", str(given.model), "--port", str(ports[0])]
    ours += ["--digest", digests.of_tree(given.model), "--tasks", ",".join(TASKS)]
    ours += ["--config", json.dumps({"threads": given.threads, **json.loads(given.config)})]
    plain = [sys.executable, str(Path(__file__).with_name("serving_plain.py")), "--model", str(given.model)]
    plain += ["--port", str(ports[1]), "--threads", str(given.threads)]
    servers: list[Server] = []
    found: dict[str, dict[str, Any]] = {}
    try:
        servers.append(start("ours", ours, given.server_cpus, ports[0], given.scratch / "ours.log"))
        servers.append(start("plain", plain, given.server_cpus, ports[1], given.scratch / "plain.log"))
        for server in servers:  # warm
            keep_busy(server, 2, 1, "fresh", material, asked, Load())
        for kind, clients in itertools.product(given.kinds, given.clients):
            loads = {server.name: Load() for server in servers}
            for turn in range(given.rounds):
                for server in servers if turn % 2 == 0 else reversed(servers):
                    keep_busy(server, clients, given.seconds, kind, material, asked, loads[server.name])
            for name, load in loads.items():
                found[f"{kind} {clients} {name}"] = load.figures()
                print(f"{kind:6} {clients:3} {name:6} {json.dumps(load.figures())}", flush=True)
        memory = {server.name: psutil.Process(server.process.pid).memory_info().rss >> 20 for server in servers}
    finally:
        for server in servers:
            server.process.terminate()
        for server in servers:
            try:
                server.process.wait(15)
            except subprocess.TimeoutExpired:
                server.process.kill()
    if given.server_cpus:
        os.sched_setaffinity(0, {int(core) for core in given.server_cpus.split(",")})
    alone = bare(given.model, given.threads, material, asked, given.seconds)
    ratios = {}
    for kind, clients in itertools.product(given.kinds, given.clients):
        ours_, theirs = (found[f"{kind} {clients} {name}"] for name in ("ours", "plain"))
        ratios[f"{kind} {clients} requests_per_s"] = ours_["per_s"] / theirs["per_s"]
        ratios[f"{kind} {clients} p95"] = theirs["p95_ms"] / max(ours_["p95_ms"], 0.01)
    over = found["fresh 1 ours"]["p50_ms"] - alone["served"] if "fresh 1 ours" in found else None
    ready = {server.name: round(server.ready_s, 1) for server in servers}
    report(
        "serving",
        ratios,
        ["torch", "transformers", "kserve", "uvicorn"],
        bare_ms=alone,
        one_client_over_bare_ms=over and round(over, 2),
        ready_s=ready,
        rss_mib=memory,
        threads=given.threads,
        questions=QUESTIONS,
        picture=f"{SIDE}x{SIDE} JPEG",
        seconds=given.seconds,
        rounds=given.rounds,
    )


if __name__ == "__main__":
    main()
