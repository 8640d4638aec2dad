"""Training runs in processes that start at once and may be killed: forked from one that has imported everything."""

import multiprocessing
import os
import random
import signal
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from glob import glob
from pathlib import Path
from typing import Any

from facemllm import settings
from facemllm.train.stage import StageRun, TrainResult, prepare_run

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["facemllm.train.worker", "facemllm.train.torchrun", "peft"])

SMALL = (
    "model.image_size=32",
    "train.threads=1",
    "train.checkpoint_every=4",
    *(f"train.stages.{stage}.steps=24" for stage in ("align", "instruct", "specialize")),
    *(f"train.stages.{stage}.batch_images=6" for stage in ("align", "instruct", "specialize")),
)
BRANCHES = ("model.segmentation.mode=append", "model.knowledge.enabled=true", "model.knowledge.tasks=[gender]")


def prepare(table: Path, folder: Path, *overrides: str, stage: str = "align", base: Path | None = None) -> StageRun:
    """A small stage to train, its model and its work under `folder`."""
    loaded = settings.load("laptop", [*SMALL, *overrides])
    return prepare_run(stage, loaded, table, base, folder / f"{stage}-model", folder / "work", folder / "cache")


def train(given: StageRun, world: int = 1) -> TrainResult:
    """Train a run in `world` processes under a group that meets in a file; the result of the first."""
    meeting = given.work / f"meeting-{time.monotonic_ns()}"
    answers = FORKS.SimpleQueue()
    given_here = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "NO_PROXY"))}
    about = world, str(meeting), given_here, answers
    ranks = [FORKS.Process(target=_rank, args=(given, rank, *about)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    try:
        for rank in ranks:
            rank.join(200)
        assert not answers.empty(), f"the ranks ended with {[rank.exitcode for rank in ranks]}"
        result = answers.get()
        assert isinstance(result, TrainResult), result
        return result
    finally:
        for rank in ranks:
            rank.kill()
        meeting.unlink(missing_ok=True)


def _rank(given: StageRun, rank: int, world: int, meeting: str, environment: dict[str, str], answers: Any) -> None:
    import torch.distributed as dist

    from facemllm.train.worker import train_worker

    os.environ.update(environment, GLOO_SOCKET_IFNAME="lo")
    try:
        if world > 1:
            dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
        result = train_worker(replace(given, rank=rank, world_size=world, local_rank=rank, local_world_size=world))
        if result is not None:
            answers.put(result)
    except BaseException:
        answers.put(traceback.format_exc())
        os._exit(1)  # the others may wait for this one


def torchrun(arguments: Sequence[str]) -> Any:
    """A process that runs `facemllm.train.torchrun` with these arguments, started."""
    process = FORKS.Process(target=_torchrun, args=(list(arguments),))
    process.start()
    return process


def _torchrun(arguments: list[str]) -> None:
    from facemllm.train.torchrun import main

    raise SystemExit(main(arguments))


def kill_somewhere(pid: int, work: Path, draw: random.Random, most: int, alive: Any) -> bool:
    """Kill a process by SIGKILL after a drawn number of new checkpoints and a moment; whether it still ran."""
    before, wanted = set(glob(f"{work}/*/checkpoint-*")), draw.randint(0, most)
    deadline = time.monotonic() + 120
    while alive() and len(set(glob(f"{work}/*/checkpoint-*")) - before) < wanted:
        assert time.monotonic() < deadline, "no checkpoint appears"
        time.sleep(0.005)
    time.sleep(draw.random() * (0.15 if wanted else 2))  # without a checkpoint: anywhere from the start on
    killed = bool(alive())
    if killed:
        os.kill(pid, signal.SIGKILL)
    return killed
