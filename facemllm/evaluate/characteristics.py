"""The scores of the knowledge branch beside the answers in words: a table of them, and what they are worth.

A model with that branch gives every characteristic of a face a probability, read before a word is written. They are
kept in `characteristics/` of an evaluation, one row a face, so that scoring again asks no model.
Legend: F faces, A characteristics.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from facemllm import tasks
from facemllm.core import progress
from facemllm.evaluate.predict import faces_of, open_image
from facemllm.knowledge.graph import UNKNOWN, Node, asserted, relations_of
from facemllm.scoring import stats
from facemllm.scoring.consistency import share
from facemllm.scoring.metrics import BALANCED, BINS, ECE, Parsed, calibration_columns, of_totals
from facemllm.scoring.sheet import Sheet
from facemllm.settings import Settings
from facemllm.tables import PREDICTIONS, Table, TableWriter, mapping, open_table, pairs

CHARACTERISTICS = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("scores", PREDICTIONS.field("scores").type, nullable=False),
        ("model_digest", pa.string()),
    ],
    metadata={"schema": "characteristics/1"},
)

Labels = NDArray[np.int8]
Probabilities = NDArray[np.float64]


def write_scores(
    predictor: Any, conversations: Table, split: str, writer: TableWriter, about: str, *, batch_images: int, maps: bool
) -> None:
    """The scores of every face of a split, in table order; with its map of face parts if `maps`."""
    rows = faces_of(conversations, split, maps=maps)
    total = sum(batch.num_rows for batch in conversations.batches(["image_id"], split))
    done = 0
    with progress.bar("scoring characteristics", total) as bar:
        while batch := list(islice(rows, batch_images)):
            images = [open_image(face) for face in batch]
            found = predictor.characteristics(images, [face["segmentation"] for face in batch])
            writer.write(
                {"image_id": face["image_id"], "scores": pairs(scores), "model_digest": about}
                for face, scores in zip(batch, found, strict=True)
            )
            done += len(batch)
            bar.update(done, f"{done} of {total} faces scored")


def measure(settings: Settings, sheet: Sheet, parsed: Parsed, folder: Path) -> dict[str, Any] | None:
    """What the scores say beside the text; None where `folder` holds none.

    A characteristic counts on the faces whose true answers tell it. `scores` and `text` are the shares that are right
    (a score of one half or more says yes; text that does not tell is wrong), with intervals over people, `balanced` the
    same as the mean of yes and no, averaged over characteristics; `agreement` is the share in which both say the same,
    where the text tells; `ece` the calibration error of the scores. `relations` are checked on the faces whose text
    tells enough. `by_characteristic` and `by_relation` give the same one by one.
    """
    if not folder.is_dir():
        return None
    names, probability_FA = _read(open_table(folder, CHARACTERISTICS), sheet)
    scored_FA = np.where(np.isnan(probability_FA), UNKNOWN, probability_FA >= 0.5).astype(np.int8)
    truth_FA, text_FA = (_told(sheet, answers, names) for answers in (sheet.answers, parsed))
    truth_FA[scored_FA == UNKNOWN] = UNKNOWN
    face, place = np.nonzero(truth_FA != UNKNOWN)
    people = sheet.people[face]
    truth, scored, text = (labels_FA[face, place] for labels_FA in (truth_FA, scored_FA, text_FA))
    spoken = text != UNKNOWN
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
        "agreement": share(settings, sheet, people[spoken], (scored == text)[spoken]),
        "balanced": {who: _mean([one[who][BALANCED] for one in each]) for who in ("scores", "text")},
        **_calibration(scored == truth, np.maximum(chance, 1 - chance)),
        "by_characteristic": each,
        "relations": _relations(settings, sheet, names, scored_FA, text_FA, truth_FA),
    }


def _read(table: Table, sheet: Sheet) -> tuple[tuple[str, ...], Probabilities]:
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


def _told(sheet: Sheet, answers: Parsed, names: Sequence[str]) -> Labels:
    """What answers, asked in the items' own form, tell of each face: 1 yes, 0 no, -1 nothing; a yes outweighs a no."""
    places = {name: place for place, name in enumerate(names)}
    labels_FA = np.full((len(sheet.images), len(names)), UNKNOWN, np.int8)
    for key, rows in sheet.rows.items():
        question = sheet.questions[key]
        if question.form not in ("choice", "boolean"):
            continue
        said = np.asarray([answers[row] for row in rows], dtype=object)
        for answer in {text for text in said if text is not None}:
            faces = sheet.faces[rows[said == answer]]
            affirmed, denied = asserted(tasks.get(question.task), question, answer)
            for value, told in ((0, denied), (1, affirmed)):
                at = np.ix_(faces, [places[name] for name in told if name in places])
                labels_FA[at] = np.maximum(labels_FA[at], value)
    return labels_FA


def _one(name: str, truth: Labels, scored: Labels, text: Labels) -> dict[str, Any]:
    spoken = text != UNKNOWN
    return {
        "name": name,
        "n": len(truth),
        "yes": stats.plain(float((truth == 1).mean())),
        "scores": _right(truth, scored),
        "text": _right(truth, text),
        "agreement": stats.plain(float((scored == text)[spoken].mean())) if spoken.any() else None,
    }


def _right(truth: Labels, said: Labels) -> dict[str, float | None]:
    recalls = [float((said == value)[truth == value].mean()) for value in (0, 1) if (truth == value).any()]
    balanced = stats.plain(float(np.mean(recalls))) if len(recalls) == 2 else None
    return {"accuracy": stats.plain(float((said == truth).mean())), BALANCED: balanced}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return stats.plain(float(np.mean(known))) if known else None


def _calibration(right: NDArray[np.bool_], confidence: Probabilities) -> dict[str, Any]:
    totals_K = calibration_columns(right, confidence).sum(0) if len(right) else np.zeros(3 * BINS)
    return {
        "ece": stats.plain(float(of_totals(ECE, totals_K[None])[0])),
        "bins": [
            {"confidence": stats.plain(said / n), "accuracy": stats.plain(hits / n), "n": int(n)}
            for hits, said, n in totals_K.reshape(BINS, 3)
            if n
        ],
    }


def _relations(
    settings: Settings, sheet: Sheet, names: Sequence[str], scored_FA: Labels, text_FA: Labels, truth_FA: Labels
) -> dict[str, Any]:
    """Shares of broken relations of the faces whose text tells enough to check one; the labels' where they do."""
    nodes = [Node(task="", item="", value="", name=name, words=name) for name in names]
    places = {name: place for place, name in enumerate(names)}
    counts = {who: np.zeros((2, len(sheet.images))) for who in ("scores", "text", "labels")}
    each = []
    for relation in relations_of(dict.fromkeys(task for task, _ in sheet.rows), nodes):
        shares = {}
        told = relation.check(places, text_FA == 1, text_FA != UNKNOWN)[0]
        for who, labels_FA in (("scores", scored_FA), ("text", text_FA), ("labels", truth_FA)):
            known, breaks = relation.check(places, labels_FA == 1, labels_FA != UNKNOWN)
            checked = known & told
            counts[who] += checked, checked & breaks
            shares[who] = stats.plain(float(breaks[checked].mean())) if checked.any() else None
        if told.any():
            each.append({"relation": str(relation), "n": int(told.sum()), **shares})
    overall = {}
    for who, (checks_F, broken_F) in counts.items():
        some = checks_F > 0
        overall[who] = share(settings, sheet, sheet.people[some], broken_F[some], checks_F[some])
    return {"n": int(counts["text"][0].sum()), **overall, "by_relation": each}
