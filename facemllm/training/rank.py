"""What one rank does of a stage, under any launcher: material, resume, loop, and on rank 0 the model and the result."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from facemllm import cost, progress
from facemllm.errors import UserError
from facemllm.machine import cores
from facemllm.model.saving import save_model
from facemllm.records import CONVERSATIONS, open_table
from facemllm.training import material
from facemllm.training.job import Job, passed
from facemllm.training.keeping import Keeper
from facemllm.training.loop import decide_precision, run_stage
from facemllm.training.order import Order, TrainResult, check_shares

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
    settings, training = order.settings, order.settings.training
    check_shares(order.stage, settings, place.world)
    if training.use_gpu and not torch.cuda.is_available():
        raise UserError("training.use_gpu is true, but PyTorch sees no GPU here; set it to false or mend the driver")
    device = "cuda" if training.use_gpu else "cpu"
    torch.set_num_threads(training.threads or max(1, cores() // place.local_world))
    first = place.rank == 0
    ready = material.prepare(
        settings,
        open_table(order.conversations, CONVERSATIONS),
        order.base,
        order.cache,
        first=first,
        wait=dist.barrier if place.world > 1 else lambda: None,
    )
    job = Job(
        name=order.stage,
        stage=settings.stages()[order.stage],
        lora=training.lora,
        seed=settings.seed,
        key=order.key,
        model=settings.model,
        precision=decide_precision(training.precision, device),
        device=device,
        rank=place.rank,
        world=place.world,
        local_rank=place.local_rank,
        checkpoint_every=training.checkpoint_every,
        made_from=order.made_from,
        sharded=training.sharding == "full" and place.world > 1,
        table=order.made_from["conversations"],
        cache=order.cache,
        **passed(training),
    )
    shelf = order.shelf()
    with progress.bar(order.stage, job.stage.steps) as bar:

        def log(step: int, metrics: dict[str, float]) -> None:
            bar.update(step, f"loss {metrics['loss']:.3f}, {metrics['images_per_second']:.0f} images/s")
            if on_log is not None:
                on_log(step, metrics)

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


def _agree(value: Any) -> Any:
    """What rank 0 has, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
