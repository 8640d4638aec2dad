"""The metrics: what each answer adds to a figure's sums, and how sums become the figure.

An answer that cannot be read (`parsed` is null) is wrong: for a class it is none of them, for facts it states none, for
a number it takes the worst error on the option grid, for a yes/no unit it is a miss or a false alarm. Two steps, so
that sums can be added up by person and drawn again (`stats`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Parsed = Sequence[str | None]

CLOSED_MEAN = "closed_mean"
BALANCED = "balanced_accuracy"
ECE = "ece"

_ALSO: Mapping[str, tuple[str, ...]] = {
    "balanced_accuracy": ("accuracy",),
    "accuracy": ("balanced_accuracy",),
    "f1": ("accuracy",),
    "fact_f1": ("precision", "recall"),
}
WITHIN = 5.0
BINS = 15  # of confidence, as Guo et al. 2017, "On Calibration of Modern Neural Networks", section 2 (arXiv 1706.04599)
_EXACT = 2.0**30  # sums of multiples of its inverse are exact in a double, so they do not depend on their order


def also(task: Any) -> tuple[str, ...]:
    """What is reported beside a task's own metric: mean accuracy (CelebA) beside balanced accuracy, the class mean
    (RAF-DB) beside overall accuracy, the share of errors of at most five years or degrees (cumulative score) beside
    their mean."""
    if task.metric == "mae":
        return ("within_5",) if task.unit in ("years", "degrees") else ()
    return _ALSO[task.metric]


def is_choice(task: Any, question: Any) -> bool:
    """Whether a question is answered by choosing a class, so that it counts in `closed_mean`."""
    return bool(question.options) and task.metric in ("accuracy", BALANCED)


def clears_majority(figure: Mapping[str, Any]) -> bool:
    """Whether something was learnt: the whole 95 % interval lies on the good side of the majority baseline."""
    low, high, rival = figure["low"], figure["high"], figure["baselines"].get("majority")
    if low is None or high is None or rival is None:
        return False
    return bool(low > rival if figure["higher_is_better"] else high < rival)


def facts(text: str | None) -> frozenset[str]:
    """The facts of a canonical caption answer (`k=v;k=v`)."""
    return frozenset(part.strip() for part in (text or "").split(";") if part.strip())


def number(text: str | None) -> float | None:
    """A canonical number, or None when it is none."""
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def unread(text: str | None, metric: str) -> bool:
    """Whether an answer counts as unreadable under a metric: none at all, or no number where one is asked."""
    return text is None or (metric == "mae" and number(text) is None)


def numbers(texts: Parsed) -> Array:
    """Canonical numbers, NaN for what is none."""
    return np.array([math.nan if (value := number(text)) is None else value for text in texts])


def errors(answers: Sequence[str], parsed: Parsed, grid: Sequence[float]) -> Array:
    """Absolute errors of numbers; an unreadable one takes the worst error on the grid of options."""
    truth, stated = numbers(answers), numbers(parsed)
    low, high = (min(grid), max(grid)) if grid else (truth.min(), truth.max())
    return np.where(np.isnan(stated), np.maximum(abs(truth - low), abs(high - truth)), abs(stated - truth))


def columns(metric: str, answers: Sequence[str], parsed: Parsed, grid: Sequence[float] = ()) -> Array:
    """What each answer adds to the sums of a metric: (N, K), in the order `of_totals` reads. ValueError if unknown."""
    if metric == "mae":
        return _counted(exact(errors(answers, parsed, grid)))
    if metric == "within_5":
        return _counted(abs(numbers(parsed) - numbers(answers)) <= WITHIN + 1e-9)
    if metric in ("fact_f1", "precision", "recall"):
        pairs = [(facts(answer), facts(text)) for answer, text in zip(answers, parsed, strict=True)]
        return np.array([[len(true & said), len(said - true), len(true - said)] for true, said in pairs], dtype=float)
    truth, said = np.asarray(answers, dtype=object), np.asarray(parsed, dtype=object)
    right = truth == said
    if metric == "accuracy":
        return _counted(right)
    if metric == BALANCED:
        classes, index = np.unique(truth, return_inverse=True)
        asked = np.eye(len(classes))[index]
        return np.stack([asked * right[:, None], asked], axis=2).reshape(len(right), -1)
    if metric == "f1":
        true = truth == "yes"
        return np.stack([true & right, ~true & ~right, true & ~right], axis=1).astype(float)
    raise ValueError(f"unknown metric '{metric}'")


def calibration_columns(right: npt.NDArray[np.bool_], confidence: Array) -> Array:
    """What each answer adds to the sums of its bin of confidence: (N, 3 * BINS), right, confidence, one, bin by bin."""
    place = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    added = np.stack([right.astype(float), exact(confidence), np.ones(len(right))], axis=1)
    return np.asarray(np.eye(BINS)[place][:, :, None] * added[:, None, :]).reshape(len(right), -1)


def of_totals(metric: str, totals_RK: Array) -> Array:
    """The figure of a metric from its total sums, one a row.

    `accuracy`, `within_5`: right, asked. `mae`: error, asked. `balanced_accuracy`: right and asked of each class in
    turn; recall averaged over the classes that occur. `fact_f1`, `precision`, `recall`: facts shared, only stated, only
    true; `f1`: hits, false alarms, misses of `yes`. `ece`: right, confidence, asked of each bin in turn; the mean gap
    between accuracy and confidence, bins weighted by size. NaN where nothing was asked.
    """
    if metric in ("accuracy", "mae", "within_5"):
        return ratio(totals_RK[:, 0], totals_RK[:, 1])
    if metric == BALANCED:
        return mean(ratio(totals_RK[:, 0::2], totals_RK[:, 1::2]).T)
    if metric == ECE:
        right_RB, confidence_RB, asked_RB = (totals_RK[:, part::3] for part in range(3))
        return ratio(abs(right_RB - confidence_RB).sum(1), asked_RB.sum(1))
    if metric not in ("fact_f1", "f1", "precision", "recall"):
        raise ValueError(f"unknown metric '{metric}'")
    shared, stated, true = totals_RK.T
    if metric in ("fact_f1", "f1"):
        return ratio(2 * shared, 2 * shared + stated + true)
    return ratio(shared, shared + (stated if metric == "precision" else true))


def ratio(top: Array, bottom: Array) -> Array:
    """Element-wise quotient; NaN where the denominator is zero."""
    return np.divide(top, bottom, out=np.full(np.broadcast(top, bottom).shape, np.nan), where=bottom != 0)


def mean(figures: Iterable[Array]) -> Array:
    """Macro mean of several figures, over those that are defined in each resample."""
    stacked = np.stack(list(figures))
    known = ~np.isnan(stacked)
    return ratio(np.where(known, stacked, 0.0).sum(0), known.sum(0).astype(float))


def exact(values: Array) -> Array:
    """Numbers to the nearest 2^-30, so that a sum of millions of them comes out the same in any order."""
    rounded: Array = np.round(values * _EXACT) / _EXACT
    return rounded


def _counted(values: npt.NDArray[Any]) -> Array:
    return np.stack([values.astype(float), np.ones(len(values))], axis=1)
