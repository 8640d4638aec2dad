"""What the annotation job costs beside the requests: against the same calls in a bare asyncio loop; and its memory.

    .venv/bin/python benchmarks/annotation.py                     1,000 rows, 50 ms latency, in turns with the bare loop
    .venv/bin/python benchmarks/annotation.py --rows 100000       low latency, the job alone, memory over time

The endpoint is the fake one of the tests, in a process of its own on loopback. Both sides read the same table, reduce
the same pictures, send the same bodies through httpx with as many requests at once, and check every reply. The job does
on top what a loop lacks: it goes through Ray Data (two tasks, a piece of 500 rows each), reserves from the budget and
stores every reply durably (one wait for the disk a reply), holds text against labels, and writes the annotated table.
Ray runs before the clock starts, as on a cluster, and its workers have been used once. Ratio: time of the job / time of
the loop.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from common import Sampled, in_turns, median, report

TASKS = 2


def write_table(folder: Path, count: int) -> Path:
    """A faces table of so many rows with a few labels; a hundred pictures under names of their own."""
    from PIL import Image

    from facemllm.tables import FACES, TableWriter, pairs

    generator = np.random.default_rng(0)
    pictures = []
    for _ in range(100):
        coarse = generator.integers(0, 255, (14, 14, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse.repeat(16, 0).repeat(16, 1)).save(buffer, format="JPEG")
        pictures.append(buffer.getvalue())

    def rows() -> Iterator[dict[str, Any]]:
        for number in range(count):
            yield {
                "image_id": f"{number:064x}",
                "image": {"bytes": pictures[number % 100], "path": None},
                "width": 224,
                "height": 224,
                "source": "render",
                "source_id": f"{number:06d}",
                "split": "train",
                "attributes": pairs({"Smiling": number % 2 == 0, "Eyeglasses": False}),
                "age": float(20 + number % 50),
                "gender": ("female", "male")[number % 2],
            }

    with TableWriter(folder, FACES) as table:
        table.write(rows())
    return folder


@contextmanager
def fake_endpoint(latency_s: float) -> Iterator[str]:
    """The fake endpoint in its own process; its address."""
    script = Path(__file__).parents[1] / "tests" / "fake_endpoint.py"
    process = subprocess.Popen(
        [sys.executable, str(script), "--latency", str(latency_s)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())["base_url"]
    finally:
        process.stdin.close()
        process.wait(20)


def configured(home: Path, base_url: str, parallel: int) -> Any:
    """Settings of the job. Every home is a store of its own, so no reply is found there."""
    from facemllm import settings

    return settings.load(
        "laptop",
        [
            f"storage.home={home}",
            "annotate.annotator=endpoint",
            "annotate.vision_language.model=fake",
            f"annotate.endpoint.base_url={base_url}",
            f"annotate.endpoint.parallel={parallel // TASKS}",
            f"annotate.concurrency={TASKS}",
            "annotate.batch_size=500",
        ],
    )


def bare_loop(chosen: Any, faces: Path, parallel: int) -> int:
    """The same calls without the job; how many replies fit."""
    from facemllm.annotate import prompt
    from facemllm.annotate.describer import endpoint
    from facemllm.asking.completions import Answered, Completions
    from facemllm.tables import open_table

    table = open_table(faces)
    describer = endpoint(chosen, ["render"])
    columns = [*describer.columns, "image"]

    async def go() -> int:
        options = chosen.annotate.endpoint.model_copy(update={"parallel": parallel})
        completions = Completions(options, chosen.annotate.vision_language, prompt.schema(), None)
        rows = table.iterate(columns)
        fit = 0

        async def asker() -> None:
            nonlocal fit
            for row in rows:
                outcome, _ = await completions.attempt(describer.request(row, prompt.messages(row)))
                assert isinstance(outcome, Answered)
                prompt.read(outcome.text or "")
                fit += 1

        async with completions.connected():
            await asyncio.gather(*(asker() for _ in range(parallel)))
        return fit

    return asyncio.run(go())


class Watch(Sampled):
    """Memory of the driver and of Ray's workers (MiB), sampled once a second while the block runs."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self.samples: dict[str, list[float]] = {"driver": [], "workers": []}

    def _look(self) -> None:
        found = dict.fromkeys(self.samples, 0.0)
        for process in psutil.process_iter():
            try:
                words = " ".join(process.cmdline())
                part = "driver" if process.pid == os.getpid() else ""
                part = "workers" if words.startswith("ray::") else part
                if part:
                    memory = process.memory_info()
                    found[part] += (memory.rss - memory.shared) / 2**20
            except psutil.Error:
                continue
        for part, mib in found.items():
            self.samples[part].append(mib)

    def mib(self) -> dict[str, list[int]]:
        """Ten samples of each, from the first tenth of the time to its end."""
        return {
            part: [round(values[len(values) * n // 10 - 1]) for n in range(1, 11)] if len(values) >= 10 else []
            for part, values in self.samples.items()
        }


def overhead(folder: Path, rows: int, latency_s: float, parallels: list[int], rounds: int) -> None:
    """The job against the bare loop, in turns, for several numbers of requests at once."""
    from facemllm.annotate.run import annotate

    faces = write_table(folder / "faces", rows)
    warm = write_table(folder / "warm", 300)
    turn = iter(range(10_000))
    ratios, seconds = {}, {}
    with fake_endpoint(latency_s) as base_url:

        def job(table: Path, parallel: int) -> None:
            number = next(turn)
            annotate(configured(folder / f"home-{number}", base_url, parallel), table, folder / f"out-{number}")

        def loop(parallel: int) -> None:
            chosen = configured(folder / f"home-{next(turn)}", base_url, parallel)
            assert bare_loop(chosen, faces, parallel) == rows

        job(warm, 8)
        for parallel in parallels:
            taken = in_turns(rounds, loop=partial(loop, parallel), job=partial(job, faces, parallel))
            quotients = [a / b for a, b in zip(taken["job"], taken["loop"], strict=True)]
            ratios[f"job / bare loop, {parallel} at once"] = median(quotients)
            seconds[parallel] = {name: [round(s, 2) for s in values] for name, values in taken.items()}
    packages = ["httpx", "ray", "pyarrow"]
    load = round(os.getloadavg()[1], 1)
    report("annotation", ratios, packages, rows=rows, latency_s=latency_s, seconds=seconds, load_5_min=load)


def memory(folder: Path, rows: int, latency_s: float, parallel: int) -> None:
    """The job alone over many rows: whether memory stays flat."""
    from facemllm.annotate.run import annotate

    faces = write_table(folder / "faces", rows)
    with fake_endpoint(latency_s) as base_url, Watch() as watch:
        started = time.perf_counter()
        annotate(configured(folder / "home", base_url, parallel), faces, folder / "out")
        seconds = time.perf_counter() - started
    mib = watch.mib()
    ratios = {f"{part}, end / first fifth": values[-2] / values[1] for part, values in mib.items() if values}
    packages = ["httpx", "ray", "pyarrow"]
    report("annotation-memory", ratios, packages, rows=rows, rows_a_second=round(rows / seconds), mib=mib)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000, help="more than 10,000: memory over time")
    parser.add_argument("--parallel", type=int, nargs="+", default=[4, 8], help="requests at once, over both tasks")
    parser.add_argument("--latency", type=float, default=None, help="seconds; 0.05, or 0.002 for many rows")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    import ray

    folder = Path(tempfile.mkdtemp(prefix="annotation-"))
    ray.init(num_cpus=TASKS, include_dashboard=False, object_store_memory=256 * 2**20, log_to_driver=False)
    try:
        if given.rows > 10_000:
            memory(folder, given.rows, 0.002 if given.latency is None else given.latency, given.parallel[-1])
        else:
            latency_s = 0.05 if given.latency is None else given.latency
            overhead(folder, given.rows, latency_s, given.parallel, given.rounds)
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
