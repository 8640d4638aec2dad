"""Training of one stage without Ray: in this process, or by torchrun in several.

    python -m facemllm.train.torchrun align TABLE OUT
    torchrun --nproc-per-node 2 -m facemllm.train.torchrun instruct TABLE OUT --base ALIGNED --profile paper-7b

Killed at any moment, the same command goes on from the last checkpoint in --work. The model is that of Ray with as many
workers, byte for byte on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from facemllm.core.files import locked, publish, remove_unfinished
from facemllm.core.processes import die_with_parent
from facemllm.errors import EXPECTED, UserError, message_of
from facemllm.settings import Settings, load
from facemllm.tables import open_table
from facemllm.train.stage import StageRun, TrainResult, clean_up, prepare_run, write_lineage
from facemllm.version import ledger


def train(
    stage: str, settings: Settings, conversations: Path, base: Path | None, out: Path, work: Path
) -> TrainResult | None:
    """Train this process's part of a stage, as torchrun's environment names it; rank 0's result, None on the others.
    `work` keeps checkpoints and decoded pictures, of one training at a time. Raises UserError, and FloatingPointError
    when the loss is not finite."""
    import torch
    import torch.distributed as dist

    from facemllm.train.worker import train_worker

    rank, world_size, local_rank, local_world_size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    if out.exists():
        raise UserError(f"{out} exists already; choose another output folder or remove it")
    sources = open_table(conversations).sources
    ledger.require(settings, sources, "train")
    if settings.train.use_gpu and torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    with ExitStack() as stack:
        if rank == 0:
            stack.enter_context(
                locked(work / ".lock", f"another training uses {work}; wait for it or give another --work")
            )
        if world_size > 1:
            dist.init_process_group("nccl" if settings.train.use_gpu else "gloo")
            stack.callback(_leave)
        made = work / "model"  # it appears as `out` with its lineage in it

        def prepare() -> StageRun:
            shutil.rmtree(made, ignore_errors=True)
            remove_unfinished(made)
            return prepare_run(stage, settings, conversations, base, made, work, work / "cache")

        run = replace(
            prepare_on_first(prepare, rank, world_size),
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            local_world_size=local_world_size,
        )
        result = train_worker(run)
        if result is not None:
            inputs = {"conversations": run.made_from["conversations"]}
            inputs |= {"model": run.made_from["base"]} if base is not None else {}
            write_lineage(made, stage, settings, inputs, sources, base)
            publish(made, out)
            clean_up(run)
        return result


def prepare_on_first(prepare: Callable[[], StageRun], rank: int, world_size: int) -> StageRun:
    """The run as rank 0 prepares it, on every rank: a base of many gigabytes is read once. Raises what `prepare` does,
    on every rank."""
    from facemllm.train.distributed import broadcast

    found: Any = None
    if rank == 0:
        try:
            found = prepare()
        except UserError as error:
            found = error
    found = broadcast(found, world_size)
    if not isinstance(found, StageRun):
        raise found
    return found


def _leave() -> None:
    import torch.distributed as dist

    with suppress(Exception):  # ranks that wait for one that failed are ended by torchrun
        dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python -m facemllm.train.torchrun`; the result as JSON on standard output."""
    parser = argparse.ArgumentParser(prog="facemllm.train.torchrun", description="Train one stage without Ray.")
    parser.add_argument("stage", help="name of a stage of train.stages, such as align")
    parser.add_argument("conversations", type=Path, help="folder of a conversations table")
    parser.add_argument("out", type=Path, help="folder of the model, which must not exist")
    parser.add_argument("--base", type=Path, help="folder of the model of the stage before")
    parser.add_argument("--profile", default="laptop")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--work", type=Path, help="folder for checkpoints and decoded pictures; default: OUT.work")
    given = parser.parse_args(arguments)
    work = given.work or given.out.with_name(f"{given.out.name}.work")
    if "LOCAL_WORLD_SIZE" in os.environ:
        die_with_parent()
    try:
        settings = load(given.profile, given.overrides)
        result = train(given.stage, settings, given.conversations, given.base, given.out, work)
    except (*EXPECTED, FloatingPointError) as error:
        print(f"error: {message_of(error)}", file=sys.stderr)
        return 1
    if result is not None:
        print(json.dumps(asdict(result)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
