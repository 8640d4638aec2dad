"""Training under Ray Train for real: workers and drivers are killed; the run goes on and ends with the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from facemllm import settings
from facemllm.core import digests
from facemllm.model.inference import Predictor, Query
from facemllm.train import launch
from facemllm.train.stage import TrainResult
from tests import ranks
from tests.integration.conftest import stop_tree
from tests.refusing import refuses

pytestmark = pytest.mark.integration

OVERRIDES = (
    *("model.image_size=32", "train.threads=1", "train.checkpoint_every=10"),
    *("train.stages.align.steps=60", "train.stages.align.batch_images=8"),
    *("train.stages.instruct.steps=20", "train.stages.instruct.batch_images=4"),
)

# The driver: a stage, its result as JSON. `hold` is the step at which the worker of the first attempt writes its
# process id and waits to be killed.
DRIVER = """
import dataclasses, json, os, sys, time
from pathlib import Path

class Hold:
    def __init__(self, folder, hold):
        self.folder, self.hold = Path(folder), int(hold)
    def __call__(self, step, metrics):
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps({"step": step, "pid": os.getpid(), **metrics}) + "\\n")
        if step == self.hold and not (self.folder / "held").exists():
            (self.folder / "held").write_text(str(os.getpid()))
            time.sleep(600)

if __name__ == "__main__":
    from facemllm import settings
    from facemllm.train.launch import train
    table, folder, hold = sys.argv[1:4]
    folder = Path(folder)
    result = train(
        "align", settings.load("laptop", sys.argv[4:]), Path(table), None,
        folder / "align-model", folder / "work", folder / "cache", Hold(folder, hold),
    )
    print("RESULT " + json.dumps(dataclasses.asdict(result)))
"""


@contextmanager
def driving(table: Path, folder: Path, *overrides: str, hold: int, head: str = ""):
    """A driver in a session of its own, on a Ray head or with a Ray of its own; it is gone when the block ends."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | ({"RAY_ADDRESS": head} if head else {})
    command = [sys.executable, "-c", DRIVER, str(table), str(folder), str(hold), *OVERRIDES, *overrides]
    with (folder / "driver.log").open("ab") as log:
        driver = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, start_new_session=True
        )
    try:
        yield driver
    finally:
        stop_tree(driver, signal.SIGKILL)


def held_worker(folder: Path, driver: subprocess.Popen[str]) -> int:
    """Process id of the worker that waits to be killed; its last checkpoint has had time to be registered."""
    end = time.monotonic() + 240
    while not (folder / "held").exists() or not (folder / "held").read_text():
        assert driver.poll() is None, (folder / "driver.log").read_text()
        assert time.monotonic() < end, "the worker did not reach the step"
        time.sleep(0.2)
    time.sleep(2)
    return int((folder / "held").read_text())


def result_of(driver: subprocess.Popen[str], folder: Path):
    output, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, (folder / "driver.log").read_text()
    return json.loads(output.split("RESULT ", 1)[1])


def logged(folder: Path):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def without_ray(table: Path, folder: Path, *overrides: str, world: int = 1) -> str:
    """Digest of what `align` gives undisturbed and without Ray."""
    given = ranks.prepare(table, folder, *OVERRIDES, *overrides)
    ranks.train(given, world)
    return digests.of_tree(given.out)


def test_killed_worker_and_killed_driver_end_with_the_bytes_of_a_run_without_ray(
    conversations_table: Callable[..., Path], tmp_path: Path, ray_head: str
):
    table = conversations_table()
    with driving(table, tmp_path, hold=20, head=ray_head) as driver:
        held_worker(tmp_path, driver)
    assert not (tmp_path / "align-model").exists()
    (tmp_path / "held").unlink()
    with driving(table, tmp_path, hold=40) as driver:
        worker = held_worker(tmp_path, driver)
        os.kill(worker, signal.SIGKILL)
        result = result_of(driver, tmp_path)
    assert result["steps"] == 60
    assert 20 < result["resumed_from"] <= 40
    assert result["cost"]["samples"] == 480
    assert logged(tmp_path)[-1]["pid"] != worker
    assert logged(tmp_path)[-1]["step"] == 60
    assert digests.of_tree(tmp_path / "align-model") == without_ray(table, tmp_path / "quiet")
    assert not [p for p in (tmp_path / "work").iterdir() if p.is_dir()]  # no checkpoint is left behind


def train(stage: str, table: Path, folder: Path, base: Path | None, *overrides: str) -> TrainResult:
    """A stage, driven by this process."""
    given = settings.load("laptop", [*OVERRIDES, *overrides])
    interrupted = signal.getsignal(signal.SIGINT)
    try:
        return launch.train(stage, given, table, base, folder / f"{stage}-model", folder / "work", folder / "cache")
    finally:
        signal.signal(signal.SIGINT, interrupted)  # Ray Train takes it and keeps it


def test_two_workers_train_and_the_next_stage_takes_over(
    conversations_table: Callable[..., Path], tmp_path: Path, ray_head: str
):
    table, base = conversations_table(), None
    for stage, steps in {"align": 60, "instruct": 20}.items():
        result = train(stage, table, tmp_path, base, "train.workers=2")
        base = tmp_path / f"{stage}-model"
        assert result.steps == steps
        assert result.cost["peak_memory_bytes"] > 2**20
        assert result.cost["flops"] > 2 * result.cost["tokens"]
        assert result.cost["seconds"] > 0
    assert digests.of_tree(tmp_path / "align-model") == without_ray(table, tmp_path / "quiet", world=2)
    predictor, query = Predictor.load(tmp_path / "instruct-model", threads=1), Query("What about gender?", ("a", "b"))
    ((answer,),) = predictor.score([np.zeros((48, 48, 3), np.uint8)], [[query]])
    assert sum(answer.probabilities) == pytest.approx(1)


def test_an_elastic_run_with_checkpoints_on_s3_survives_a_kill(
    conversations_table: Callable[..., Path], tmp_path: Path, bucket: Any
):
    table = conversations_table()
    overrides = ("train.workers=2", "train.min_workers=1", "train.storage=s3://faces/runs")
    with driving(table, tmp_path, *overrides, hold=40) as driver:
        os.kill(held_worker(tmp_path, driver), signal.SIGKILL)
        result = result_of(driver, tmp_path)
    assert 0 < result["resumed_from"] <= 40
    assert result["cost"]["samples"] == 480
    left = bucket.list_objects_v2(Bucket="faces").get("Contents", [])
    assert not [entry["Key"] for entry in left if "checkpoint-" in entry["Key"]]


MANY = ("train.use_gpu=true", "train.workers=2")


@pytest.mark.parametrize(
    ("overrides", "stage", "base", "said"),
    [
        (MANY, "align", None, "2 workers need 2 GPUs, and Ray's cluster has "),
        ((), "instruct", Path("/nowhere"), "cannot load the model .*/nowhere"),
    ],
)
def test_what_a_user_can_mend_is_said_in_one_line(
    conversations_table, tmp_path: Path, ray_head: str, overrides, stage, base, said
):
    refuses(f"^{said}", train, stage, conversations_table(), tmp_path, base, *overrides)
