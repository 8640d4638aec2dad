"""The step `evaluate`: a model answers a held-out split; its answers, figures and a dozen faces to look at are kept.

The folder holds

    predictions/      every question of the split, as it was asked, and the model's answer
    generated/        a few faces' closed questions again, answered by free generation (models of ours)
    disturbed/KIND/   a few faces' questions again, of a picture made worse (`predict.KINDS`), or without its map
    characteristics/  scores of every face's characteristics (models with the knowledge branch)
    metrics.json
    bill.json         what became of the questions, and what a peer was asked for and used (`peers`)
    samples/          JPEG faces and `samples.json`: what was said of them, of items asked in their own form

Its bytes, but for the bill's, follow from the model's and the table's bytes and the settings: no time and no path is in
it.
"""

from __future__ import annotations

import heapq
import io
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from facemllm import tasks
from facemllm.core import cost
from facemllm.core.files import atomic_write, building
from facemllm.evaluate.baselines import baselines, training_sheet
from facemllm.evaluate.predict import KINDS, NO_MAP, TRAINED, Answerer, Likelihood, Written, open_image, predict
from facemllm.scoring import benchmarks, calibration, combinations, consistency, fairness, metrics, summary
from facemllm.scoring.sheet import model_of, read_answers, read_sheet
from facemllm.settings import Settings
from facemllm.tables import CONVERSATIONS, MANIFEST, PREDICTIONS, Table, TableWriter, open_table, pairs
from facemllm.tasks.asking import NATIVE

PREDICTED, GENERATED, DISTURBED, SCORED = "predictions", "generated", "disturbed", "characteristics"
SAMPLES = 12
SAMPLE_PIXELS = 256

Finish = Callable[[Path, Mapping[str, Any]], None]
"""Adds to an evaluation's folder, given the folder and the metrics, before it is in its place."""
Timed = Callable[[float, int], None]
"""Is given the seconds that a model took to answer, without loading and figures, and how many questions it answered."""


def evaluate(
    settings: Settings,
    model_dir: Path,
    model_digest: str,
    conversations: Path,
    out: Path,
    *,
    predictor: Any = None,
    finish: Finish | None = None,
    timed: Timed | None = None,
) -> Mapping[str, Any]:
    """Evaluate a model of ours on `evaluate.split` into the folder `out`; returns what `metrics.json` holds. The model
    is loaded from `model_dir` unless a predictor is given; `finish` adds to the folder before it is `out`. Raises
    UserError when `out` exists or the split holds no questions; then nothing is left behind."""

    def answerers() -> tuple[Answerer, Answerer]:
        loaded = predictor or load(settings, model_dir)
        longest = settings.evaluate.max_new_tokens
        return Likelihood(loaded, longest), Written(loaded, longest)

    return answered(settings, answerers, {"model_digest": model_digest}, conversations, out, finish, timed)


def answered(
    settings: Settings,
    answerers: Callable[[], tuple[Answerer, Answerer | None]],
    about: Mapping[str, Any],
    conversations: Path,
    out: Path,
    finish: Finish | None = None,
    timed: Timed | None = None,
) -> Mapping[str, Any]:
    """`evaluate` with any model. `answerers` makes who answers and, if that is another, who writes `generated/`;
    `about` has the `model_digest` and what else the tables' manifests shall say of the model. Maps of face parts are
    shown where `evaluate.maps` says so and who answers takes them."""
    table = open_table(conversations, CONVERSATIONS)
    chosen = settings.evaluate
    split, digest = chosen.split, about["model_digest"]

    def written(folder: str, schema: Any, **extra: Any) -> TableWriter:
        about_it = {"split": split, **about, **extra}
        return TableWriter(partial / folder, schema, parents=[table.digest, digest], about=about_it)

    def write(folder: str, answerer: Answerer, maps: bool, **options: Any) -> None:
        extra = {"kind": options["change"][0]} if "change" in options else {}
        with written(folder, PREDICTIONS, **extra, **({"maps": True} if maps else {})) as writer:
            timer = timed if folder == PREDICTED else None
            options |= {"batch_images": chosen.batch_images, "maps": maps, "timed": timer}
            predict(answerer, table, split, writer, digest, **options)

    with building(out) as partial:
        main, writes = answerers()
        maps = chosen.maps and main.takes_maps
        if isinstance(main, Likelihood) and main.predictor.characteristic_names:
            with written(SCORED, calibration.CHARACTERISTICS) as writer:

                def keep(image_id: str, scores: Mapping[str, float]) -> None:
                    writer.write([{"image_id": image_id, "scores": pairs(scores), "model_digest": digest}])

                write(PREDICTED, replace(main, characteristics=keep), maps)
        else:
            write(PREDICTED, main, maps)
        if writes is not None and chosen.generated_faces:
            faces = drawn(table, split, chosen.generated_faces)
            write(GENERATED, writes, maps, faces=faces, which=_is_native_and_closed)
        if chosen.disturbed_faces:
            faces = drawn(table, split, chosen.disturbed_faces)
            for change in KINDS.items():
                write(f"{DISTURBED}/{change[0]}", main, maps, faces=faces, which=is_native, change=change)
            if maps:
                change = NO_MAP, lambda image, _: image
                write(f"{DISTURBED}/{NO_MAP}", main, False, faces=faces, which=is_native, change=change)
        predictions = open_table(partial / PREDICTED, PREDICTIONS)
        figures = _measure(settings, table, predictions)
        (partial / "metrics.json").write_bytes(encode(figures))
        _write_samples(partial / "samples", table, split, predictions)
        if finish is not None:
            finish(partial, figures)
    return figures


