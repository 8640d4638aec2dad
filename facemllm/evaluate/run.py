"""The step `evaluate`: a model answers a held-out split; its answers, figures and a dozen faces to look at are kept.

The folder holds

    predictions/      every question of the split, as it was asked, and the model's answer
    generated/        a few faces' closed questions again, answered by free generation (models of ours)
    disturbed/KIND/   a few faces' questions again, of a picture made worse (`disturb`), or without its map
    characteristics/  scores of every face's characteristics (models with the knowledge branch)
    metrics.json
    samples/          JPEG faces and `samples.json`: what was said of them, of items asked in their own form

Its bytes follow from the model's and the table's bytes and the settings: no time and no path is in it.
"""

from __future__ import annotations

import heapq
import io
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from facemllm import tasks
from facemllm.core.files import partial_folder, publish
from facemllm.evaluate.characteristics import CHARACTERISTICS, write_scores
from facemllm.evaluate.disturb import KINDS, NO_MAP, unchanged
from facemllm.evaluate.predict import Answerer, Likelihood, Written, open_image, predict
from facemllm.evaluate.score import encode, measure
from facemllm.scoring.metrics import columns, number
from facemllm.settings import Settings
from facemllm.tables import CONVERSATIONS, PREDICTIONS, Table, TableWriter, open_table
from facemllm.tasks.asking import NATIVE

PREDICTED, GENERATED, DISTURBED, SCORED = "predictions", "generated", "disturbed", "characteristics"
SAMPLES = 12
SAMPLE_PIXELS = 256

Finish = Callable[[Path, Mapping[str, Any]], None]
"""Adds to an evaluation's folder, given the folder and the metrics, before it is in its place."""


def evaluate(
    settings: Settings,
    model_dir: Path,
    model_digest: str,
    conversations: Path,
    out: Path,
    *,
    predictor: Any = None,
    finish: Finish | None = None,
) -> Mapping[str, Any]:
    """Evaluate a model of ours on `evaluate.split` into the folder `out`; returns what `metrics.json` holds.

    The model is loaded from `model_dir` unless a predictor is given; `finish` adds to the folder before it is `out`.
    Raises UserError when `out` exists or the split holds no questions; then nothing is left behind.
    """

    def answerers() -> tuple[Answerer, Answerer]:
        loaded = predictor or _load(settings, model_dir)
        longest = settings.evaluate.max_new_tokens
        return Likelihood(loaded, longest), Written(loaded, longest)

    return answered(settings, answerers, {"model_digest": model_digest}, conversations, out, finish)


