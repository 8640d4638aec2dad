"""Probabilities: how far those of answers can be believed, and what the knowledge branch's say beside the answers.

A model with that branch gives every characteristic of a face a probability, read before a word is written. They are
kept in `characteristics/` of an evaluation, one row a face, so that scoring again asks no model.
Legend: N answers, B bins of confidence, R draws, F faces, A characteristics.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from facemllm.scoring import stats
from facemllm.scoring.consistency import assertions, share
from facemllm.scoring.metrics import ACCURACY, BALANCED, Array, Parsed, exact
from facemllm.scoring.sheet import Answers, Mask, Sheet
from facemllm.settings import Settings
from facemllm.tables import PREDICTIONS, Table, mapping, open_table
from facemllm.tasks.characteristics import UNKNOWN, Node, relations_of

BINS = 15  # of confidence, as Guo et al. 2017, "On Calibration of Modern Neural Networks", section 2 (arXiv 1706.04599)
CHARACTERISTICS = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("scores", PREDICTIONS.field("scores").type, nullable=False),
        ("model_digest", pa.string()),
    ],
    metadata={"schema": "characteristics/1"},
)

Labels = NDArray[np.int8]


def measure(settings: Settings, sheet: Sheet, answers: Answers) -> dict[str, Any]:
    """Expected calibration error of each task that is answered by a class, with the bins of its reliability plot.

    Confidence is the probability of the answer given; an unreadable answer has none. A model that is as sure as it may
    be has an error too, from chance and from few answers in a bin: `expected` is the mean of such errors, answers of
    each bin drawn right with its mean confidence, independent of each other. No interval is given: resamples add that
    chance to every one of them, so percentiles lie above the error itself.
    """
    found = {}
    for task in dict.fromkeys(task for task, _ in sheet.rows):
        keys = [key for key in sheet.rows if key[0] == task and sheet.questions[key].form in ("choice", "boolean")]
        rows = np.concatenate([sheet.rows[key] for key in keys]) if keys else np.empty(0, dtype=np.int64)
        rows = rows[np.isfinite(answers.confidence[rows])]
        if len(rows):
            right = np.array([answers.parsed[row] == sheet.answers[row] for row in rows])
            bins_B3 = _bins(right, answers.confidence[rows])
            expected = stats.plain(_of_the_calibrated(bins_B3, settings.evaluate.bootstrap, settings.seed))
            found[task] = {**_calibration(bins_B3), "expected": expected, "n": len(rows)}
    return found


def _bins(right: Mask, confidence: Array) -> Array:
    """Right answers, summed confidence and answers of each bin of confidence, 15 of equal width: (B, 3)."""
    place = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    added_3N = (right, exact(confidence), np.ones(len(right)))
    return np.stack([np.bincount(place, weights=added, minlength=BINS) for added in added_3N], axis=1)


def _calibration(bins_B3: Array) -> dict[str, Any]:
    """ECE = sum over bins of n_b / n * |accuracy_b - confidence_b| (Guo et al. 2017, equation 3), None where nothing
    was asked, and the bins, those that are empty left out."""
    asked = bins_B3[:, 2].sum()
    return {
        "ece": stats.plain(abs(bins_B3[:, 0] - bins_B3[:, 1]).sum() / asked) if asked else None,
        "bins": [
            {"confidence": stats.plain(said / n), ACCURACY.name: stats.plain(right / n), "n": int(n)}
            for right, said, n in bins_B3
            if n
        ],
    }


def _of_the_calibrated(bins_B3: Array, draws: int, seed: int) -> float:
    """Mean error over draws in which an answer of a bin is right with the bin's mean confidence."""
    asked_B, said_B = bins_B3[:, 2], bins_B3[:, 1]
    chance_B = np.clip(said_B / np.maximum(asked_B, 1), 0, 1)
    right_RB = np.random.default_rng(seed).binomial(asked_B.astype(int), chance_B, size=(draws, len(bins_B3)))
    return float(abs(right_RB - said_B).sum(1).mean() / asked_B.sum())


def confusion(sheet: Sheet, answers: Answers) -> dict[str, Any]:
    """Confusion matrices of items with a choice of classes, by `task.item`: rows are the truth, columns the answers in
    the order of `labels`; `unreadable` counts each class's unreadable answers. Answers that are no option come last."""
    found = {}
    for key, rows in sheet.rows.items():
        question = sheet.questions[key]
        if question.form != "choice":
            continue
        pairs = [(sheet.answers[row], answers.parsed[row]) for row in rows]
        options = [option.value for option in question.options]
        odd = {text for pair in pairs for text in pair if text is not None} - set(options)
        labels = [*options, *sorted(odd)]
        place = {label: number for number, label in enumerate(labels)}
        counts = np.zeros((len(labels), len(labels) + 1), dtype=int)  # the last column holds what was not read
        for true, said in pairs:
            counts[place[true], -1 if said is None else place[said]] += 1
        found[".".join(key)] = {
            "labels": labels,
            "counts": counts[:, :-1].tolist(),
            "unreadable": counts[:, -1].tolist(),
        }
    return found


