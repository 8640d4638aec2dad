"""How far a probability can be believed, and which classes are taken for which."""

from __future__ import annotations

from typing import Any

import numpy as np

from facemllm.scoring import stats
from facemllm.scoring.metrics import BINS, ECE, calibration_columns
from facemllm.scoring.sheet import Answers, Sheet
from facemllm.settings import Settings


def measure(settings: Settings, sheet: Sheet, answers: Answers) -> dict[str, Any]:
    """Expected calibration error of each task that is answered by a class, with the bins of its reliability plot.

    ECE = sum over bins of n_b / n * |accuracy_b - confidence_b|, 15 bins of equal width (Guo et al. 2017, equation 3).
    Confidence is the probability of the answer given; an unread answer has none. Empty bins are left out.
    """
    parts: dict[str, stats.Sums] = {}
    asked = {}
    for task in dict.fromkeys(task for task, _ in sheet.rows):
        keys = [key for key in sheet.rows if key[0] == task and sheet.questions[key].form in ("choice", "boolean")]
        rows = np.concatenate([sheet.rows[key] for key in keys]) if keys else np.empty(0, dtype=np.int64)
        rows = rows[np.isfinite(answers.confidence[rows])]
        if len(rows):
            right = np.array([answers.parsed[row] == sheet.answers[row] for row in rows])
            added_NK = calibration_columns(right, answers.confidence[rows])
            parts[task] = stats.Sums(ECE, stats.by_subject(sheet.subjects[rows], added_NK, sheet.people_count))
            asked[task] = rows
    drawn = stats.replicate(parts, settings.evaluation.bootstrap, settings.seed)
    found = {}
    for task, rows in asked.items():
        error = stats.spread(drawn[task], len(np.unique(sheet.subjects[rows])))
        bins = parts[task].per_subject_SK.sum(0).reshape(BINS, 3)
        found[task] = {
            "ece": error["value"],
            "low": error["low"],
            "high": error["high"],
            "n": len(rows),
            "bins": [
                {"confidence": stats.plain(said / n), "accuracy": stats.plain(right / n), "n": int(n)}
                for right, said, n in bins
                if n
            ],
        }
    return found


def confusion(sheet: Sheet, answers: Answers) -> dict[str, Any]:
    """Confusion matrices of items with a choice of classes, by `task.item`: rows are the truth, columns the answers in
    the order of `labels`; `unparsed` counts each class's unread answers. Answers that are no option come last."""
    from sklearn.metrics import confusion_matrix

    found = {}
    for key, rows in sheet.rows.items():
        question = sheet.questions[key]
        if question.form != "choice":
            continue
        truth = [sheet.answers[row] for row in rows]
        said = [answers.parsed[row] for row in rows]
        options = [option.value for option in question.options]
        odd = {text for text in (*truth, *said) if text is not None} - set(options)
        labels = [*options, *sorted(odd)]
        read = [(true, text) for true, text in zip(truth, said, strict=True) if text is not None]
        counts = (
            confusion_matrix([true for true, _ in read], [text for _, text in read], labels=labels).tolist()
            if read
            else [[0] * len(labels) for _ in labels]
        )
        unread = [true for true, text in zip(truth, said, strict=True) if text is None]
        found[".".join(key)] = {
            "labels": labels,
            "counts": counts,
            "unparsed": [unread.count(label) for label in labels],
        }
    return found
