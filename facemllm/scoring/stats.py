"""Uncertainty of figures on held-out people: a bootstrap over subjects, as matrix products.

Images of one person are alike, so people are drawn, not images. Every figure here is a function of sums over subjects
(right answers and questions per class, error and count, shared and differing facts). A resample is a vector of how
often each subject was drawn, so all resamples of all figures are one product, `weights_RS @ sums_SK`, and a macro mean
or a difference of two models is arithmetic on its rows.

Legend: S subjects, R resamples, K sums of a figure. Row 0 of every replicated array is the sample itself (each subject
once), so the estimate and its resamples go through the same code. 1,000 resamples of 280 subjects and 80 sums: 10 ms.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

LEVEL = 0.95
_BLOCK = 2**23  # weights held at a time: 64 MB


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % percentile interval; NaN where there is nothing to estimate from."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Sums:
    """What a figure is made of: its metric's name and its sums per subject (S, K)."""

    metric: str
    per_subject_SK: Array


def ratio(top: Array, bottom: Array) -> Array:
    """Element-wise quotient; NaN where the denominator is zero."""
    return np.divide(top, bottom, out=np.full(np.broadcast(top, bottom).shape, np.nan), where=bottom != 0)


def mean(replicates: Iterable[Array]) -> Array:
    """Macro mean of several figures' replicates, over those that are defined in each resample."""
    stacked = np.stack(list(replicates))
    known = ~np.isnan(stacked)
    return ratio(np.where(known, stacked, 0.0).sum(0), known.sum(0).astype(float))


def of_totals(metric: str, totals_RK: Array) -> Array:
    """The figure of a metric from its total sums, one a row.

    `accuracy`: right, asked. `mae`: error, asked. `balanced_accuracy`: right and asked of each class in turn; recall
    averaged over the classes that occur. `fact_f1`: facts shared, facts only stated, facts only true.
    """
    if metric in ("accuracy", "mae"):
        return ratio(totals_RK[:, 0], totals_RK[:, 1])
    if metric == "balanced_accuracy":
        return mean(ratio(totals_RK[:, 0::2], totals_RK[:, 1::2]).T)
    if metric == "fact_f1":
        shared, stated, true = totals_RK.T
        return ratio(2 * shared, 2 * shared + stated + true)
    raise ValueError(f"unknown metric '{metric}'")


def replicate(figures: Mapping[str, Sums], resamples: int, seed: int) -> dict[str, Array]:
    """Every figure on the sample (row 0) and on the same `resamples` draws of its subjects.

    The draws depend on the seed and the number of subjects alone, so two models on the same people are paired.
    """
    if not figures:
        return {}
    sums_SK = np.concatenate([figure.per_subject_SK for figure in figures.values()], axis=1)
    subjects = len(sums_SK)
    draw = np.random.default_rng(seed)
    odds = np.full(subjects, 1 / subjects)
    totals = [sums_SK.sum(0, keepdims=True)]
    block = max(1, _BLOCK // subjects)
    for start in range(0, resamples, block):
        weights_RS = draw.multinomial(subjects, odds, size=min(block, resamples - start))
        totals.append(weights_RS.astype(np.float64) @ sums_SK)
    totals_RK = np.concatenate(totals)
    if subjects < 2:
        totals_RK[1:] = np.nan  # one person says nothing about how people differ
    widths = np.cumsum([figure.per_subject_SK.shape[1] for figure in figures.values()])[:-1]
    parts = np.split(totals_RK, widths, axis=1)
    return {name: of_totals(figure.metric, part) for (name, figure), part in zip(figures.items(), parts, strict=True)}


def interval(replicates: Array) -> Interval:
    """Estimate and percentile interval of replicates, leaving out resamples in which the figure is undefined."""
    drawn = replicates[1:][~np.isnan(replicates[1:])]
    if not len(drawn):
        return Interval(float(replicates[0]), float("nan"), float("nan"))
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(replicates[0]), float(low), float(high))


def by_subject(subjects: npt.NDArray[Any], columns_NK: npt.ArrayLike, count: int) -> Array:
    """Sum rows into their subjects: (N, K) values with subject indices (N,) to (count, K)."""
    values_NK = np.asarray(columns_NK, dtype=np.float64).reshape(len(subjects), -1)
    sums_KS = [np.bincount(subjects, weights=column, minlength=count) for column in values_NK.T]
    return np.stack(sums_KS, axis=1)
