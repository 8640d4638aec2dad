"""Launches: two do not meet in one folder, ranks wait for one another, and their end is said in one line."""

import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from facemllm import settings
from facemllm.core.files import locked
from facemllm.errors import UserError
from facemllm.train import launch, pixels, torchrun
from facemllm.train.distributed import patient_barrier
from facemllm.train.stage import StageRun
from tests.refusing import refuses


def test_a_cache_is_built_once_by_whoever_comes_first(toy, tmp_path: Path, monkeypatch):
    built, build = [], pixels._build
    monkeypatch.setattr(pixels, "_build", lambda *given: built.append(given) or build(*given))

    def read(_):
        return pixels.pixel_cache(toy.table, toy.family, tmp_path / "shared")

    with ThreadPoolExecutor(4) as threads:
        found = [*threads.map(read, range(4))]
    assert len(built) == 1
    assert all(np.array_equal(pixels, toy.pixels) for pixels in found)
    assert len(list((tmp_path / "shared").iterdir())) == 1, "the lock file is gone"


def test_a_second_training_in_the_same_folder_is_refused(conversations_table, tmp_path: Path):
    table, work = conversations_table(), tmp_path / "work"
    loaded = settings.load("laptop")
    refuses("exists already", launch.train, "align", loaded, table, None, tmp_path, work, tmp_path / "cache")
    with locked(work / ".lock"):
        given, said = ("align", loaded, table, None, tmp_path / "out", work), "another training uses .*work; wait for"
        refuses(f"{said} it or give another --work", torchrun.train, *given)
        refuses(said, launch.train, *given, tmp_path / "cache")
        assert [file.name for file in work.iterdir()] == [".lock"]


def meet(rank: int, folder: Path, answers) -> None:
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    where = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2, timeout=timedelta(seconds=1))

    def refuse() -> StageRun:
        raise UserError("no such base")

    try:
        with patient_barrier(2) as wait:
            time.sleep(1.6 * rank)
            wait()
        torchrun.prepare_on_first(refuse, rank, 2)
    except BaseException as error:
        answers.put((rank, type(error).__name__, str(error)))


def test_ranks_wait_for_a_slow_one_and_are_told_why_the_first_refuses(tmp_path: Path):
    forks = multiprocessing.get_context("fork")
    answers = forks.SimpleQueue()
    both = [forks.Process(target=meet, args=(rank, tmp_path, answers)) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join(30)
        process.kill()
    assert sorted(answers.get() for _ in both) == [(rank, "UserError", "no such base") for rank in (0, 1)]


def test_how_workers_end_is_said_in_one_line():
    from ray.exceptions import ActorDiedError, OutOfMemoryError

    assert "memory was full; lower train.workers" in launch._in_words(OutOfMemoryError("Task was killed"))
    assert "more often than train.max_failures allows" in launch._in_words(ActorDiedError())
    assert launch._in_words(ValueError("first\nthe last line")) == "the last line"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("no training stage 'polish'"), "error: no training stage 'polish'"),
        (FloatingPointError("the loss is nan"), "error: the loss is nan"),
        (PermissionError(13, "Permission denied", "/kept"), "error: Permission denied /kept; check the place and your"),
        (KeyboardInterrupt(), "error: interrupted; run the same command again to go on"),
    ],
)
def test_training_without_ray_ends_with_one_line(error, said, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(torchrun, "train", fail)
    assert torchrun.main(["align", "table", "out"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(said)
    assert captured.err.count("\n") == 1
