"""What one rank does of a stage, under any launcher: material, resume, loop, and on rank 0 the model and the result."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from facemllm.core import cost, progress
from facemllm.core.machine import cores
from facemllm.errors import UserError
from facemllm.model.saving import save_model
from facemllm.tables import CONVERSATIONS, open_table
from facemllm.train import coverage, material
from facemllm.train.job import Job
from facemllm.train.keeping import Keeper
from facemllm.train.loop import run_stage
from facemllm.train.order import Order, TrainResult, check_shares

OnLog = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class Place:
    """Where a rank stands among all, and among those of its machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1


def train_rank(order: Order, place: Place, on_log: OnLog | None = None) -> TrainResult | None:
    """Train one rank's part and write the model to `order.out`; rank 0's result, None on the others.

    With more than one rank, torch.distributed's group must stand. Raises UserError, and FloatingPointError when the
    loss is not finite.
    """
    settings, training = order.settings, order.settings.train
    check_shares(order.stage, settings, place.world)
    if training.use_gpu and not torch.cuda.is_available():
        raise UserError("train.use_gpu is true, but PyTorch sees no GPU here; set it to false or mend the driver")
    device = "cuda" if training.use_gpu else "cpu"
    torch.set_num_threads(training.threads or max(1, cores() // place.local_world))
    first = place.rank == 0
    with _meeting(place.world) as wait:
        ready = material.prepare(
            settings, open_table(order.conversations, CONVERSATIONS), order.base, order.cache, wait
        )
    lacks = coverage.shortfalls(order.stage, settings.stages()[order.stage], ready.faces, ready.corpus.pixel_row)
    job = Job.of(
        settings,
        order.stage,
        order.key,
        device,
        rank=place.rank,
        world=place.world,
        local_rank=place.local_rank,
        made_from=order.made_from,
        sharded=training.sharding == "full" and place.world > 1,
        table=order.made_from["conversations"],
        cache=order.cache,
    )
    shelf = order.shelf()
    with progress.bar(order.stage, job.stage.steps) as bar:

        def log(step: int, metrics: dict[str, float]) -> None:
            speed = f"{metrics['images_per_second']:.0f} images/s"
            bar.update(step, f"loss {metrics['loss']:.3f}, {speed}{coverage.in_words(lacks)}")
            if on_log is not None:
                on_log(step, metrics | lacks)

        with (
            shelf.newest(first, _agree if place.world > 1 else lambda value: value) as (resume, attempt),
            Keeper(shelf, attempt, prunes=first) as keep,
        ):
            outcome = run_stage(
                job, ready.model, ready.processor, ready.corpus, ready.faces, resume=resume, keep=keep, log=log
            )
    if not first:
        return None
    if flush := getattr(on_log, "flush", None):
        flush()  # this process ends soon, and curves are sent in the background
    # the order was given when `out` did not exist: what is there now, an attempt wrote that died on its way back
    shutil.rmtree(order.out, ignore_errors=True)
    save_model(outcome.model, ready.processor, order.out, outcome.adapter)
    spent = {
        "device": f"{cost.device_name(device, place.world)}, {job.precision}",
        "samples": outcome.samples,
        "tokens": outcome.tokens,
        "flops": outcome.flops,
        "peak_memory_bytes": cost.peak_memory_bytes(device),
        **outcome.spent,
    }
    return TrainResult(outcome.steps, outcome.resumed_from, outcome.final_loss, cost.tidy(spent))


@contextmanager
def _meeting(world: int) -> Iterator[Callable[[], None]]:
    """A way to wait for all ranks, for days if it must be: decoding takes one machine longer than another, and a
    collective of training gives up after minutes. A rank that dies ends the wait."""
    if world == 1:
        yield lambda: None
        return
    group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    yield lambda: dist.barrier(group)
    dist.destroy_process_group(group)


def _agree(value: Any) -> Any:
    """What rank 0 has, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
