"""Annotation through the launcher: the stand-ins of Kubernetes and KubeRay, and a real Ray of three nodes behind them.
What it is held against is annotated in this process, piece by piece, without Ray.
"""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from facemllm.settings import Settings, load
from facemllm.tables import open_table, pairs, storage
from facemllm.workflow import runner
from tests.cluster.kuberay import KubeRay
from tests.cluster.test_training import cluster, kuberay, wait_for  # noqa: F401
from tests.kubernetes_server import Cluster, serving
from tests.unit.test_annotation_step import checkpoint, no_ray  # noqa: F401

SIZES = ("annotate.concurrency=2", "cluster.steps.annotate={cpu: '1', memory: 2Gi, timeout: 1h}")


def settings_of(home: Path, *over: str) -> tuple[list[str], Settings]:
    given = [*SIZES, *over, f"storage.home={home}", f"storage.runs={home / 'runs'}"]
    return given, load("ci", given)


def replies(settings: Settings) -> dict[str, str]:
    """What a model has said, by its key."""
    file = settings.home / "annotations" / "replies.sqlite"
    if not file.exists():
        return {}
    with closing(sqlite3.connect(file, timeout=60)) as database:
        return {key: json.loads(reply)["text"] for key, reply in database.execute("SELECT key, reply FROM replies")}


@pytest.mark.parametrize("annotator", ["oracle", "local"])
def test_a_lost_node_ends_with_the_bytes_of_a_table_annotated_here(
    annotator: str,
    cluster: Cluster,  # noqa: F811
    kuberay: KubeRay,  # noqa: F811
    request: pytest.FixtureRequest,
    face_rows: Callable[..., list[dict[str, Any]]],
    faces_table: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count, piece = {"oracle": (8_000, 1_000), "local": (48, 8)}[annotator]
    over = [f"annotate.batch_size={piece}"]
    if annotator == "local":  # its answers are drawn, each from a seed of its own: no two rows have the same
        words = {
            "model": str(request.getfixturevalue("checkpoint")),
            "max_tokens": 8,
            "temperature": 1.0,
            "image_side": 32,
        }
        over += ["annotate.annotator=local", f"annotate.vision_language={json.dumps(words)}"]
    rows = [
        row | {"image_id": f"{n:064x}", "attributes": pairs({"Wearing_Hat": n % 5 == 0}), "yaw": float(n % 50)}
        for n, row in enumerate(face_rows(40) * (count // 40 + 1))
    ][:count]
    given, settings = settings_of(tmp_path / "away", *over)
    _, plain = settings_of(tmp_path / "here", *over)
    for name, one in (("one", settings), ("two", plain)):
        with monkeypatch.context() as patch:
            patch.setattr(storage, "ROW_GROUP", piece)
            table = faces_table(rows, name=name)
        digest = open_table(table).digest
        (one.home / "store").mkdir(parents=True)
        table.rename(one.home / "store" / digest)
    log = tmp_path / "launcher.log"
    sets = [word for one in [*given, "annotate.launcher=rayjob"] for word in ("--set", one)]
    command = [sys.executable, "-m", "facemllm", "step", "annotate", "--input", f"faces={digest}", "--profile", "ci"]
    with serving(cluster) as address, log.open("ab") as out:
        cluster.kubeconfig(tmp_path / "kubeconfig", address, "trainer")
        environment = os.environ | {"KUBECONFIG": str(tmp_path / "kubeconfig")}
        step = subprocess.Popen([*command, *sets], stdout=out, stderr=out, env=environment)
        wait_for(lambda: kuberay.jobs or step.poll() is not None, "no job", log)
        (job,) = kuberay.jobs.values()

        def lost() -> list[list[str]]:
            return [files for title, files in job.tasks(1).items() if "MapBatches" in title]

        begun = {"oracle": lost, "local": lambda: lost() and len(replies(settings)) > 8}[annotator]
        while True:
            wait_for(lambda: begun() or step.poll() is not None, "no task", log)
            assert step.poll() is None, log.read_text()
            job.pause()
            if files := lost():  # it is at work on that node, and stands still
                break
            job.pause(signal.SIGCONT)
        assert not [file for file in files[0] if "replies.sqlite" in file], "the head alone has it open"
        (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{step.pid}/status").read_text())
        assert int(peak) < 448 * 1024, "cluster.steps.launcher gives it 512Mi, of which KFP's own launcher takes some"
        job.kill_worker(1)
        job.pause(signal.SIGCONT)
        assert step.wait(900) == 0, log.read_text() + job.folder.joinpath("submitter.log").read_text()
    assert (len(kuberay.jobs), job.replaced) == (1, 1)
    result = log.read_text().splitlines()[-1]
    assert result == runner.execute("annotate", plain, faces=digest)
    made = open_table(settings.home / "store" / result)
    if annotator == "oracle":
        assert (made.rows, len({row["caption"] for row in made.iterate(["caption"])}) > 1000) == (count, True)
    else:
        assert (made.rows, made.manifest["quarantined"]) == (0, count)
        assert replies(settings) == replies(plain)
        assert len({*replies(settings).values()}) > count
