"""Training and measuring cells: the plain loop in this process, one thread, no Ray, no MLflow.

Cells that share stages train them once: the model is copied where they part. Nothing is kept of a cell but its figures.
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from facemllm import tasks
from facemllm.core import cost, digests
from facemllm.core.files import atomic_write
from facemllm.errors import UserError
from facemllm.evaluate.predict import question_texts
from facemllm.scoring import consistency, summary
from facemllm.scoring.calibration import CHARACTERISTICS, characteristics
from facemllm.scoring.metrics import BALANCED
from facemllm.scoring.sheet import Sheet, is_asked, read_sheet
from facemllm.settings import Settings
from facemllm.tables import CONVERSATIONS, Table, TableWriter, open_table, pairs
from facemllm.tasks.answers import answer
from facemllm.tasks.asking import NATIVE

WITH_MAP, WITHOUT_MAP = "with_map", "without_map"
_FACES = 64  # answered at a time

HOW = ("lora", "precision", "row_tokens", "micro_images", "recompute", "compile", "divergence")
"""Of settings.Train, besides the stages, what training a cell goes by; a cell has one worker and one thread."""


@dataclass(frozen=True)
class Cell:
    """One model to train and measure. `keys` name the model after each of `stages`, and so all that went into it."""

    variant: str
    settings: Settings
    stages: tuple[str, ...]
    keys: tuple[str, ...]

    @property
    def seed(self) -> int:
        """What the model starts from, and the order in which it sees the faces."""
        return self.settings.seed

    @property
    def digest(self) -> str:
        """Name of the cell's figures."""
        return digests.of_json({"model": self.keys[-1], "split": self.settings.evaluate.split})


@dataclass(frozen=True)
class Work:
    """Cells that share their first stage, and where everything lies; `home` holds the caches and `cells/`."""

    cells: Sequence[Cell]
    conversations: Path
    home: Path


def record_path(home: Path, cell: Cell) -> Path:
    """Where the figures of a finished cell stand."""
    return home / "cells" / f"{cell.digest}.json"


def run(work: Work) -> list[str]:
    """Train and measure the cells, write each one's figures when it is finished; returns their digests.

    A record holds `figures` by name of the map's presence (`with_map` only where the model takes one), `metrics`, and
    what training cost: wall and processor `seconds`, of every stage and in all, as if the cell had been trained alone.
    Raises UserError naming the cell whose training fails.
    """
    import torch

    from facemllm.train.worker import load

    torch.set_num_threads(1)
    table = open_table(work.conversations, CONVERSATIONS)
    model, processor, dataset = load(work.cells[0].settings, table, None, work.home / "cache")
    for cell, trained, stages in _grown(work, work.cells, 0, (processor, dataset), model, {}):
        record = {
            "variant": cell.variant,
            "seed": cell.seed,
            "stages": stages,
            "seconds": sum(stage["seconds"] for stage in stages.values()),
            "processor_seconds": sum(stage["processor_seconds"] for stage in stages.values()),
            **_measured(cell, table, work.home / "cache", trained, processor),
        }
        atomic_write(record_path(work.home, cell), (json.dumps(record, indent=2) + "\n").encode())
    return [cell.digest for cell in work.cells]


def _grown(
    work: Work, cells: Sequence[Cell], depth: int, data: tuple[Any, Any], model: Any, stages: dict[str, Any]
) -> Iterator[tuple[Cell, Any, dict[str, Any]]]:
    """Every cell with its trained model and what its stages cost; all of `cells` are alike up to stage `depth`."""
    branches: dict[str, list[Cell]] = {}
    for cell in cells:
        if len(cell.keys) == depth:
            yield cell, model, stages
        else:
            branches.setdefault(cell.keys[depth], []).append(cell)
    for number, branch in enumerate(branches.values()):
        own = model if number + 1 == len(branches) else copy.deepcopy(model)
        trained, spent = _trained(work, branch[0], depth, data, own)
        yield from _grown(work, branch, depth + 1, data, trained, stages | {branch[0].stages[depth]: spent})


def _trained(work: Work, cell: Cell, depth: int, data: tuple[Any, Any], model: Any) -> tuple[Any, dict[str, Any]]:
    """The model after a stage, and what that cost; `data` are the processor and the dataset."""
    from facemllm.train.loop import run_stage
    from facemllm.train.stage import StageRun

    settings, name = cell.settings, cell.stages[depth]
    run = StageRun(
        name,
        settings.stages()[name],
        settings,
        {"cell": cell.keys[depth]},
        conversations=work.conversations,
        out=work.home / "model",  # nothing is written
        work=work.home,
        device=cost.inference_device(settings),
    )
    last: dict[str, float] = {}
    began = time.perf_counter(), time.process_time()
    try:
        outcome = run_stage(run, model, *data, log=lambda _, metrics: last.update(metrics))
    except (UserError, FloatingPointError) as error:
        raise UserError(f"variant {cell.variant}, seed {cell.seed}: {error}") from error
    return outcome.model, {
        "steps": outcome.steps,
        "faces": outcome.samples,
        "seconds": round(time.perf_counter() - began[0], 3),
        "processor_seconds": round(time.process_time() - began[1], 3),
        "losses": {term: round(value, 6) for term, value in last.items() if term.startswith("loss")},
    }