def answered(
    settings: Settings,
    answerers: Callable[[], tuple[Answerer, Answerer | None]],
    about: Mapping[str, Any],
    conversations: Path,
    out: Path,
    finish: Finish | None = None,
) -> Mapping[str, Any]:
    """`evaluate` with any model. `answerers` makes who answers and, if that is another, who writes `generated/`;
    `about` has the `model_digest` and what else the tables' manifests shall say of the model. Maps of face parts are
    shown where `evaluate.maps` says so and who answers takes them."""
    table = open_table(conversations, CONVERSATIONS)
    chosen = settings.evaluate
    split, digest = chosen.split, about["model_digest"]
    partial = partial_folder(out)

    def written(folder: str, schema: Any, **told: Any) -> TableWriter:
        about_it = {"split": split, **about, **told}
        return TableWriter(partial / folder, schema, parents=[table.digest, digest], about=about_it)

    def write(folder: str, answerer: Answerer, maps: bool, **options: Any) -> None:
        told = {"kind": options["change"][0]} if "change" in options else {}
        with written(folder, PREDICTIONS, **told, **({"maps": True} if maps else {})) as writer:
            predict(answerer, table, split, writer, digest, batch_images=chosen.batch_images, maps=maps, **options)

    try:
        main, writes = answerers()
        maps = chosen.maps and main.takes_maps
        write(PREDICTED, main, maps)
        if writes is not None and chosen.generated_faces:
            write(
                GENERATED, writes, maps, faces=drawn(table, split, chosen.generated_faces), which=_is_native_and_closed
            )
        if chosen.disturbed_faces:
            faces = drawn(table, split, chosen.disturbed_faces)
            for change in KINDS.items():
                write(f"{DISTURBED}/{change[0]}", main, maps, faces=faces, which=_is_native, change=change)
            if maps:
                write(f"{DISTURBED}/{NO_MAP}", main, False, faces=faces, which=_is_native, change=(NO_MAP, unchanged))
        if isinstance(main, Likelihood) and main.predictor.characteristic_names:
            with written(SCORED, CHARACTERISTICS) as writer:
                write_scores(main.predictor, table, split, writer, digest, batch_images=chosen.batch_images, maps=maps)
        predictions = open_table(partial / PREDICTED, PREDICTIONS)
        metrics = measure(settings, table, predictions)
        (partial / "metrics.json").write_bytes(encode(metrics))
        _write_samples(partial / "samples", table, split, predictions)
        if finish is not None:
            finish(partial, metrics)
        publish(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return metrics


def drawn(conversations: Table, split: str, count: int) -> list[str]:
    """So many faces of a split, those with the smallest digests: a random draw that no eye has made."""
    smallest: list[str] = []
    for batch in conversations.batches(["image_id"], split):
        smallest = heapq.nsmallest(count, {*smallest, *batch.column(0).to_pylist()})
    return smallest


def _is_native(question: tasks.Question) -> bool:
    return question.way == NATIVE


def _is_native_and_closed(question: tasks.Question) -> bool:
    return _is_native(question) and bool(question.options)


def _load(settings: Settings, model_dir: Path) -> Any:
    import torch

    from facemllm.model.inference import Predictor

    device = "cuda" if settings.train.use_gpu and torch.cuda.is_available() else "cpu"
    return Predictor.load(model_dir, device=device, threads=settings.train.threads or None)


def _write_samples(folder: Path, conversations: Table, split: str, predictions: Table) -> None:
    """Keep a dozen faces and what was said about them, asked in the items' own form."""
    chosen = drawn(conversations, split, SAMPLES)
    said: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    items: dict[str, str] = {}
    folder.mkdir()
    for face in conversations.iterate(["image_id", "images", "turns"], split):
        if face["image_id"] in said:
            asked = [(turn["sample_id"], tasks.question_of(turn)) for turn in face["turns"]]
            items |= {name: question.item for name, question in asked if _is_native(question)}
            image = open_image(face)
            image.thumbnail((SAMPLE_PIXELS, SAMPLE_PIXELS), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=90)
            (folder / f"{chosen.index(face['image_id']):02d}.jpg").write_bytes(buffer.getvalue())
    for row in predictions.iterate(["sample_id", "image_id", "task", "question", "answer", "raw", "parsed"]):
        if row["image_id"] in said and (item := items.get(row["sample_id"])) is not None:
            said[row.pop("image_id")].append({"item": item, **_marked(row)})
    entries = [
        {"image": f"{index:02d}.jpg", "image_id": name, "questions": said[name]} for index, name in enumerate(chosen)
    ]
    (folder / "samples.json").write_bytes(encode(entries))


def _marked(row: Mapping[str, Any]) -> dict[str, Any]:
    """A prediction with its mark: `score` is the error of a number, the F1 of facts, else 1 or 0."""
    metric = tasks.get(row["task"]).metric
    if metric not in ("mae", "fact_f1") or (metric == "mae" and number(row["answer"]) is None):
        metric = "accuracy"  # a statement about a number is true or false
    added = columns(metric, [row["answer"]], [row["parsed"]])[0]
    if metric == "mae":
        mark = None if number(row["parsed"]) is None else round(float(added[0]), 2)
    elif metric == "fact_f1":
        shared, stated, true = added
        mark = round(float(2 * shared / max(1, 2 * shared + stated + true)), 4)
    else:
        mark = float(added[0])
    return {**row, "metric": metric, "score": mark}
