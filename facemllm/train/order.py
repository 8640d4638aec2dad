"""What is to be trained, from what, and where it goes: checked before anything starts, the same for every launcher."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from facemllm.core import digests, hub
from facemllm.core.files import atomic_write
from facemllm.errors import UserError
from facemllm.settings import Model, Settings
from facemllm.tables import CONVERSATIONS, open_table
from facemllm.tasks.held_out import withheld_of
from facemllm.train.differences import differences
from facemllm.train.keeping import Shelf, place_of
from facemllm.version import ledger

LINEAGE = "lineage.json"


@dataclass(frozen=True)
class TrainResult:
    """What a stage did. `cost`: device, seconds, samples, tokens, operations, memory, energy (`facemllm.core.cost`)."""

    steps: int
    resumed_from: int
    final_loss: float
    cost: dict[str, Any]


@dataclass(frozen=True)
class Order:
    """One stage to train. `made_from` is all that its result depends on; the number of workers is no part of it."""

    stage: str
    settings: Settings
    conversations: Path
    base: Path | None
    out: Path
    work: Path
    cache: Path
    made_from: dict[str, Any]

    @property
    def key(self) -> str:
        """Digest of `made_from`: a checkpoint of another key is refused."""
        return digests.of_json(self.made_from)

    @property
    def run(self) -> str:
        """Name of the run, of its checkpoints, and of what Ray keeps of it."""
        return f"{self.stage}-{self.key[:16]}"

    @property
    def note(self) -> Path:
        """Where `work` says what its checkpoints are made from."""
        return self.work / f"{self.stage}.json"

    def shelf(self) -> Shelf:
        """Where its checkpoints are."""
        return Shelf(place_of(self.settings.train.storage, self.work, self.run), self.work)


def place_order(
    stage: str, settings: Settings, conversations: Path, base: Path | None, out: Path, work: Path, cache: Path
) -> Order:
    """Check what is asked for and note it in `work`, which is made. See `launch.train` for the arguments.

    A base of many gigabytes is read to its end for its digest. Raises UserError: unknown stage, an output that exists,
    stages out of order, more workers than faces in a batch, held-out attributes that maps cannot keep to themselves, no
    such base, or a `work` folder with checkpoints of other settings.
    """
    if stage not in settings.stages():
        raise UserError(f"no training stage '{stage}'; choose one of {', '.join(settings.stages())}")
    if out.exists():
        raise UserError(f"{out} exists already; choose another output folder or remove it")
    check_shares(stage, settings, settings.train.workers)
    check_order(stage, settings, base)
    withheld_of(settings)
    made_from = {
        "stage": stage,
        "plan": settings.stages()[stage].model_dump(),
        "model": settings.model.model_dump(),
        "held_out": settings.reformat.held_out,
        "lora": settings.train.lora.model_dump(),
        "precision": settings.train.precision,
        "seed": settings.seed,
        "conversations": open_table(conversations, CONVERSATIONS).digest,
        "base": digests.of_tree(base) if base is not None else _start(settings.model),
    }
    order = Order(
        stage,
        settings,
        conversations.resolve(),
        base.resolve() if base is not None else None,
        out.resolve(),
        work.resolve(),
        cache.resolve(),
        made_from,
    )
    _note(order)
    return order


def _start(model: Model) -> str | dict[str, str] | None:
    """What the preset starts from, by content; None for `tiny`, which comes of the seed and the data alone."""
    if model.preset == "parts":
        return {name: hub.content_of(str(getattr(model, name)), f"model.{name}") for name in ("tower", "language")}
    return hub.content_of(str(model.base), "model.base") if model.preset == "hub" else None


def check_shares(stage: str, settings: Settings, workers: int) -> None:
    """Raise UserError when a worker would have no face of the global batch to train on."""
    batch = settings.stages()[stage].batch_images
    if workers > batch:
        raise UserError(
            f"{workers} workers share a batch of {batch} faces: some would train on nothing; "
            f"lower train.workers or raise train.stages.{stage}.batch_images"
        )


def check_order(stage: str, settings: Settings, base: Path | None) -> None:
    """Raise UserError when a stage does not start from the one before it.

    A published checkpoint (preset `hub`) has seen pictures already, so any stage may start from it.
    """
    names = list(settings.stages())
    place = names.index(stage)
    before = names[place - 1] if place else None
    if base is None:
        if before is not None and settings.model.preset != "hub":
            raise UserError(f"stage {stage} goes on from the model of stage {before}; train that first and give it")
        return
    if not base.is_dir():
        raise UserError(f"cannot load the model {base}: there is no such folder")
    made_by = stage_of(base)
    if made_by is not None and made_by != before:
        wanted = f"goes on from the model of stage {before}" if before else "comes first"
        raise UserError(f"stage {stage} {wanted}, but {base} is the model of stage {made_by}")


def stage_of(model: Path) -> str | None:
    """The stage that made a model directory, by its lineage; None for a model from elsewhere."""
    try:
        return str(json.loads((model / LINEAGE).read_text("utf-8"))["stage"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def finish(order: Order) -> None:
    """Drop what an unfinished run is continued from: the model is written."""
    order.shelf().clear()
    order.note.unlink(missing_ok=True)


def write_lineage(
    out: Path, stage: str, settings: Settings, inputs: Mapping[str, str], sources: Iterable[str], base: Path | None
) -> None:
    """Say in a model directory what made it: stage, digests of its inputs, the stage's settings, and all sources."""
    lineage = {
        "stage": stage,
        "inputs": dict(inputs),
        "settings": settings.stages()[stage].model_dump(),
        "sources": sorted({*sources, *(ledger.sources_of_model(base) if base else ())}),
    }
    atomic_write(out / LINEAGE, (json.dumps(lineage, indent=2, sort_keys=True) + "\n").encode())


def _note(order: Order) -> None:
    """Keep what the run is made from beside its checkpoints, so that a changed one does not start over unasked."""
    try:
        before = json.loads(order.note.read_text("utf-8"))
    except (OSError, ValueError):
        before = None
    place = order.shelf().place
    if before is not None and (before["made_from"] != order.made_from or before["place"] != place):
        _check_left_behind(order, before)
    kept = {"made_from": order.made_from, "place": place}
    atomic_write(order.note, (json.dumps(kept, sort_keys=True, indent=2) + "\n").encode())


def _check_left_behind(order: Order, before: Mapping[str, Any]) -> None:
    """Raise UserError when the place that a run is noted at has checkpoints that this one would leave behind."""
    try:
        if not Shelf(before["place"], order.work).names():
            return
    except UserError as error:
        raise UserError(f"{error} (an earlier run kept them there; remove {order.note} to forget it)") from error
    if before["made_from"] != order.made_from:
        raise UserError(
            f"{order.work} holds checkpoints of stage {order.stage} with other settings or data "
            f"({differences(before['made_from'], order.made_from)}); take those again to go on, "
            f"or remove {order.note} to train from the start"
        )
    if not order.shelf().names():
        raise UserError(
            f"the checkpoints of this run are at {before['place']}, but by train.storage they belong at "
            f"{order.shelf().place}, where there are none; set it back or copy them to go on, "
            f"or remove {order.note} to train from the start"
        )
