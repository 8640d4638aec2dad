"""What needs no model: the answer a constant gives, and what a linear reading of small pixels gives.

Both are fitted on the training split and answer the same questions as the model. `constant` is the answer that scores
best: the most frequent class, the median number, a set of facts, `yes` where finding it is what counts; of an item that
training never asks, any constant: chance. `pixels` sees the face at a few pixels (standardise, 300 whitened principal
components) and fits a logistic regression per item, a ridge regression per number and per fact. Other ways to ask an
item have no baseline. A model that does not clear these has not learnt to look.
"""

from __future__ import annotations

import heapq
import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from threadpoolctl import threadpool_limits

from facemllm import tasks
from facemllm.core import progress
from facemllm.scoring import metrics
from facemllm.scoring.metrics import facts
from facemllm.scoring.sheet import Key, Sheet, read_sheet
from facemllm.settings import Settings
from facemllm.tables import Table

Features = npt.NDArray[np.float32]

TRAIN_FACES = 8192  # a linear model on 300 numbers gains little from more, and memory stays flat
COMPONENTS = 300
_ABSENT = ""


def training_sheet(conversations: Table) -> Sheet | None:
    """The questions of the training split; None when the table has none."""
    has_any = any(True for _ in conversations.batches(["image_id"], "train"))
    return read_sheet(conversations, "train") if has_any else None


def baselines(
    settings: Settings, conversations: Table, sheet: Sheet, train: Sheet | None
) -> dict[str, list[str | None]]:
    """Answers of both baselines, fitted on the questions of `train`, to those of a sheet; empty without any. They are
    fitted on one thread: sums that several share differ in their last bits, and answers would with them."""
    if train is None:
        return {}
    import sklearn.decomposition
    import sklearn.linear_model  # noqa: F401  (only libraries that are loaded can be limited)

    with threadpool_limits(1):
        return _fitted(settings, conversations, sheet, train)


def _fitted(settings: Settings, conversations: Table, sheet: Sheet, train: Sheet) -> dict[str, list[str | None]]:
    constants: dict[Key, str] = {}
    for key, rows in train.rows.items():
        constant_of = metrics.of(tasks.get(key[0])).constant
        assert constant_of is not None  # every metric that a task may name has one
        constants[key] = constant_of([train.answers[row] for row in rows])
    with progress.bar("baselines", len(sheet.rows) + 1) as bar:
        space = _Space.fit(settings, conversations, train, sheet)
        bar.update(1, "small pixels read")
        constant: list[str | None] = [None] * len(sheet.answers)
        linear: list[str | None] = [None] * len(sheet.answers)
        for done, (key, rows) in enumerate(sheet.rows.items(), start=2):
            readings = space.read(key, train, sheet) if space and key in constants else None
            chance = constants[key] if key in constants else _any_answer(sheet.questions[key], constants)
            for position, row in enumerate(rows):
                constant[row] = chance
                linear[row] = readings[position] if readings else constants.get(key)
            bar.update(done, f"linear model of {' '.join(key)}")
    return {"constant": constant, "pixels": linear}