def score(settings: Settings, conversations: Path, predictions: Path, out: Path | None = None) -> dict[str, Any]:
    """Metrics of predictions on the conversations they answer, as written to `metrics.json`; to `out` if given.

    `predictions` is a table or an evaluation folder, whose other tables are held against it where they are there.
    Raises UserError unless every question of the split is answered exactly once and by one model, scores are
    probabilities, and what is answered by a number has one for its truth.
    """
    inside = predictions / PREDICTED
    found = open_table(inside if (inside / MANIFEST).is_file() else predictions, PREDICTIONS)
    table = open_table(conversations, CONVERSATIONS)
    figures = (_measure if benchmarks.benchmark_of(table) is None else benchmarks.evaluation)(settings, table, found)
    if out is not None:
        atomic_write(out, encode(figures))
    return figures


def _measure(settings: Settings, conversations: Table, predictions: Table) -> dict[str, Any]:
    """Metrics of opened tables. The split is the one the predictions were made on."""
    about = predictions.manifest["about"]
    split = about.get("split", settings.evaluate.split)
    sheet = read_sheet(conversations, split)
    answers = read_answers(predictions, sheet)
    train = training_sheet(conversations)
    rivals = baselines(settings, conversations, sheet, train)
    model = model_of(predictions)
    # only the predictions of an evaluation have a folder of their own: beside another table lies anything
    beside = predictions.path.parent if predictions.path.name == PREDICTED else predictions.path
    parsed = answers.parsed
    held_out = [one["names"] for one in conversations.manifest["about"].get("held_out_combinations") or ()]
    trained = {} if about.get("model") else {kind: kind in TRAINED for kind in KINDS}
    return {
        "model_digest": model,
        "model": about.get("model"),
        "conversations_digest": conversations.digest,
        "predictions_digest": predictions.digest,
        "split": split,
        "n_images": len(sheet.images),
        "n_subjects": sheet.people_count,
        "maps": _maps(conversations, split) if about.get("maps") else None,
        "seed": settings.seed,
        "resamples": settings.evaluate.bootstrap,
        **summary.summarise(sheet, answers, rivals, settings.evaluate.bootstrap, settings.seed),
        "fairness": fairness.measure(settings, sheet, parsed),
        "consistency": consistency.measure(settings, sheet, parsed, train),
        "calibration": calibration.measure(settings, sheet, answers),
        "confusion": calibration.confusion(sheet, answers),
        "slices": summary.slices(settings, sheet, parsed),
        "disturbed": summary.disturbed(settings, sheet, parsed, beside / DISTURBED, trained),
        "combinations": combinations.measure(settings, sheet, parsed, rivals, held_out),
        "generation": consistency.generation(settings, sheet, parsed, beside / GENERATED),
        "characteristics": calibration.characteristics(settings, sheet, parsed, beside / SCORED),
    }


def _maps(conversations: Table, split: str) -> dict[str, int]:
    """How many faces of a split bring a map of their parts."""
    found = [(batch.num_rows, batch.column(0).null_count) for batch in conversations.batches(["segmentation"], split)]
    return {"faces": sum(rows for rows, _ in found), "given": sum(rows - missing for rows, missing in found)}


def encode(value: Any) -> bytes:
    """JSON as this project writes it: sorted, indented, without NaN."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def drawn(conversations: Table, split: str, count: int) -> list[str]:
    """So many faces of a split, those with the smallest digests: a random draw that no eye has made."""
    smallest: list[str] = []
    for batch in conversations.batches(["image_id"], split):
        smallest = heapq.nsmallest(count, {*smallest, *batch.column(0).to_pylist()})
    return smallest


def is_native(question: tasks.Question) -> bool:
    """Whether a question is asked in its item's own form, as those of disturbed pictures are."""
    return question.variant == NATIVE


def _is_native_and_closed(question: tasks.Question) -> bool:
    return is_native(question) and bool(question.options)


def load(settings: Settings, model_dir: Path, image_size: int | None = None) -> Any:
    """A predictor of a model directory, where the settings want it, shown pictures of `image_size` pixels a side, or of
    the side that the directory notes. Raises UserError if it cannot be loaded."""
    from facemllm.model.inference import Predictor

    device = cost.inference_device(settings)
    return Predictor.load(model_dir, device, settings.train.threads or None, image_size)


def _write_samples(folder: Path, conversations: Table, split: str, predictions: Table) -> None:
    """Keep a dozen faces and what was said about them, asked in the items' own form."""
    chosen = drawn(conversations, split, SAMPLES)
    said: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    items: dict[str, str] = {}
    folder.mkdir()
    for face in conversations.iterate(["image_id", "images", "turns"], split):
        if face["image_id"] in said:
            asked = [(turn["sample_id"], tasks.question_of(turn)) for turn in face["turns"]]
            items |= {name: question.item for name, question in asked if is_native(question)}
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
    metric = metrics.of(tasks.get(row["task"]))
    if metric.answers == "class" or (metric.answers == "number" and metrics.number(row["answer"]) is None):
        metric = metrics.ACCURACY  # a statement about a number is true or false
    numeric = metric.answers == "number"
    value = float(metric.value(metric.columns([row["answer"]], [row["parsed"]], ()))[0])
    mark = 0.0 if math.isnan(value) else round(value, 2 if numeric else 4)  # nothing to state, and nothing stated
    return {**row, "metric": metric.name, "score": None if numeric and metric.is_unreadable(row["parsed"]) else mark}
