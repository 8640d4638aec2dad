"""Figures from saved predictions: no model is loaded, so scoring again never asks one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from facemllm.evaluation.baselines import baselines
from facemllm.records import CONVERSATIONS, PREDICTIONS, Table, atomic_write, open_table
from facemllm.scoring.metrics import read_parsed, read_sheet, summarise
from facemllm.settings import Settings


def score(settings: Settings, conversations: Path, predictions: Path, out: Path | None = None) -> dict[str, Any]:
    """Metrics of a predictions table on the conversations it answers, as written to `metrics.json`; to `out` if given.

    Raises UserError unless every question of the split is answered exactly once.
    """
    metrics = measure(settings, open_table(conversations, CONVERSATIONS), open_table(predictions, PREDICTIONS))
    if out is not None:
        atomic_write(out, encode(metrics))
    return metrics


def measure(settings: Settings, conversations: Table, predictions: Table) -> dict[str, Any]:
    """Metrics of opened tables. The split is the one the predictions were made on."""
    split = predictions.manifest["about"].get("split", settings.evaluation.split)
    sheet = read_sheet(conversations, split)
    parsed = read_parsed(predictions, sheet)
    rivals = baselines(settings, conversations, sheet)
    model = next(predictions.iterate(["model_digest"]))["model_digest"]
    return {
        "model_digest": model,
        "conversations_digest": conversations.digest,
        "predictions_digest": predictions.digest,
        "split": split,
        "n_images": len(set(sheet.image_ids)),
        "n_subjects": sheet.people,
        "seed": settings.seed,
        "resamples": settings.evaluation.bootstrap,
        **summarise(sheet, parsed, rivals, settings.evaluation.bootstrap, settings.seed),
    }


def encode(value: Any) -> bytes:
    """JSON as this project writes it: sorted, indented, without NaN."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()
