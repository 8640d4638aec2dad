"""Figures from saved predictions: no model is loaded, so scoring again never asks one.

An evaluation folder may hold `generated/`, `disturbed/<kind>/` and `characteristics/` beside its predictions: tables of
the same model's answers by free generation, to disturbed pictures, and of its scores. They are compared with the
predictions where they are there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from facemllm.core.files import atomic_write
from facemllm.errors import UserError
from facemllm.evaluate import characteristics
from facemllm.evaluate.baselines import baselines
from facemllm.scoring import calibration, consistency, fairness, slices
from facemllm.scoring.sheet import read_answers, read_sheet
from facemllm.scoring.summary import summarise
from facemllm.settings import Settings
from facemllm.tables import CONVERSATIONS, MANIFEST, PREDICTIONS, Table, open_table


def score(settings: Settings, conversations: Path, predictions: Path, out: Path | None = None) -> dict[str, Any]:
    """Metrics of predictions on the conversations they answer, as written to `metrics.json`; to `out` if given.

    `predictions` is a table or an evaluation folder. Raises UserError unless every question of the split is answered
    exactly once and by one model, scores are probabilities, and what is answered by a number has one for its truth.
    """
    inside = predictions / "predictions"
    found = open_table(inside if (inside / MANIFEST).is_file() else predictions, PREDICTIONS)
    metrics = measure(settings, open_table(conversations, CONVERSATIONS), found)
    if out is not None:
        atomic_write(out, encode(metrics))
    return metrics


def measure(settings: Settings, conversations: Table, predictions: Table) -> dict[str, Any]:
    """Metrics of opened tables. The split is the one the predictions were made on."""
    split = predictions.manifest["about"].get("split", settings.evaluate.split)
    sheet = read_sheet(conversations, split)
    answers = read_answers(predictions, sheet)
    rivals = baselines(settings, conversations, sheet)
    model = _model(predictions)
    # only the predictions of an evaluation have a folder of their own: beside another table lies anything
    beside = predictions.path.parent if predictions.path.name == "predictions" else predictions.path
    parsed = answers.parsed
    return {
        "model_digest": model,
        "model": predictions.manifest["about"].get("model"),
        "conversations_digest": conversations.digest,
        "predictions_digest": predictions.digest,
        "split": split,
        "n_images": len(sheet.images),
        "n_subjects": sheet.people_count,
        "maps": _maps(conversations, split) if predictions.manifest["about"].get("maps") else None,
        "seed": settings.seed,
        "resamples": settings.evaluate.bootstrap,
        **summarise(sheet, answers, rivals, settings.evaluate.bootstrap, settings.seed),
        "fairness": fairness.measure(settings, sheet, parsed),
        "consistency": consistency.measure(settings, sheet, parsed),
        "calibration": calibration.measure(settings, sheet, answers),
        "confusion": calibration.confusion(sheet, answers),
        "slices": slices.measure(settings, sheet, parsed),
        "disturbed": slices.disturbed(settings, sheet, parsed, beside / "disturbed"),
        "generation": slices.generation(settings, sheet, parsed, beside / "generated"),
        "characteristics": characteristics.measure(settings, sheet, parsed, beside / "characteristics"),
    }


def _maps(conversations: Table, split: str) -> dict[str, int]:
    """How many faces of a split bring a map of their parts."""
    found = [(batch.num_rows, batch.column(0).null_count) for batch in conversations.batches(["segmentation"], split)]
    return {"faces": sum(rows for rows, _ in found), "given": sum(rows - missing for rows, missing in found)}


def _model(predictions: Table) -> str:
    """Digest of the one model whose predictions these are. Raises UserError naming the first that is another's."""
    model: str | None = None
    for row in predictions.iterate(["sample_id", "model_digest"]):
        model = model if model is not None else str(row["model_digest"])
        if row["model_digest"] != model:
            raise UserError(
                f"{predictions.path}: question {row['sample_id']} was answered by model {row['model_digest'][:12]}, "
                f"others by {model[:12]}; score the predictions of one model at a time"
            )
    if model is None:
        raise UserError(f"{predictions.path} holds no predictions; predict again")
    return model


def encode(value: Any) -> bytes:
    """JSON as this project writes it: sorted, indented, without NaN."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()
