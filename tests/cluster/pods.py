"""Pods on this machine: a process each, with what their container is given: words, variables, keys of Secrets, files of
ConfigMaps. What they mount at / lies in a folder of their own; what they mount of a claim lies where it is mounted."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from tests.integration.conftest import free_port, stop_tree
from tests.kserve_controller import CannotStart
from tests.kubernetes_server import Body, Cluster

PATIENCE_S = 600.0
MOUNTS = ("verified", "checkpoint", "tmp")


def secret(cluster: Cluster, namespace: str, name: str, values: Mapping[str, str]) -> None:
    """Make a Secret."""
    data = {key: base64.b64encode(value.encode()).decode() for key, value in values.items()}
    metadata = {"name": name, "namespace": namespace}
    cluster.put({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": data})


def variables(cluster: Cluster, namespace: str, env: Iterable[Body]) -> dict[str, str]:
    """The variables of a container, those of Secrets, which are all optional, among them."""
    found = {}
    for one in env:
        if "value" in one:
            found[one["name"]] = one["value"]
        elif reference := one["valueFrom"].get("secretKeyRef"):
            data = (cluster.get("Secret", reference["name"], namespace) or {}).get("data", {})
            assert reference.get("optional"), reference
            if reference["key"] in data:
                found[one["name"]] = base64.b64decode(data[reference["key"]]).decode()
    return found


def bare() -> dict[str, str]:
    """The environment of this process, less what only a Secret may give."""
    return {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}


class ServingPod:
    """The pod of an InferenceService's revision: its first container to its end, then the server, until it is ready."""

    def __init__(self, cluster: Cluster, body: Body, folder: Path) -> None:
        spec, self._namespace = body["spec"]["predictor"], body["metadata"]["namespace"]
        self.port, self._cluster, self._folder = free_port(), cluster, folder
        for name in MOUNTS:
            (folder / name).mkdir(parents=True)
        for volume in spec["volumes"]:
            if "configMap" in volume:
                self._write(volume["name"], volume["configMap"]["name"])
        for container in spec.get("initContainers", []):
            done = subprocess.run(self._command(container), capture_output=True, text=True, env=self._env(container))
            if done.returncode:
                raise CannotStart(f"Init container failed with: {done.stderr.strip().splitlines()[-1]}")
        (container,) = spec["containers"]
        self._log = (folder / "log").open("wb")
        self._process = subprocess.Popen(
            self._command(container), stdout=self._log, stderr=self._log, env=self._env(container)
        )
        ready, until = container["readinessProbe"]["httpGet"]["path"], time.monotonic() + PATIENCE_S
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{self.port}{ready}", trust_env=False, timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            if self._process.poll() is not None or time.monotonic() > until:
                self.stop()
                last = (folder / "log").read_text("utf-8", "replace").strip().splitlines()[-1:]
                raise CannotStart(f"Container failed with: {last}")
            time.sleep(0.3)

    def _write(self, mount: str, name: str) -> None:
        (self._folder / mount).mkdir()
        for file, text in (self._cluster.get("ConfigMap", name, self._namespace) or {}).get("data", {}).items():
            (self._folder / mount / file).write_text(text, "utf-8")

    def _command(self, container: Body) -> list[str]:
        return [sys.executable, *container["command"][1:], *(self._here(word) for word in container["args"])]

    def _here(self, word: str) -> str:
        key, _, value = word.partition("=")
        if key in ("--host", "--port"):
            value = "127.0.0.1" if key == "--host" else str(self.port)
        elif value == "/tmp" or value.startswith(("/verified/", "/checkpoint/", "/policy/")):
            value = str(self._folder / value[1:])
        return f"{key}={value}"

    def _env(self, container: Body) -> dict[str, str]:
        given = variables(self._cluster, self._namespace, container["env"])
        return {**bare(), **given, "HOME": os.environ.get("HOME", "/"), "AWS_CONFIG_FILE": os.devnull}

    def stop(self) -> None:
        stop_tree(self._process)
        self._log.close()


class Clients:
    """Two clients that ask production one thing after the other, and the `statuses` of the answers."""

    def __init__(self, url: str, body: Any) -> None:
        self._url, self._body, self._end, self.statuses = url, body, False, list[int]()

    def __enter__(self) -> Clients:
        self._pool = ThreadPoolExecutor(2)
        self._running = [self._pool.submit(self._ask) for _ in range(2)]
        return self

    def __exit__(self, *_: object) -> None:
        self._end = True
        for one in self._running:
            one.result()
        self._pool.shutdown()

    def _ask(self) -> None:
        with httpx.Client(trust_env=False, timeout=120) as client:
            while not self._end:
                self.statuses.append(client.post(self._url, json=self._body).status_code)
                time.sleep(0.1)
