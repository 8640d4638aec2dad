"""The step `evaluate`: a model answers a held-out split; its answers, figures and a dozen faces to look at are kept.

The folder holds `predictions/` (a table), `metrics.json` and `samples/` (JPEG faces and `samples.json`). Its bytes
follow from the model's and the table's bytes and the settings: no time and no path is in it.
"""

from __future__ import annotations

import heapq
import io
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from facemllm import tasks
from facemllm.evaluation.predict import open_image, predict
from facemllm.evaluation.score import encode, measure
from facemllm.records import CONVERSATIONS, PREDICTIONS, Table, TableWriter, open_table, partial_folder, publish
from facemllm.scoring.metrics import columns, number
from facemllm.settings import Settings

SAMPLES = 12
SAMPLE_PIXELS = 256


def evaluate(
    settings: Settings, model_dir: Path, model_digest: str, conversations: Path, out: Path, *, predictor: Any = None
) -> Mapping[str, Any]:
    """Evaluate a model on `evaluation.split` into the folder `out`; returns what `metrics.json` holds.

    The model is loaded from `model_dir` unless a predictor is given. Raises UserError when `out` exists or the split
    holds no questions; then nothing is left behind.
    """
    table = open_table(conversations, CONVERSATIONS)
    split = settings.evaluation.split
    partial = partial_folder(out)
    try:
        predictor = predictor or _load(settings, model_dir)
        about = {"split": split, "model_digest": model_digest}
        parents = [table.digest, model_digest]
        with TableWriter(partial / "predictions", PREDICTIONS, parents=parents, about=about) as writer:
            predict(predictor, table, split, settings, writer, model_digest)
        predictions = open_table(partial / "predictions", PREDICTIONS)
        metrics = measure(settings, table, predictions)
        (partial / "metrics.json").write_bytes(encode(metrics))
        _write_samples(partial / "samples", table, split, predictions)
        publish(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return metrics


def _load(settings: Settings, model_dir: Path) -> Any:
    import torch

    from facemllm.model.inference import Predictor

    device = "cuda" if settings.training.use_gpu and torch.cuda.is_available() else "cpu"
    return Predictor.load(model_dir, device=device, threads=settings.training.threads or None)


def _write_samples(folder: Path, conversations: Table, split: str, predictions: Table) -> None:
    """Keep a dozen faces, drawn by the smallest digests so that no eye has chosen them, and all said about them."""
    names = (name for batch in conversations.batches(["image_id"], split) for name in batch.column(0).to_pylist())
    chosen = heapq.nsmallest(SAMPLES, set(names))
    said: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    for row in predictions.iterate(["sample_id", "image_id", "task", "question", "answer", "raw", "parsed"]):
        if row["image_id"] in said:
            said[row.pop("image_id")].append(_marked(row))
    folder.mkdir()
    for face in conversations.iterate(["image_id", "images"], split):
        if face["image_id"] in said:
            image = open_image(face)
            image.thumbnail((SAMPLE_PIXELS, SAMPLE_PIXELS), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=90)
            (folder / f"{chosen.index(face['image_id']):02d}.jpg").write_bytes(buffer.getvalue())
    entries = [
        {"image": f"{index:02d}.jpg", "image_id": name, "questions": said[name]} for index, name in enumerate(chosen)
    ]
    (folder / "samples.json").write_bytes(encode(entries))


def _marked(row: Mapping[str, Any]) -> dict[str, Any]:
    """A prediction with its mark: `score` is the error of a number, the F1 of facts, else 1 or 0."""
    metric = tasks.get(row["task"]).metric
    added = columns(metric if metric in ("mae", "fact_f1") else "accuracy", [row["answer"]], [row["parsed"]])[0]
    if metric == "mae":
        mark = None if number(row["parsed"]) is None else round(float(added[0]), 2)
    elif metric == "fact_f1":
        shared, stated, true = added
        mark = round(float(2 * shared / max(1, 2 * shared + stated + true)), 4)
    else:
        mark = float(added[0])
    return {**row, "metric": metric, "score": mark}
