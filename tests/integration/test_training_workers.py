"""Two workers learn what one does, with both branches, packed rows and micro-batches."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.training_example import BRANCHES, Toy, stage, trains

pytestmark = pytest.mark.integration

PLAN = stage(
    trains=trains(projector="full", segmentation="full", knowledge="full", embeddings="full", language="full"), steps=4
)
OPTIONS: dict[str, Any] = {"row_tokens": 200, "micro_images": 2}


def worker(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    toy = Toy(folder / f"rank{rank}", *BRANCHES)
    logs: list[dict[str, float]] = []
    outcome = toy.run(PLAN, rank=rank, world_size=2, log=lambda _, metrics: logs.append(metrics), **OPTIONS)
    torch.save((outcome.model.state_dict(), outcome.tokens, logs), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_learn_what_one_does(tmp_path: Path) -> None:
    forks = multiprocessing.get_context("forkserver")
    ranks = [forks.Process(target=worker, args=(rank, tmp_path)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    toy = Toy(tmp_path / "one", *BRANCHES)
    logs: list[dict[str, float]] = []
    alone = toy.run(PLAN, log=lambda _, metrics: logs.append(metrics))
    for process in ranks:
        process.join(timeout=120)
    assert [process.exitcode for process in ranks] == [0, 0]
    (first, tokens, told), (second, again, silent) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    assert tokens == again == alone.tokens
    assert silent == []
    for one, two in zip(logs, told, strict=True):
        for term in ("loss", "loss/answers", "loss/characteristics", "loss/logic"):
            assert two[term] == pytest.approx(one[term], rel=2e-4, abs=1e-6), term
    start = toy.fresh()[0].state_dict()
    moved = 0.0
    for name, tensor in alone.model.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        if tensor.is_floating_point():
            torch.testing.assert_close(first[name], tensor, atol=4e-4, rtol=1e-3, msg=name)
            moved = max(moved, float((tensor - start[name]).abs().max()))
    assert moved > 1e-3  # the tolerance is far below what was learnt
