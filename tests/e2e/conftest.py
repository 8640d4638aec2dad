"""A checkout with a home, runs and ports of its own, for the end-to-end tests of a module; the main job's is shared."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from facemllm.settings import load
from tests.ports import free_ray_port

_STAGE = load("ci").stages()["specialize"].model_dump() | {"steps": 2}
FOURTH_STAGE = f"train.stages.polish={json.dumps(_STAGE)}"
"""What it takes to have one: an entry of `train.stages`."""
SHORT = ("train.stages.align.steps=12",)  # with fewer of the others not one answer can be read
LONG = ("train.stages.specialize.steps=40", "train.checkpoint_every=10")  # so that it can be killed in the middle


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for item in sockets:
        item.bind(("127.0.0.1", 0))
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports


class Project:
    """The checkout, with a home, runs and ports of its own. The folder's name has signs that shells, URLs and
    configuration files read as their own."""

    def __init__(self, folder: Path, *sets: str, profile: str = "ci") -> None:
        self.profile = profile
        home = self.home = folder / 'my "faces" & Ada\'s ünï 100%2F #1'
        home.mkdir()
        names = ("mlflow", "staging", "production", "staging_grpc", "production_grpc")
        ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.sets = [*sets, *(f"storage.{name}={json.dumps(str(home / name))}" for name in ("home", "runs"))]
        self.sets += [f"services.{name}_port={port}" for name, port in ports.items()]
        self.sets += [f"services.ray_port={free_ray_port()}"]

    def command(self, *words: str, more: tuple[str, ...] = ()) -> list[str]:
        sets = [part for item in (*self.sets, *more) for part in ("--set", item)]
        return [sys.executable, *words, "--profile", self.profile, *sets]

    def call(self, *words: str, more: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*words, more=more), capture_output=True, text=True, timeout=900, check=False)

    def run(self, name: str = "ci", more: tuple[str, ...] = ()) -> dict[str, Any]:
        done = self.call("pipeline.py", "run", "--name", name, more=more)
        log = self.home / "runs" / name / "run.log"
        said = log.read_text("utf-8", "replace") if log.exists() else done.stdout
        assert done.returncode == 0, done.stderr[-3000:] + said[-6000:]
        return self.summary(name)

    def summary(self, name: str) -> dict[str, Any]:
        return json.loads((self.home / "runs" / name / "summary.json").read_text("utf-8"))

    def facemllm(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.call("-m", "facemllm", *words)

    def processes(self) -> list[psutil.Process]:
        """Whoever names this home in its words or surroundings; `info["cmdline"]` stays readable when it ends."""
        found = []
        for process in psutil.process_iter(["cmdline", "environ"]):
            words, surroundings = process.info["cmdline"], process.info["environ"]
            text = " ".join([*(words or ()), *(surroundings or {}).values()])
            if str(self.home) in text and process.pid != os.getpid():
                found.append(process)
        return found


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """The project of the main job, whose finished run the notebooks are executed on."""
    project = Project(tmp_path_factory.mktemp("e2e"), FOURTH_STAGE, *SHORT, *LONG)
    yield project
    project.facemllm("services", "down")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    project = Project(tmp_path_factory.mktemp("e2e"))
    yield project
    project.facemllm("services", "down")
