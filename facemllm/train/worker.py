"""What one worker does of a stage, under any launcher: model, data, resume, loop, and on rank 0 model and result."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from facemllm.core import cost, progress
from facemllm.core.machine import cores
from facemllm.errors import UserError
from facemllm.model.face_mllm import FaceMllmForConditionalGeneration, Graph, asked, branches_of, extend
from facemllm.model.families import family_of
from facemllm.model.parts import load_base
from facemllm.model.pretrained import load_model, save_model
from facemllm.model.tiny import build_tiny
from facemllm.settings import Settings
from facemllm.tables import CONVERSATIONS, Table, open_table
from facemllm.tasks.characteristics import (
    UNKNOWN,
    Characteristics,
    characteristics,
    cooccurrence,
    correlation_matrix,
    relations_of,
)
from facemllm.tasks.held_out import withheld_of
from facemllm.train import monitor
from facemllm.train.checkpoint import differences
from facemllm.train.checkpoint_store import saving
from facemllm.train.corpus import FaceDataset
from facemllm.train.data import SPELLED, read_turns, tokenise, vocabulary_texts
from facemllm.train.distributed import broadcast, patient_barrier
from facemllm.train.loop import run_stage
from facemllm.train.penalties import audit, enforced
from facemllm.train.pixels import map_cache, pixel_cache
from facemllm.train.stage import Log, StageRun, TrainResult, check_batch


def train_worker(run: StageRun, on_log: Log | None = None) -> TrainResult | None:
    """Train one rank's part and write the model to `run.out`; rank 0's result, None on the others. With more than one
    rank, torch.distributed's group must stand. Raises UserError, and FloatingPointError when the loss is not finite."""
    settings, first = run.settings, run.rank == 0
    check_batch(run.name, run.stage, run.world_size)
    if settings.train.use_gpu and not torch.cuda.is_available():
        raise UserError("train.use_gpu is true, but PyTorch sees no GPU here; set it to false or mend the driver")
    torch.set_num_threads(settings.train.threads or max(1, cores() // run.local_world_size))
    table = open_table(run.conversations, CONVERSATIONS)
    with patient_barrier(run.world_size) as wait:
        model, processor, dataset = load(settings, table, run.base, run.cache or run.work, wait)
    lacks = monitor.shortfalls(run.name, run.stage, dataset)
    store = run.store()
    with progress.bar(run.name, run.stage.steps) as bar:

        def log(step: int, metrics: dict[str, float]) -> None:
            speed = f"{metrics['images_per_second']:.0f} images/s"
            bar.update(step, f"loss {metrics['loss']:.3f}, {speed}{monitor.in_words(lacks)}")
            if on_log is not None:
                on_log(step, metrics | lacks)

        with (
            store.newest(first, lambda value: broadcast(value, run.world_size)) as (resume, attempt),
            saving(store, attempt, prunes=first) as save,
        ):
            outcome = run_stage(run, model, processor, dataset, resume=resume, save=save, log=log)
    if not first:
        return None
    if flush := getattr(on_log, "flush", None):
        flush()  # this process ends soon, and curves are sent in the background
    # the run was prepared when `out` did not exist: what is there now, an attempt wrote that died on its way back
    shutil.rmtree(run.out, ignore_errors=True)
    save_model(outcome.model, processor, run.out, outcome.adapter)
    spent = {
        "device": f"{cost.device_name(run.device, run.world_size)}, {run.precision}",
        "samples": outcome.samples,
        "tokens": outcome.tokens,
        "flops": outcome.flops,
        "peak_memory_bytes": cost.peak_memory_bytes(run.device),
        **outcome.spent,
    }
    return TrainResult(outcome.steps, outcome.resumed_from, outcome.final_loss, cost.tidy(spent))


def load(
    settings: Settings, table: Table, base: Path | None, cache: Path, wait: Callable[[], None] = lambda: None
) -> tuple[Any, Any, FaceDataset]:
    """Load or build the model and its processor, and read the training split of a conversations table.

    `base` is the previous stage's model directory, None for the first stage: the preset or checkpoint of the settings.
    Decoded pictures are cached on disk by the rank that comes first, the others read them; `wait` is called when this
    rank has its caches. Raises UserError, also when a model that has branches, or comes of an earlier stage, has others
    than the settings ask for.
    """
    turns = read_turns(table, "train")
    knows = settings.model.knowledge
    known = characteristics(knows.tasks, turns) if knows.enabled else None
    withheld = withheld_of(settings)
    if base is not None:
        model, processor = load_model(base)
    elif settings.model.preset == "tiny":
        model, processor = build_tiny(settings.model, *vocabulary_texts(turns), settings.seed)
    else:
        model, processor = load_base(settings.model, settings.seed)
    if base is not None or isinstance(model, FaceMllmForConditionalGeneration):
        _check_branches(model, processor, settings, withheld, str(base or settings.model.base))
    else:
        graph = None
        if known is not None:
            matrix_AA = correlation_matrix(*cooccurrence(known.labels_RN), knows.tau, knows.omega)
            graph = Graph(known.names, tuple(node.words for node in known.nodes), matrix_AA)
        model, processor = extend(model, processor, settings.model, graph, withheld, settings.seed)
    family = family_of(model.config, processor)
    pixels, maps = pixel_cache(table, family, cache, settings.ingest.workers), None
    if getattr(model.config, "segmentation_config", None) is not None:
        maps = map_cache(table, processor, cache, settings.ingest.workers)
    wait()
    corpus = tokenise(turns, family.frame, spelled=SPELLED, seed=settings.seed)
    dataset = FaceDataset(corpus, pixels, maps)
    if known is not None and getattr(model.config, "knowledge_config", None) is not None:
        relations = tuple(enforced(audit(relations_of(knows.tasks, known.nodes), known), knows.audit))
        dataset = replace(dataset, labels=_in_order(known, model.model.knowledge.names), relations=relations)
    return model, processor, dataset


def _check_branches(model: Any, processor: Any, settings: Settings, withheld: Sequence[int], name: str) -> None:
    """Raise UserError unless a model has the branches that the settings ask for."""
    has, wanted = branches_of(model, processor), asked(settings.model, withheld)
    both = has.keys() & wanted.keys()  # what a branch is like is no difference where there is none
    if any(has[key] != wanted[key] for key in both):
        others = differences({key: has[key] for key in both}, {key: wanted[key] for key in both})
        raise UserError(
            f"the model {name} has other branches than the settings ask for ({others}); set them as the model has "
            "them, or train from the first stage with these (a checkpoint without branches gets them as model.base)"
        )


def _in_order(known: Characteristics, names: Sequence[str]) -> NDArray[np.int8]:
    """Labels in the order of the model's names; one that this table does not say is unknown."""
    labels_RA = np.full((len(known.labels_RN), len(names)), UNKNOWN, np.int8)
    for place, name in enumerate(names):
        if name in known.names:
            labels_RA[:, place] = known.labels_RN[:, known.names.index(name)]
    return labels_RA