def _any_answer(question: Any, constants: Mapping[Key, str]) -> str | None:
    """A constant where training knows no answer: the first option, the middle of a grid, to an open question that of
    another item of its task, if there is one."""
    if not question.options:
        return next((constant for (task, _), constant in constants.items() if task == question.task), None)
    return str(question.options[len(question.options) // 2 if question.form == "number" else 0].value)


@dataclass(frozen=True)
class _Space:
    """Faces as whitened principal components of their small pixels, found by image_id."""

    train_at: dict[str, int]
    train_ND: Features
    test_at: dict[str, int]
    test_ND: Features

    @classmethod
    def fit(cls, settings: Settings, conversations: Table, train: Sheet, sheet: Sheet) -> _Space | None:
        """Fit on training faces; None when they are too few or too alike to tell anything apart."""
        from sklearn.decomposition import PCA

        side = settings.evaluate.baseline_pixels
        # the smallest digests are a random draw that depends on no order
        chosen = set(heapq.nsmallest(TRAIN_FACES, train.images))
        train_at, raw = _small_images(conversations, "train", side, chosen, lambda pixels: pixels)
        components = min(COMPONENTS, len(raw) - 1, raw.shape[1])
        mean, deviation = raw.mean(0), raw.std(0)
        if components < 1 or not (deviation > 1e-6).any():
            return None
        deviation[deviation <= 1e-6] = 1
        pca = PCA(components, svd_solver="randomized", iterated_power=3, random_state=settings.seed).fit(
            (raw - mean) / deviation
        )
        spread = np.sqrt(pca.explained_variance_)
        kept = spread > 1e-3 * spread[0]  # whitening a direction without variance would blow up noise

        def reduce(pixels: Features) -> Features:
            found: Features = (pca.transform((pixels - mean) / deviation)[:, kept] / spread[kept]).astype(np.float32)
            return found

        test_at, test_ND = _small_images(conversations, sheet.split, side, set(sheet.images), reduce)
        return cls(train_at, reduce(raw), test_at, test_ND)

    def read(self, key: Key, train: Sheet, sheet: Sheet) -> list[str] | None:
        """Answers of the linear model of an item to the sheet's questions; None where training knows one answer."""
        used = [row for row in train.rows[key] if train.images[train.faces[row]] in self.train_at]
        truth = [train.answers[row] for row in used]
        if len(set(truth)) < 2:
            return None
        x_ND = self.train_ND[[self.train_at[train.images[train.faces[row]]] for row in used]]
        test_ND = self.test_ND[[self.test_at[sheet.images[sheet.faces[row]]] for row in sheet.rows[key]]]
        fits = {"class": _classes, "number": _numbers, "facts": _facts}
        return fits[metrics.of(tasks.get(key[0])).answers](x_ND, truth, test_ND)


def _small_images(
    conversations: Table, split: str, side: int, wanted: set[str], then: Callable[[Features], Features]
) -> tuple[dict[str, int], Features]:
    """Pixels (faces, side * side * 3) in 0..1 of the wanted images, passed through `then` a batch at a time."""
    found: dict[str, int] = {}
    parts: list[Features] = []
    for batch in conversations.batches(["image_id", "images"], split):
        pixels = []
        for face in batch.to_pylist():
            if face["image_id"] in wanted and face["image_id"] not in found:
                found[face["image_id"]] = len(found)
                pixels.append(_shrink(face["images"][0]["bytes"], side))
        if pixels:
            parts.append(then(np.stack(pixels).astype(np.float32) / np.float32(255)))
    return found, np.concatenate(parts)


def _shrink(data: bytes, side: int) -> npt.NDArray[np.uint8]:
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (2 * side, 2 * side))  # a large JPEG is decoded at a fraction of its size
    return np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BOX)).reshape(-1)


def _classes(x_ND: Features, truth: list[str], test_ND: Features) -> list[str]:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=0.003, class_weight="balanced", max_iter=200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a baseline stopped short of convergence is still a baseline
        return [str(answer) for answer in model.fit(x_ND, truth).predict(test_ND)]


def _numbers(x_ND: Features, truth: list[str], test_ND: Features) -> list[str]:
    target = np.array([float(answer) for answer in truth])
    stated = np.clip(_ridge(x_ND, target, test_ND), target.min(), target.max())
    return [f"{value:.4f}" for value in stated]


def _facts(x_ND: Features, truth: list[str], test_ND: Features) -> list[str]:
    """One regression a fact, and one for a key's absence; each key answers with its strongest."""
    answers = [facts(text) for text in truth]
    values: dict[str, list[str]] = {}
    for fact in sorted({fact for answer in answers for fact in answer}):
        values.setdefault(fact.partition("=")[0], [_ABSENT]).append(fact)
    names = [(key, fact) for key, choices in values.items() for fact in choices]
    target = np.array(
        [[fact in answer if fact else answer.isdisjoint(values[key]) for key, fact in names] for answer in answers],
        dtype=float,
    )
    strength = _ridge(x_ND, target, test_ND)
    said: list[list[str]] = [[] for _ in test_ND]
    start = 0
    for choices in values.values():
        best = strength[:, start : start + len(choices)].argmax(1)
        for answer, index in zip(said, best, strict=True):
            if choices[index]:
                answer.append(choices[index])
        start += len(choices)
    return [";".join(sorted(answer)) for answer in said]


def _ridge(x_ND: Features, target: npt.NDArray[np.float64], test_ND: Features) -> npt.NDArray[Any]:
    from sklearn.linear_model import Ridge

    return np.asarray(Ridge(alpha=300.0).fit(x_ND, target).predict(test_ND))