def characteristics(settings: Settings, sheet: Sheet, parsed: Parsed, folder: Path) -> dict[str, Any] | None:
    """What the scores in `folder` say beside the text; None where it holds none.

    A characteristic counts on the faces whose true answers tell it. `scores` and `text` are the shares that are right
    (a score of one half or more says yes; text that does not tell is wrong), `balanced` the same as the mean of yes and
    no, averaged over characteristics, `agreement` the share in which both say the same, where the text tells, `ece` the
    calibration error of the scores. `relations` are checked on the faces whose text tells enough.
    """
    if not folder.is_dir():
        return None
    names, probability_FA = _read(open_table(folder, CHARACTERISTICS), sheet)
    scored_FA = np.where(np.isnan(probability_FA), UNKNOWN, probability_FA >= 0.5).astype(np.int8)
    truth_FA, text_FA = (_labels(sheet, answers, names) for answers in (sheet.answers, parsed))
    truth_FA[scored_FA == UNKNOWN] = UNKNOWN
    face, place = np.nonzero(truth_FA != UNKNOWN)
    people = sheet.people[face]
    truth, scored, text = (labels_FA[face, place] for labels_FA in (truth_FA, scored_FA, text_FA))
    stated = text != UNKNOWN
    each = [
        _one(name, *(found[place == number] for found in (truth, scored, text)))
        for number, name in enumerate(names)
        if (place == number).any()
    ]
    chance = probability_FA[face, place]
    return {
        "n": len(face),
        "scores": share(settings, sheet, people, scored == truth),
        "text": share(settings, sheet, people, text == truth),
        "agreement": share(settings, sheet, people[stated], (scored == text)[stated]),
        "balanced": {
            who: stats.plain_mean(right for one in each if (right := one[who][BALANCED]) is not None)
            for who in ("scores", "text")
        },
        **_calibration(_bins(scored == truth, np.maximum(chance, 1 - chance))),
        "by_characteristic": each,
        "relations": _relations(settings, sheet, names, {"scores": scored_FA, "text": text_FA, "labels": truth_FA}),
    }


def _read(table: Table, sheet: Sheet) -> tuple[tuple[str, ...], Array]:
    """Names of the characteristics, and their probabilities in the order of the sheet's faces."""
    places = {image: place for place, image in enumerate(sheet.images)}
    names: tuple[str, ...] = ()
    found = np.empty((0, 0))
    for row in table.iterate(["image_id", "scores"]):
        scores = mapping(row["scores"])
        if not names:
            names = tuple(scores)
            found = np.full((len(places), len(names)), np.nan)
        if (face := places.get(row["image_id"])) is not None:
            found[face] = [scores[name] for name in names]
    return names, found


def _labels(sheet: Sheet, answers: Parsed, names: Sequence[str]) -> Labels:
    """What answers, asked in the items' own form, tell of each face: 1 yes, 0 no, -1 nothing; a yes outweighs a no."""
    places = {name: place for place, name in enumerate(names)}
    labels_FA = np.full((len(sheet.images), len(names)), UNKNOWN, np.int8)
    outright = [(how, rows) for how, rows in sheet.outright.items() if how.item != "caption"]
    for faces, affirmed, denied in assertions(sheet, answers, outright):
        for value, stated in ((0, denied), (1, affirmed)):
            at = np.ix_(faces, np.array([places[name] for name in stated if name in places], dtype=np.intp))
            labels_FA[at] = np.maximum(labels_FA[at], value)
    return labels_FA


def _one(name: str, truth: Labels, scored: Labels, text: Labels) -> dict[str, Any]:
    stated = text != UNKNOWN
    return {
        "name": name,
        "n": len(truth),
        "yes": stats.plain_mean(truth == 1),
        "scores": _right(truth, scored),
        "text": _right(truth, text),
        "agreement": stats.plain_mean((scored == text)[stated]),
    }


def _right(truth: Labels, said: Labels) -> dict[str, float | None]:
    recalls = [float((said == value)[truth == value].mean()) for value in (0, 1) if (truth == value).any()]
    balanced = stats.plain_mean(recalls) if len(recalls) == 2 else None
    return {ACCURACY.name: stats.plain_mean(said == truth), BALANCED: balanced}


def _relations(settings: Settings, sheet: Sheet, names: Sequence[str], labels: dict[str, Labels]) -> dict[str, Any]:
    """Shares of broken relations of the faces whose text tells enough to check one; the labels' where they do."""
    nodes = [Node(task="", item="", value="", name=name, words=name) for name in names]
    places = {name: place for place, name in enumerate(names)}
    counts = {who: np.zeros((2, len(sheet.images))) for who in labels}
    each = []
    for relation in relations_of(dict.fromkeys(task for task, _ in sheet.rows), nodes):
        shares = {}
        stated = relation.check(places, labels["text"] == 1, labels["text"] != UNKNOWN)[0]
        for who, labels_FA in labels.items():
            known, breaks = relation.check(places, labels_FA == 1, labels_FA != UNKNOWN)
            checked = known & stated
            counts[who] += checked, checked & breaks
            shares[who] = stats.plain_mean(breaks[checked])
        if stated.any():
            each.append({"relation": str(relation), "n": int(stated.sum()), **shares})
    overall = {}
    for who, (checks_F, broken_F) in counts.items():
        some = checks_F > 0
        overall[who] = share(settings, sheet, sheet.people[some], broken_F[some], checks_F[some])
    return {"n": int(counts["text"][0].sum()), **overall, "by_relation": each}
