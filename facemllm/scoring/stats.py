"""Uncertainty of figures on held-out people: a bootstrap over subjects, as matrix products.

Images of one person are alike, so people are drawn, not images. Every figure is a function of sums over subjects. A
resample is a vector of how often each subject was drawn, so all resamples of all figures are one product,
`weights_RS @ sums_SK`, and a macro mean or a difference of two models is arithmetic on its rows.

Legend: S subjects, R resamples, K sums of a figure. Row 0 of every replicated array is the sample itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from facemllm.scoring.metrics import Array, Metric

Name = TypeVar("Name")
SHOWN = 0.05
"""A difference counts as shown where its corrected p value is below this."""
NOTHING: Mapping[str, float | None] = {"value": None, "low": None, "high": None}
"""A figure that there is nothing to make of, as stored."""
LEVEL = 1 - SHOWN
POWER = 0.80
_BLOCK = 2**23  # weights held at a time: 64 MB
_ROUNDING = 1e-12
_KEPT = 2**26  # weights kept from one call to the next: 128 MB


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % percentile interval; NaN where there is nothing to estimate from."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Sums:
    """What a figure is made of: its metric and its sums per subject (S, K)."""

    metric: Metric
    per_subject_SK: Array


def replicate(figures: Mapping[Name, Sums], resamples: int, seed: int) -> dict[Name, Array]:
    """Every figure on the sample (row 0) and on the same `resamples` draws of its subjects. The draws depend on the
    seed and the number of subjects alone, so two models on the same people are paired, and so are two groups of
    them."""
    if not figures:
        return {}
    sums_SK = np.concatenate([figure.per_subject_SK for figure in figures.values()], axis=1)
    subjects = len(sums_SK)
    totals = [sums_SK.sum(0, keepdims=True)]
    totals += [weights_RS.astype(np.float64) @ sums_SK for weights_RS in _draws(subjects, resamples, seed)]
    totals_RK = np.concatenate(totals)
    if subjects < 2:
        totals_RK[1:] = np.nan  # one person says nothing about how people differ
    widths = np.cumsum([figure.per_subject_SK.shape[1] for figure in figures.values()])[:-1]
    parts = np.split(totals_RK, widths, axis=1)
    return {name: figure.metric.value(part) for (name, figure), part in zip(figures.items(), parts, strict=True)}


def _draws(subjects: int, resamples: int, seed: int) -> Iterable[npt.NDArray[np.uint16]]:
    """How often each subject is drawn, in blocks of resamples; drawn once for all figures where memory allows."""
    kept = subjects * resamples <= _KEPT
    return _kept(subjects, resamples, seed, _BLOCK) if kept else _drawn(subjects, resamples, seed, _BLOCK)


@lru_cache(maxsize=1)
def _kept(subjects: int, resamples: int, seed: int, size: int) -> tuple[npt.NDArray[np.uint16], ...]:
    return tuple(_drawn(subjects, resamples, seed, size))


def _drawn(subjects: int, resamples: int, seed: int, size: int) -> Iterator[npt.NDArray[np.uint16]]:
    draw = np.random.default_rng(seed)
    odds = np.full(subjects, 1 / subjects)
    block = max(1, size // subjects)
    for start in range(0, resamples, block):
        yield draw.multinomial(subjects, odds, size=min(block, resamples - start)).astype(np.uint16)


def interval(replicates: Array) -> Interval:
    """Estimate and percentile interval of replicates, leaving out resamples in which the figure is undefined."""
    drawn = _defined(replicates)
    if not len(drawn):
        return Interval(float(replicates[0]), float("nan"), float("nan"))
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(replicates[0]), float(low), float(high))


def spread(replicates: Array, people: int) -> dict[str, float | None]:
    """Value and 95 % interval as stored; `people` of one or none have no interval."""
    found = interval(replicates)
    low, high = (plain(found.low), plain(found.high)) if people > 1 else (None, None)
    return {"value": plain(found.value), "low": low, "high": high}


def standard_error(replicates: Array) -> float:
    """Standard deviation of a figure over its resamples; NaN below two of them, 0 where they differ by rounding."""
    drawn = _defined(replicates)
    error = float(np.std(drawn, ddof=1)) if len(drawn) > 1 else float("nan")
    return 0.0 if error < _ROUNDING else error


def minimum_detectable_difference(
    error: float,
    degrees: float = math.inf,
    level: float = SHOWN,
    growth: Sequence[float] = (0.0, 0.0),
    beyond: float = 0.0,
) -> float:
    """The minimum detectable difference d: one that large is shown at this level, two-sided, four times in five; with
    `beyond`, is shown to exceed that.

    d = beyond + (t_(1 - level / 2) + t_0.80) * error, of a paired difference at 5 % 2.80 * error, with `error` the
    standard error of the difference (Cohen 1988, chapter 2; Bloom 1995, Evaluation Review 19(5); Miller 2024, arXiv
    2411.00640, section 5). With growth (b, c) the variance is error^2 (1 + b d - c d^2). Of one model alone, `error` is
    that of its own figure: two models of equal error e whose answers correlate by 0.5 differ with the error
    sqrt(e^2 + e^2 - 2 * 0.5 * e^2) = e. NaN where the error is zero: answers that are all alike say nothing about how
    people differ; and where by that growth no difference can be as large as `beyond`.
    """
    from scipy.stats import t

    if not error > 0:
        return float("nan")
    square = float((t.ppf(1 - level / 2, degrees) + t.ppf(POWER, degrees)) * error) ** 2
    half, steep = beyond + square * growth[0] / 2, 1 + square * growth[1]
    inside = half**2 + (square - beyond**2) * steep
    return (half + math.sqrt(inside)) / steep if inside >= 0 else float("nan")


def p_value(value: float, error: float, degrees: float) -> float:
    """Two-sided p of a difference of this standard error, by a t test; 1 where there is none.

    Percentiles of 1,000 resamples would end at p = 0.002, too coarse to correct for many comparisons. NaN if undefined:
    an error of zero says nothing about how people differ.
    """
    from scipy.stats import t

    if not degrees > 0 or not math.isfinite(value) or not math.isfinite(error):
        return float("nan")
    if value == 0:
        return 1.0
    return min(1.0, 2 * float(t.sf(abs(value) / error, degrees))) if error > 0 else float("nan")


def sign_test(changes_S: Array) -> float:
    """Two-sided p of as many changes for the better, and as many for the worse, as there are; NaN where none is."""
    from scipy.stats import binomtest

    better, worse = int((changes_S > 1e-9).sum()), int((changes_S < -1e-9).sum())
    return float(binomtest(better, better + worse).pvalue) if better + worse else float("nan")


def t_interval(value: float, error: float, degrees: float) -> dict[str, float | None]:
    """A difference with the 95 % interval of `p_value`'s test, as stored."""
    from scipy.stats import t

    reach = float(t.ppf((1 + LEVEL) / 2, degrees)) * error if degrees > 0 else float("nan")
    return {"value": plain(value), "low": plain(value - reach), "high": plain(value + reach)}


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values of one family; undefined ones (NaN) stay so and do not count. Written out since the one
    of statsmodels collects garbage at every call, a quarter of a second in a full process."""
    found = np.array(p_values, dtype=float)
    order = np.argsort(found)[: int((~np.isnan(found)).sum())]  # NaN sorts last
    found[order] = np.minimum(1, np.maximum.accumulate(found[order] * np.arange(len(order), 0, -1)))
    return [float(p) for p in found]


def by_subject(subjects: npt.NDArray[Any], columns_NK: npt.ArrayLike, count: int) -> Array:
    """Sum rows into their subjects: (N, K) values with subject indices (N,) to (count, K)."""
    values_NK = np.asarray(columns_NK, dtype=np.float64).reshape(len(subjects), -1)
    sums_KS = [np.bincount(subjects, weights=column, minlength=count) for column in values_NK.T]
    return np.stack(sums_KS, axis=1)


def plain(value: float) -> float | None:
    """A number as stored: twelve decimals, below which lies only the order of a floating-point sum; None for NaN."""
    return round(float(value), 12) + 0.0 if math.isfinite(value) else None


def plain_mean(values: Iterable[Any]) -> float | None:
    """The mean of numbers or truth values, as stored; None where there are none."""
    found = list(values)
    return plain(float(np.mean(found))) if found else None


def _defined(replicates: Array) -> Array:
    drawn: Array = replicates[1:][~np.isnan(replicates[1:])]
    return drawn
