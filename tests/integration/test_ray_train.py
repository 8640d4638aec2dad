"""Training under Ray Train for real: workers and drivers are killed; the run goes on and ends with the same bytes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from facemllm.core import digests
from facemllm.model.inference import Predictor, Query
from tests import ranks
from tests.integration.conftest import ray_environment, stop_tree

pytestmark = pytest.mark.integration

OVERRIDES = (
    *("model.image_size=32", "train.threads=1", "train.checkpoint_every=10"),
    *("train.stages.align.steps=60", "train.stages.align.batch_images=8"),
    *("train.stages.instruct.steps=40", "train.stages.instruct.batch_images=4"),
)

# The driver: stages one after the other, [name, base, step to hold at, overrides] each, and what came of each as JSON.
# At the step to hold at, the worker of the first attempt writes its process id and waits to be killed.
DRIVER = """
import dataclasses, json, os, sys, time
from pathlib import Path

class Hold:
    def __init__(self, folder, hold):
        self.folder, self.hold = folder, hold
    def __call__(self, step, metrics):
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps({"step": step, "pid": os.getpid(), **metrics}) + "\\n")
        if step == self.hold and not (self.folder / "held").exists():
            (self.folder / "held").write_text(str(os.getpid()))
            time.sleep(600)

if __name__ == "__main__":
    from facemllm import settings
    from facemllm.errors import UserError
    from facemllm.train.launch import train
    table, folder, stages, results = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]), []
    if len(stages) > 1 and "RAY_ADDRESS" not in os.environ:  # else each stage starts a Ray of its own
        import ray
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=128 * 2**20, log_to_driver=False)
    for stage, base, hold, overrides in stages:
        try:
            result = train(
                stage, settings.load("laptop", overrides), table, Path(base) if base else None,
                folder / f"{stage}-model", folder / "work", folder / "cache", Hold(folder, hold),
            )
            results.append(dataclasses.asdict(result))
        except UserError as error:
            results.append(f"refused: {error}")
    print("RESULTS " + json.dumps(results))
"""


def one(stage: str, *overrides: str, hold: int = 0, base: str = "") -> tuple[str, str, int, list[str]]:
    """A stage for the driver."""
    return stage, base, hold, [*OVERRIDES, *overrides]


@contextmanager
def driving(table: Path, folder: Path, *stages: tuple[str, str, int, list[str]], ray: str | None = None):
    """A driver in a session of its own, on the head `ray` or with a Ray of its own; gone when the block ends."""
    environment = ray_environment() | ({"RAY_ADDRESS": ray} if ray else {})
    command = [sys.executable, "-c", DRIVER, str(table), str(folder), json.dumps(stages)]
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


def results_of(driver: subprocess.Popen[str], folder: Path):
    output, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, (folder / "driver.log").read_text()
    return json.loads(output.split("RESULTS ", 1)[1])


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
    with driving(table, tmp_path, one("align", hold=20)) as driver:
        held_worker(tmp_path, driver)
    assert not (tmp_path / "align-model").exists()
    (tmp_path / "held").unlink()
    with driving(table, tmp_path, one("align", hold=40), ray=ray_head) as driver:
        worker = held_worker(tmp_path, driver)
        os.kill(worker, signal.SIGKILL)
        (result,) = results_of(driver, tmp_path)
    assert result["steps"] == 60
    assert 20 < result["resumed_from"] <= 40
    assert result["cost"]["samples"] == 480
    assert logged(tmp_path)[-1]["pid"] != worker
    assert logged(tmp_path)[-1]["step"] == 60
    assert digests.of_tree(tmp_path / "align-model") == without_ray(table, tmp_path / "quiet")
    assert not [p for p in (tmp_path / "work").iterdir() if p.is_dir()]  # no checkpoint is left behind


def test_two_workers_train_and_the_next_stage_elastic_and_with_checkpoints_on_s3_survives_a_kill(
    conversations_table: Callable[..., Path], tmp_path: Path, bucket
):
    # on a Ray of its own: workers have the credentials of whoever started Ray
    table, elastic = conversations_table(), ("train.min_workers=1", "train.storage=s3://faces/runs")
    align = one("align", "train.workers=2")
    instruct = one("instruct", "train.workers=2", *elastic, hold=20, base=str(tmp_path / "align-model"))
    with driving(table, tmp_path, align, instruct) as driver:
        os.kill(held_worker(tmp_path, driver), signal.SIGKILL)
        first, second = results_of(driver, tmp_path)
    for result, steps, samples in ((first, 60, 480), (second, 40, 160)):
        assert (result["steps"], result["cost"]["samples"]) == (steps, samples)
        assert result["cost"]["peak_memory_bytes"] > 2**20
        assert result["cost"]["flops"] > 2 * result["cost"]["tokens"]
        assert result["cost"]["seconds"] > 0
    assert (first["resumed_from"], 0 < second["resumed_from"] <= 20) == (0, True)
    assert digests.of_tree(tmp_path / "align-model") == without_ray(table, tmp_path / "quiet", world=2)
    predictor, query = Predictor.load(tmp_path / "instruct-model", threads=1), Query("What about gender?", ("a", "b"))
    ((answer,),) = predictor.score([np.zeros((48, 48, 3), np.uint8)], [[query]])
    assert sum(answer.probabilities) == pytest.approx(1)
    left = bucket.list_objects_v2(Bucket="faces").get("Contents", [])
    assert not [entry["Key"] for entry in left if "checkpoint-" in entry["Key"]]


MANY = ("train.use_gpu=true", "train.workers=64", "train.stages.align.batch_images=64")


def test_what_a_user_can_mend_is_said_in_one_line(conversations_table, tmp_path: Path, ray_head: str):
    stages = one("align", *MANY), one("instruct", base="/nowhere")
    with driving(conversations_table(), tmp_path, *stages, ray=ray_head) as driver:
        many, nowhere = results_of(driver, tmp_path)
    assert many.startswith("refused: 64 workers need 64 GPUs, and Ray's cluster has ")
    assert re.fullmatch("refused: cannot load the model .*/nowhere.*", nowhere)
