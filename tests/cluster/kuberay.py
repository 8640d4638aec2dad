"""A stand-in for KubeRay's operator: it does what a RayJob asks with real Ray, on this machine.

A head and a process of Ray for each worker pod, token authentication, `ray job submit` of the entrypoint as KubeRay's
submitter runs it. A worker that dies is replaced. Of a pod template only the variables are honoured.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil

from tests.cluster.pods import variables
from tests.kubernetes_server import Body, Cluster

PORT, DASHBOARD = 6379, 8265
FAILED = {"deployment": "Failed", "job": "FAILED"}
BIN = Path(sys.executable).parent


def end(process: subprocess.Popen[Any]) -> None:
    """Kill a process and all that it has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        for one in [*parent.children(recursive=True), parent]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait(30)


class RayCluster:
    """The processes of one RayJob."""

    def __init__(self, cluster: Cluster, job: Body, folder: Path, project: Path) -> None:
        self.cluster, self.job = cluster, job
        self.name, self.namespace = job["metadata"]["name"], job["metadata"]["namespace"]
        self.folder, self.project, self.closed = folder, project, False
        self.environment = os.environ | {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_raylet_start_wait_time_s": "600",  # of a busy machine
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_TMPDIR": str(folder),
        }
        self.workers: dict[int, subprocess.Popen[Any]] = {}
        self.replaced, self.nodes = 0, 0
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def tell(self, deployment: str, job: str = "", **more: Any) -> None:
        ready = sum(one.poll() is None for one in self.workers.values())
        nodes = {"rayClusterStatus": {"readyWorkerReplicas": ready, "desiredWorkerReplicas": len(self.workers)}}
        self.cluster.set_status("RayJob", self.name, jobDeploymentStatus=deployment, jobStatus=job, **nodes, **more)

    def start(self, part: str, template: Body, words: list[str]) -> subprocess.Popen[Any]:
        base = 20000 + 100 * self.nodes  # several nodes on one machine: each port is given, or two take the same
        self.nodes += 1
        names = [
            "node-manager",
            "object-manager",
            "runtime-env-agent",
            "dashboard-agent-listen",
            "dashboard-agent-grpc",
        ]
        ports = [f"--{name}-port={base + n}" for n, name in enumerate([*names, "metrics-export", "min-worker"])]
        words = [*words, *ports, f"--max-worker-port={base + 99}"]
        (container,) = template["spec"]["containers"]
        with (self.folder / f"{part}.log").open("ab") as log:
            return subprocess.Popen(
                [BIN / "ray", "start", "--block", "--disable-usage-stats", "--object-store-memory=80000000", *words],
                stdout=log,
                stderr=log,
                env=self.environment | variables(self.cluster, self.namespace, container["env"]),
                cwd=self.project,
                start_new_session=True,
            )

    def worker(self, number: int) -> None:
        (group,) = self.job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        address = [f"--address=127.0.0.1:{PORT}", f"--num-cpus={limits['cpu']}"]
        self.workers[number] = self.start(f"worker-{number}", group["template"], address)

    def run(self) -> None:
        spec = self.job["spec"]
        group, head = spec["rayClusterSpec"]["workerGroupSpecs"][0], spec["rayClusterSpec"]["headGroupSpec"]
        self.tell("Initializing")
        ports = [f"--port={PORT}", "--dashboard-host=127.0.0.1", f"--dashboard-port={DASHBOARD}"]
        given = [f"--num-cpus={head['rayStartParams']['num-cpus']}"]
        self.head = self.start("head", head["template"], ["--head", *ports, *given])
        try:
            self.ready(1)
            for number in range(group["replicas"]):  # by turns: two that start at once in one session lose one another
                self.worker(number)
                self.ready(2 + number)
            self.tell("Running", "RUNNING")
            ended = self.submit(spec["entrypoint"])
        except Exception as error:
            ended = {**FAILED, "reason": "SubmissionFailed", "message": str(error)[-2000:]}
        for process in (*self.workers.values(), self.head):
            end(process)
        self.tell(**ended)

    def ready(self, nodes: int) -> None:
        """Wait until so many nodes are alive, by Ray's own word."""
        asked = urllib.request.Request(
            f"http://127.0.0.1:{DASHBOARD}/api/v0/nodes?detail=1",
            headers={"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"},
        )
        until, answer = time.monotonic() + 600, ""  # of a busy machine
        while not self.closed:
            try:
                with urllib.request.urlopen(asked, timeout=20) as response:
                    answer = response.read().decode()
            except OSError as error:
                answer = str(error)
            if answer.count('"ALIVE"') >= nodes:
                return
            for name, process in {"head": self.head, **{f"worker-{n}": p for n, p in self.workers.items()}}.items():
                assert process.poll() is None, (self.folder / f"{name}.log").read_text()
            assert time.monotonic() < until, answer
            time.sleep(0.3)

    def submit(self, entrypoint: str) -> dict[str, str]:
        """What the container of KubeRay's submitter runs, by bash; its output is the log of that pod. How it ended."""
        pod, template = f"{self.name}-submitter", self.job["spec"]["submitterPodTemplate"]
        self.cluster.put({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": pod, **template["metadata"]}})
        command = f"ray job submit --address http://127.0.0.1:{DASHBOARD} --submission-id {self.name} -- {entrypoint}"
        log = self.folder / "submitter.log"
        with log.open("ab") as out:
            submitter = subprocess.Popen(
                ["bash", "-c", command], stdout=out, stderr=out, env=self.environment, start_new_session=True
            )
        while submitter.poll() is None:
            if self.closed:
                end(submitter)
                return FAILED
            for number, process in list(self.workers.items()):
                if process.poll() is not None:  # as KubeRay does with a pod that is gone
                    self.replaced += 1
                    self.worker(number)
            time.sleep(0.2)
        self.cluster.logs[pod] = log.read_text()
        if submitter.returncode == 0:
            return {"deployment": "Complete", "job": "SUCCEEDED"}
        return {**FAILED, "reason": "AppFailed", "message": f"exit code {submitter.returncode}"}

    def kill_worker(self, number: int) -> None:
        """Let the machine of a worker be lost."""
        process = self.workers[number]
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
        process.kill()

    def tasks(self, number: int) -> dict[str, list[str]]:
        """What the processes of a worker are at, as Ray titles them, and which files they have open."""
        found = {}
        with contextlib.suppress(psutil.NoSuchProcess, KeyError):
            for one in psutil.Process(self.workers[number].pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    found[" ".join(one.cmdline())] = [file.path for file in one.open_files()]
        return {title: files for title, files in found.items() if title.startswith("ray::")}

    def pause(self, how: int = signal.SIGSTOP) -> None:
        """Let all workers stand still, or with SIGCONT go on."""
        for process in self.workers.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                for one in psutil.Process(process.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        one.send_signal(how)

    def close(self) -> None:
        self.closed = True
        self.thread.join(60)


class KubeRay:
    """The operator: a `RayCluster` for each RayJob of a cluster, ended when its job is deleted. Its commands run in a
    folder `project`, as they would in the image's."""

    def __init__(self, cluster: Cluster, folder: Path, project: Path | None = None) -> None:
        self.cluster, self.folder, self.project = cluster, folder, project or Path.cwd()
        self.jobs: dict[str, RayCluster] = {}
        cluster.on("RayJob", self.react)

    def react(self, what: str, body: Body) -> None:
        uid = body["metadata"]["uid"]
        if what == "ADDED":
            (folder := self.folder / f"r{len(self.jobs)}").mkdir()
            self.jobs[uid] = RayCluster(self.cluster, body, folder, self.project)
        elif what == "DELETED" and uid in self.jobs:
            self.jobs[uid].close()

    def close(self) -> None:
        for one in self.jobs.values():
            one.close()
