"""What ours and its peers train on, laid out in a folder: one table, one set of weights, one order of questions.

The folder holds `model/` (weights and processor), `images/` (a JPEG a face, as the peers read them), `rows.json` (what
the stage's sampler draws, step by step, in words) and `material.json`. Each contender is a process of its own that
reads the folder; only ours opens the table. The stage has no augmentation, so that all see the same pictures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

STAGES = {"frozen tower": "instruct", "everything": "specialize"}
"""What trains, and the laptop profile's stage that it is like in all but its tower."""


@dataclass(frozen=True)
class Material:
    """A prepared folder. `stage` is a stage's settings; `shape` is empty where the weights lie in `model/`."""

    folder: Path
    table: Path
    stage: Mapping[str, Any]
    seed: int
    shape: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Material:
        """Read `material.json`."""
        found = json.loads((folder / "material.json").read_text("utf-8"))
        return cls(folder, Path(found["table"]), found["stage"], found["seed"], found["shape"])

    def rows(self) -> list[dict[str, Any]]:
        """Conversations in the sampler's order: `step`, `image` (a path) and `turns` (question, answer)."""
        found: list[dict[str, Any]] = json.loads((self.folder / "rows.json").read_text("utf-8"))
        return found

    def model(self) -> tuple[Any, Any]:
        """Fresh weights, float32, and the processor."""
        from facemllm.model.pretrained import load_model

        if not self.shape:
            return load_model(self.folder / "model")
        from training_shapes import build, read_processor

        processor = read_processor(self.folder / "model")
        return build(self.shape, processor, self.seed), processor


def stage_of(what: str, steps: int, **changes: Any) -> dict[str, Any]:
    """All questions of the laptop profile by the objective `answers`, at one rate and as plain cross-entropy, which is
    what the peers have; `what` is a key of `STAGES`."""
    from facemllm.settings import load

    settings = load("laptop")
    stage = settings.stages()[STAGES[what]].model_dump()
    stage["trains"]["tower"] = "frozen" if what == "frozen tower" else "full"
    every = {name: 1.0 if name != "caption" else 0.15 for name in settings.reformat.tasks}
    common = {"tasks": every, "objective": "answers", "augment": False, "warmup": 0.0, "decay": 0.0, "steps": steps}
    common |= {"optimizer": "adamw", "number_smoothing": 0.0, "class_weights": 0.0, "caption_words": 0.0}
    return stage | common | changes


def stage_run(stage: Any, settings: Any, folder: Path, table: Path, **facts: Any) -> Any:
    """A run of a stage that no settings name, which writes nothing."""
    from facemllm.train.stage import StageRun

    return StageRun(
        "benchmark",
        stage,
        settings,
        facts.pop("made_from", {}),
        conversations=table,
        out=folder / "out",
        work=folder,
        **facts,
    )


def prepare(
    folder: Path, table: Path, stage: Mapping[str, Any], steps: int, shape: Mapping[str, Any] | None = None
) -> Material:
    """Lay out a folder for a stage, of which the peers do so many steps. `shape`: see `training_shapes`; None: tiny."""
    from facemllm.model.families import family_of
    from facemllm.model.pretrained import save_model
    from facemllm.model.tiny import build_tiny
    from facemllm.settings import Stage, load
    from facemllm.tables import CONVERSATIONS, open_table
    from facemllm.train.data import read_turns, tokenise, vocabulary_texts
    from facemllm.train.dataloader import BatchSampler

    settings = load("laptop")
    opened = open_table(table, CONVERSATIONS)
    turns = read_turns(opened, "train")
    words = vocabulary_texts(turns)
    folder.mkdir(parents=True)
    if shape:
        from training_shapes import write_processor

        write_processor(shape, words, folder / "model")
        model, processor = build_tiny(settings.model, *words, settings.seed)
    else:
        model, processor = build_tiny(settings.model, *words, settings.seed)
        save_model(model, processor, folder / "model")
    corpus = tokenise(turns, family_of(model.config, processor).frame)
    run = stage_run(Stage.model_validate(stage), settings, folder, table)
    sampler = BatchSampler(run, corpus, settings.model.image_size)
    said = list(zip(turns.question.to_pylist(), turns.answer.to_pylist(), strict=True))
    rows = []
    for step in range(steps):
        plan = sampler.plan(step)
        for row, drawn in zip(plan.rows, plan.turns, strict=True):
            image = str(folder / "images" / f"{corpus.pixel_row[row]}.jpg")
            rows.append({"step": step, "image": image, "turns": [said[turn] for turn in drawn]})
    (folder / "rows.json").write_text(json.dumps(rows), "utf-8")
    (folder / "images").mkdir()
    wanted = {Path(row["image"]).stem for row in rows}
    first = 0
    for batch in opened.batches(columns=["images"]):
        for number, images in enumerate(batch.column(0).to_pylist(), start=first):
            if str(number) in wanted:
                (folder / "images" / f"{number}.jpg").write_bytes(images[0]["bytes"])
        first += batch.num_rows
    facts = {"table": str(table.resolve()), "stage": dict(stage), "seed": settings.seed, "shape": dict(shape or {})}
    (folder / "material.json").write_text(json.dumps(facts), "utf-8")
    return Material.open(folder)


def render_table(folder: Path, identities: int) -> Path:
    """A conversations table of rendered faces with all questions of the laptop profile, two faces a person."""
    from facemllm.annotate.annotator import caption
    from facemllm.ingest.run import RENDER, ingest
    from facemllm.reformat.run import reformat
    from facemllm.settings import load
    from facemllm.tables import FACES, TableWriter

    settings = load("laptop", [f"ingest.identities={identities}"])
    ingest(settings, folder / "bare", [RENDER])
    with TableWriter(folder / "faces", FACES) as writer:
        for row in _rows(folder / "bare"):
            writer.write([row | {"caption": caption(row)}])
    reformat(settings, folder / "faces", folder / "conversations")
    return folder / "conversations"


def _rows(table: Path) -> Any:
    from facemllm.tables import FACES, open_table

    for batch in open_table(table, FACES).batches(batch_rows=64):
        yield from pa.RecordBatch.to_pylist(batch)
