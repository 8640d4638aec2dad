"""How far a probability can be believed, and which classes are taken for which."""

from __future__ import annotations

from typing import Any

import numpy as np

from facemllm.scoring import stats
from facemllm.scoring.metrics import BINS, ECE, Array, calibration_columns, of_totals
from facemllm.scoring.sheet import Answers, Sheet
from facemllm.settings import Settings


def measure(settings: Settings, sheet: Sheet, answers: Answers) -> dict[str, Any]:
    """Expected calibration error of each task that is answered by a class, with the bins of its reliability plot.

    ECE = sum over bins of n_b / n * |accuracy_b - confidence_b|, 15 bins of equal width (Guo et al. 2017, equation 3).
    Confidence is the probability of the answer given; an unread answer has none. Empty bins are left out. A model that
    is as sure as it may be has an error too, from chance and from few answers in a bin: `expected` is the mean of such
    errors, answers of each bin drawn right with its mean confidence, independent of each other. No interval is given:
    resamples add that chance to every one of them, so percentiles lie above the error itself.
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
    found = {}
    for task, rows in asked.items():
        totals_K = parts[task].per_subject_SK.sum(0)
        bins = totals_K.reshape(BINS, 3)
        found[task] = {
            "ece": stats.plain(of_totals(ECE, totals_K[None])[0]),
            "expected": stats.plain(_of_the_calibrated(bins, settings.evaluate.bootstrap, settings.seed)),
            "n": len(rows),
            "bins": [
                {"confidence": stats.plain(said / n), "accuracy": stats.plain(right / n), "n": int(n)}
                for right, said, n in bins
                if n
            ],
        }
    return found


def _of_the_calibrated(bins_B3: Array, draws: int, seed: int) -> float:
    """Mean error over draws in which an answer of a bin is right with the bin's mean confidence."""
    asked_B, said_B = bins_B3[:, 2], bins_B3[:, 1]
    chance_B = np.clip(said_B / np.maximum(asked_B, 1), 0, 1)
    right_RB = np.random.default_rng(seed).binomial(asked_B.astype(int), chance_B, size=(draws, len(bins_B3)))
    return float(abs(right_RB - said_B).sum(1).mean() / asked_B.sum())


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