def _measured(cell: Cell, table: Table, cache: Path, model: Any, processor: Any) -> dict[str, Any]:
    """Figures of the closed questions, asked in their own form, with maps where the model takes them, and without."""
    from facemllm.model.families import family_of
    from facemllm.model.inference import Predictor
    from facemllm.train.pixels import map_cache, pixel_cache

    split = cell.settings.evaluate.split
    sheet = read_sheet(table, split)
    predictor = Predictor(model, processor, device=cost.inference_device(cell.settings))
    pixels = pixel_cache(table, family_of(model.config, processor), cache)
    maps = map_cache(table, processor, cache) if predictor.takes_maps else None
    figures: dict[str, dict[str, float]] = {}
    metrics: dict[str, str] = {}
    for name, shown in ((WITH_MAP, maps), (WITHOUT_MAP, None)):
        if name == WITHOUT_MAP or shown is not None:
            parsed, asked, said = _answers(predictor, table, sheet, pixels, shown)
            figures[name], metrics = _figures(sheet, parsed, asked)
            if predictor.characteristic_names:
                added, their = _scores(cell.settings, sheet, said, parsed)
                figures[name] |= added
                metrics |= their
    return {"images": len(sheet.images), "people": sheet.people_count, "figures": figures, "metrics": metrics}


def _answers(predictor: Any, table: Table, sheet: Sheet, pixels: Any, maps: Any) -> tuple[Any, Any, Any]:
    """Answers by likelihood in the order of the sheet, which of its questions were put, and each face's scores of the
    knowledge branch."""
    from facemllm.model.inference import Query

    parsed: list[str | None] = [None] * len(sheet.answers)
    asked = np.zeros(len(parsed), dtype=bool)
    splits = [batch.column(0).to_numpy(zero_copy_only=False) for batch in table.batches(["split"])]
    of_split = np.flatnonzero(np.concatenate(splits) == sheet.split)
    scores: list[dict[str, float]] = []
    place = 0
    for batch in table.batches(["messages", "turns"], sheet.split, _FACES):
        put = []
        for face in batch.to_pylist():
            questions = []
            for turn, text in zip(face["turns"], question_texts(face), strict=True):
                if is_asked(turn):
                    question = tasks.question_of(turn)
                    if question.options and question.variant == NATIVE:
                        questions.append((place, question, text))
                    place += 1
            put.append(questions)
        rows = of_split[len(scores) : len(scores) + len(put)]
        queries = [[Query(text, tuple(o.text for o in question.options)) for _, question, text in own] for own in put]
        found = predictor.score_faces(list(pixels[rows]), queries, None if maps is None else list(maps[rows]))
        for own, said in zip(put, found, strict=True):
            scores.append(said.characteristics)
            for (at, question, _), one in zip(own, said.answers, strict=True):
                asked[at] = True
                parsed[at] = answer(question, one.probabilities, one.greedy).value
    return parsed, asked, scores


def _figures(sheet: Sheet, parsed: Sequence[str | None], asked: Any) -> tuple[dict[str, float], dict[str, str]]:
    """Every figure by name, and its metric; `relations` is the share of relations, of those that the answers about a
    face can tell, that they break."""
    found = summary.replicate(sheet, parsed, 0, 0, asked)
    heads = {name: next(iter(by_metric.items())) for name, by_metric in found.items()}
    figures = {name: float(values[0]) for name, (_, values) in heads.items()}
    metrics = {name: metric for name, (metric, _) in heads.items()}
    checked = consistency.check(sheet, parsed).values()
    checked_relations = sum(int(known.sum()) for known, _ in checked)
    if checked_relations:
        figures["relations"] = sum(int(broken.sum()) for _, broken in checked) / checked_relations
        metrics["relations"] = "broken"
    return figures, metrics


def _scores(
    settings: Settings, sheet: Sheet, said: Sequence[dict[str, float]], parsed: Sequence[str | None]
) -> tuple[dict[str, float], dict[str, str]]:
    """What the knowledge branch says beside the text: `scores`, right with a threshold of a half, yes and no alike, and
    `scores_relations`, the share of relations that these break."""
    with tempfile.TemporaryDirectory() as folder:
        with TableWriter(Path(folder) / "scores", CHARACTERISTICS) as writer:
            writer.write({"image_id": i, "scores": pairs(one)} for i, one in zip(sheet.images, said, strict=True))
        found = characteristics(settings, sheet, parsed, Path(folder) / "scores") or {}
    values = {"scores": found["balanced"]["scores"], "scores_relations": found["relations"]["scores"]["value"]}
    known = {name: value for name, value in values.items() if value is not None}
    return known, {name: BALANCED if name == "scores" else "broken" for name in known}
