"""One run of a training stage: its facts from launch to loop, what is checked before it starts, and its lineage."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from facemllm.core import digests
from facemllm.core.files import atomic_write, content_of, placed
from facemllm.errors import UserError
from facemllm.settings import Model, Settings, Stage
from facemllm.tables import CONVERSATIONS, open_table
from facemllm.tasks.held_out import withheld_of
from facemllm.train.checkpoint import differences
from facemllm.train.checkpoint_store import CheckpointStore, location
from facemllm.version import ledger

LINEAGE = "lineage.json"
_CHECKPOINTS = ("base", "tower", "language")  # settings of `model` that name one

Log = Callable[[int, dict[str, float]], None]
"""Takes the metrics of a step."""


@dataclass(frozen=True)
class TrainResult:
    """What a stage did. `cost`: device, seconds, samples, tokens, operations, memory, energy (`facemllm.core.cost`)."""

    steps: int
    resumed_from: int
    final_loss: float
    cost: dict[str, Any]


@dataclass(frozen=True)
class StageRun:
    """One run of a stage, the same on every worker but for its ranks. `made_from` is all that the result depends on;
    the number of workers is no part of it. `base` is None where the stage starts from the preset or checkpoint of the
    settings. A run without a `cache` keeps no tower features."""

    name: str
    stage: Stage
    settings: Settings
    made_from: Mapping[str, Any]
    conversations: Path
    out: Path
    work: Path
    base: Path | None = None
    cache: Path | None = None
    device: str = "cpu"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    log_every: int = 20

    @property
    def key(self) -> str:
        """Digest of `made_from`: a checkpoint of another key is refused."""
        return digests.of_json(dict(self.made_from))

    @property
    def run_name(self) -> str:
        """Name of the run, of its checkpoints, and of what Ray keeps of it."""
        return f"{self.name}-{self.key[:16]}"

    @property
    def record(self) -> Path:
        """The file in which `work` says what its checkpoints are made from."""
        return self.work / f"{self.name}.json"

    @property
    def precision(self) -> str:
        """`bf16` or `fp32`, as this machine decides it."""
        return decide_precision(self.settings.train.precision, self.device)

    @property
    def sharded(self) -> bool:
        """Whether every worker holds a shard of the model."""
        return self.settings.train.sharding == "full" and self.world_size > 1

    @property
    def rank_slice(self) -> slice:
        """This rank's faces of the global batch: the slices of all ranks are disjoint and cover it."""
        count = self.stage.batch_images
        return slice(self.rank * count // self.world_size, (self.rank + 1) * count // self.world_size)

    def store(self) -> CheckpointStore:
        """Where its checkpoints are."""
        return CheckpointStore(location(self.settings.train.storage, self.work, self.run_name), self.work)


def decide_precision(wanted: str, device: str) -> str:
    """`auto` becomes bf16 where the processor multiplies it natively, else fp32."""
    if wanted != "auto":
        return wanted
    if device.startswith("cuda"):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


def prepare_run(
    name: str,
    settings: Settings,
    conversations: Path,
    base: Path | None,
    out: Path,
    work: Path,
    cache: Path,
    base_digest: str | None = None,
) -> StageRun:
    """Check what is asked for and note it in `work`, which is made. See `launch.train` for the arguments. A base of
    many gigabytes is read to its end for its digest, unless `base_digest` says it. Raises UserError for what cannot be
    trained, and for a `work` folder with checkpoints of other settings."""
    if name not in settings.stages():
        raise UserError(f"no training stage '{name}'; choose one of {', '.join(settings.stages())}")
    if out.exists():
        raise UserError(f"{out} exists already; choose another output folder or remove it")
    stage = settings.stages()[name]
    check_batch(name, stage, settings.train.workers)
    check_order(name, settings, base)
    withheld_of(settings)
    made_from = {
        "stage": name,
        "plan": stage.model_dump(),
        "model": settings.model.model_dump(),
        "held_out": settings.reformat.held_out,
        "forms": settings.reformat.forms.model_dump(),
        "lora": settings.train.lora.model_dump(),
        "precision": settings.train.precision,
        "seed": settings.seed,
        "conversations": open_table(conversations, CONVERSATIONS).digest,
        "base": _start(settings.model) if base is None else base_digest or digests.of_tree(base),
    }
    checkpoints = {part: placed(one) for part in _CHECKPOINTS if (one := getattr(settings.model, part)) is not None}
    run = StageRun(
        name,
        stage,
        settings.model_copy(update={"model": settings.model.model_copy(update=checkpoints)}),
        made_from,
        conversations=conversations.resolve(),
        out=out.resolve(),
        work=work.resolve(),
        base=base.resolve() if base is not None else None,
        cache=cache.resolve(),
        device="cuda" if settings.train.use_gpu else "cpu",
    )
    _write_record(run)
    return run


def _start(model: Model) -> str | dict[str, str] | None:
    """What the preset starts from, by content; None for `tiny`, which comes of the seed and the data alone."""
    if model.preset == "parts":
        return {name: content_of(str(getattr(model, name)), f"model.{name}") for name in ("tower", "language")}
    return content_of(str(model.base), "model.base") if model.preset == "hub" else None


def check_batch(name: str, stage: Stage, workers: int) -> None:
    """Raise UserError when a worker would have no face of the global batch to train on."""
    if workers > stage.batch_images:
        raise UserError(
            f"{workers} workers share a batch of {stage.batch_images} faces: some would train on nothing; "
            f"lower train.workers or raise train.stages.{name}.batch_images"
        )


def check_order(name: str, settings: Settings, base: Path | None) -> None:
    """Raise UserError when a stage does not start from the one before it. A published checkpoint (preset `hub`) has
    seen pictures already, so any stage may start from it."""
    before = settings.train.before(name)
    if base is None:
        if before is not None and settings.model.preset != "hub":
            raise UserError(f"stage {name} goes on from the model of stage {before}; train that first and give it")
        return
    if not base.is_dir():
        raise UserError(f"cannot load the model {base}: there is no such folder")
    made_by = stage_of(base)
    if made_by is not None and made_by != before:
        wanted = f"goes on from the model of stage {before}" if before else "comes first"
        raise UserError(f"stage {name} {wanted}, but {base} is the model of stage {made_by}")


def stage_of(model: Path) -> str | None:
    """The stage that made a model directory, by its lineage; None for a model from elsewhere."""
    try:
        return str(json.loads((model / LINEAGE).read_text("utf-8"))["stage"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_lineage(
    out: Path, name: str, settings: Settings, inputs: Mapping[str, str], sources: Iterable[str], base: Path | None
) -> None:
    """Say in a model directory what made it: stage, digests of its inputs, the stage's settings, and all sources."""
    lineage = {
        "stage": name,
        "inputs": dict(inputs),
        "settings": settings.stages()[name].model_dump(),
        "sources": sorted({*sources, *(ledger.sources_of_model(base) if base else ())}),
    }
    atomic_write(out / LINEAGE, (json.dumps(lineage, indent=2, sort_keys=True) + "\n").encode())


def clean_up(run: StageRun) -> None:
    """Drop what an unfinished run is continued from: the model is written."""
    run.store().clear()
    run.record.unlink(missing_ok=True)


def _write_record(run: StageRun) -> None:
    """Keep what the run is made from beside its checkpoints, so that a changed one does not start over unasked."""
    try:
        before = json.loads(run.record.read_text("utf-8"))
    except (OSError, ValueError):
        before = None
    place = run.store().place
    if before is not None and (before["made_from"] != run.made_from or before["place"] != place):
        _check_left_behind(run, before)
    kept = {"made_from": run.made_from, "place": place}
    atomic_write(run.record, (json.dumps(kept, sort_keys=True, indent=2) + "\n").encode())


def _check_left_behind(run: StageRun, before: Mapping[str, Any]) -> None:
    """Raise UserError when the place that a run is noted at has checkpoints that this one would leave behind."""
    try:
        if not CheckpointStore(before["place"], run.work).names():
            return
    except UserError as error:
        raise UserError(f"{error} (an earlier run kept them there; remove {run.record} to forget it)") from error
    if before["made_from"] != run.made_from:
        raise UserError(
            f"{run.work} holds checkpoints of stage {run.name} with other settings or data "
            f"({differences(before['made_from'], run.made_from)}); take those again to go on, "
            f"or remove {run.record} to train from the start"
        )
    if not run.store().names():
        raise UserError(
            f"the checkpoints of this run are at {before['place']}, but by train.storage they belong at "
            f"{run.store().place}, where there are none; set it back or copy them to go on, "
            f"or remove {run.record} to train from the start"
        )
