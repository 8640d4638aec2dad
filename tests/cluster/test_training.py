"""A stage through the launcher: the stand-ins of Kubernetes and KubeRay, and behind them a real Ray of three nodes."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from facemllm.core.step import CLUSTER_RUN
from facemllm.core.store import Store
from facemllm.settings import Settings, load
from facemllm.tables import open_table
from facemllm.tracking import runs as tracking
from facemllm.workflow import runner
from tests.cluster.kuberay import KubeRay
from tests.kubernetes_server import Cluster, serving
from tests.unit.test_k8s import documents, schema_faults

SMALL = (
    *("model.image_size=32", "train.threads=1", "train.checkpoint_every=20", "train.workers=2"),
    *("train.stages.align.steps=200", "train.stages.align.batch_images=8", "train.divergence=0"),
    *("cluster.steps.train={cpu: '1', memory: 2Gi, timeout: 1h}", "cluster.steps.ray_head.env={NOTE: of the head}"),
)


@pytest.fixture
def cluster() -> Cluster:
    return Cluster(roles=documents("base"), faults=schema_faults)


@pytest.fixture
def kuberay(cluster: Cluster) -> Iterator[KubeRay]:
    with tempfile.TemporaryDirectory(prefix="r") as folder:  # short: Ray's sockets lie in it
        operator = KubeRay(cluster, Path(folder))
        yield operator
        operator.close()


def placed(folder: Path, table: Path, uri: str) -> tuple[list[str], Settings, str]:
    """A home with a conversations table in its store: overrides, settings, the table's digest."""
    over = [*SMALL, f"storage.home={folder / 'home'}", f"storage.runs={folder / 'runs'}", f"tracking.uri={uri}"]
    settings, digest = load("ci", over), open_table(table).digest
    (settings.home / "store").mkdir(parents=True)
    table.rename(settings.home / "store" / digest)
    return over, settings, digest


def launcher(over: list[str], digest: str, log: Path, **environment: str) -> subprocess.Popen[Any]:
    """The command of a step's pod."""
    command = [sys.executable, "-m", "facemllm", "step", "align", f"--input=conversations={digest}", "--profile", "ci"]
    sets = [word for one in [*over, "train.launcher=rayjob"] for word in ("--set", one)]
    with log.open("ab") as out:
        return subprocess.Popen([*command, *sets], stdout=out, stderr=out, env=os.environ | environment)


def wait_for(met: Callable[[], Any], what: str, log: Path) -> Any:
    until = time.monotonic() + 600
    while not (found := met()):
        assert time.monotonic() < until, f"{what}\n{log.read_text()[-3000:]}"
        time.sleep(0.05)
    return found


def test_killed_launcher_and_lost_node_end_with_the_bytes_of_a_stage_trained_here(
    cluster: Cluster,
    kuberay: KubeRay,
    conversations_table: Callable[..., Path],
    tmp_path: Path,
    mlflow_server: Any,
) -> None:
    over, settings, digest = placed(tmp_path / "away", conversations_table(name="one"), mlflow_server.uri)
    _, plain, same = placed(tmp_path / "here", conversations_table(name="two"), mlflow_server.uri)
    assert same == digest
    log = tmp_path / "launcher.log"
    with serving(cluster) as address:
        cluster.kubeconfig(tmp_path / "kubeconfig", address, "trainer")
        given = {"KUBECONFIG": str(tmp_path / "kubeconfig"), CLUSTER_RUN: "run-7"}
        first = launcher(over, digest, log, **given)
        kept = (settings.home / "work").rglob
        wait_for(lambda: len([*kept("checkpoint-*")]) > 1 or first.poll() is not None, "no checkpoint", log)
        assert first.poll() is None, log.read_text()
        (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{first.pid}/status").read_text())
        assert int(peak) < 448 * 1024, "cluster.steps.launcher gives it 512Mi, of which KFP's own launcher takes some"
        (job,) = kuberay.jobs.values()
        job.pause()
        first.send_signal(signal.SIGTERM)
        first.wait(60)
        assert not (settings.home / "keys").exists(), "it is not done yet"
        assert cluster.get("RayJob", job.name) is not None, "the end of its launcher leaves the job"
        job.kill_worker(1)
        job.pause(signal.SIGCONT)
        second = launcher(over, digest, log, **given)
        assert second.wait(900) == 0, log.read_text() + job.folder.joinpath("submitter.log").read_text()
    output = log.read_text()
    assert f"RayJob {job.name} is there already, and is followed: Running, running" in output
    assert (len(kuberay.jobs), job.replaced) == (1, 1)
    result = output.splitlines()[-1]
    assert result == runner.execute("align", plain, conversations=digest)
    record = Store(settings.home).records()[result]
    assert record["resumed_from"] > 0
    run = MlflowClient(mlflow_server.uri).get_run(record["run_id"])
    assert run.data.tags["mlflow.parentRunId"] == tracking.join_pipeline(settings, "run-7")
    assert run.data.metrics["loss"] > 0
    assert launcher(over, digest, log, KUBECONFIG="/nowhere").wait(300) == 0, "recalled: nobody is asked"


def test_what_the_command_says_is_what_the_step_says(
    cluster: Cluster, kuberay: KubeRay, conversations_table: Callable[..., Path], tmp_path: Path, mlflow_server: Any
) -> None:
    over, _, _ = placed(tmp_path / "away", conversations_table(), mlflow_server.uri)
    log = tmp_path / "launcher.log"
    with serving(cluster) as address:
        cluster.kubeconfig(tmp_path / "kubeconfig", address, "trainer")
        failed = launcher(over, "0" * 64, log, KUBECONFIG=str(tmp_path / "kubeconfig"))
        assert failed.wait(600) == 1
    last = log.read_text().splitlines()[-1]
    assert last.startswith("error: RayJob train-align-")
    assert "failed: the store has no result 000000000000" in last
