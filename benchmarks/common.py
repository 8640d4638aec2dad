"""What every benchmark shares: the machine and versions it ran on, memory over time, and how it reports.

A benchmark runs the project and what a user would take instead side by side in one run, in turns, and reports ratios:
absolute times of a shared machine say little. Its last line is one JSON object: name, ratios, versions, hardware.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import psutil


def hardware() -> dict[str, Any]:
    """Processor, cores and memory of this machine."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python, of these packages, and of this project's commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    found = {"python": platform.python_version(), "commit": commit.stdout.strip() or "unknown"}
    return found | {name: version(name) for name in packages}


def in_turns(rounds: int, **candidates: Callable[[], Any]) -> dict[str, list[float]]:
    """Seconds of every candidate in every round; who goes first changes, so that a slow moment hits all."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            started = time.perf_counter()
            candidates[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds


class Sampled:
    """Something looked at every so often, by a thread, while the block runs."""

    def __init__(self, interval_s: float) -> None:
        self._interval, self._stop = interval_s, threading.Event()

    def _look(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            self._look()


class Memory(Sampled):
    """Resident memory of this process and all below it, sampled while the block runs: `with Memory() as memory`."""

    def __init__(self, interval_s: float = 0.1) -> None:
        super().__init__(interval_s)
        self.samples: list[int] = []

    def _look(self) -> None:
        process, total = psutil.Process(), 0
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                total += one.memory_info().rss
        self.samples.append(total)

    def mib(self) -> dict[str, int]:
        """Memory after a tenth of the time, at the half, at its peak (MiB): equal figures are flat memory."""
        if not self.samples:
            return {}
        tenth, half = self.samples[len(self.samples) // 10], self.samples[len(self.samples) // 2]
        return {name: value >> 20 for name, value in (("early", tenth), ("half", half), ("peak", max(self.samples)))}


def median(values: Sequence[float]) -> float:
    """The middle value."""
    return statistics.median(values)


def report(name: str, ratios: Mapping[str, float], packages: Sequence[str], **more: Any) -> None:
    """Print the last line of a benchmark."""
    rounded = {key: round(value, 3) for key, value in ratios.items()}
    facts = {"name": name, "ratios": rounded, **more, "versions": versions(*packages), "hardware": hardware()}
    print(json.dumps(facts))
