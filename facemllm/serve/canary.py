"""Whether a new model may take over from the one that serves, by what both did with requests of the same time.

Pure functions of counts: the local proxy's and a cluster's gateway's are judged alike. An error or a slow answer of the
new model counts against it only in so far as the other one does better on its share of the same traffic. What is
certainly worse is rolled back at once; what looks worse, and may be chance, is given up to `PATIENCE` times as many
requests to show that it was; with what looks no worse it goes on.

How well one step tells, by 120 simulated ones each with `min_requests` 50, increase .01 and ratio 1.5 (answer times
log-normal with sigma .35, 2 % of them two to six times as long). Rolled back are: of equal models none, or 6 % where
both fail 5 % of the requests; of models that fail 2, 5, 10 or 20 % more 27, 93, 99 and 100 %; of those 1.2, 1.5, 2 or 3
times as slow 0, 15, 83 and 96 %. It took 53 requests of each for equal ones, 54 to 167 for the others. A trial has
several steps, and each may roll back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

PATIENCE = 4
_CERTAIN = 0.001  # looked at every few requests, so that chance alone has many tries
_BOUND = 0.05


@dataclass(frozen=True)
class Limits:
    """What a new model is held to. Rates and shares are of 1; `max_p95_ratio` is to the p95 of the other model."""

    min_requests: int
    max_error_rate_increase: float
    max_p95_ratio: float
    min_agreement: float


@dataclass(frozen=True)
class Side:
    """What one model did: requests that ended, how many of them with an error, and times to answer (seconds, as
    measured or as a histogram's upper edges) to how many."""

    requests: int = 0
    errors: int = 0
    latency: Mapping[float, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Parity:
    """How many of `of` questions the new model was `asked` so far, and how many it answered as evaluation did."""

    of: int = 0
    asked: int = 0
    agreed: int = 0


@dataclass(frozen=True)
class Judgement:
    """The decision, its reason in one line, and the figures that it stands on."""

    decision: Literal["promote", "wait", "roll back"]
    reason: str
    figures: Mapping[str, Any]


def judge(stable: Side, canary: Side, parity: Parity, limits: Limits) -> Judgement:
    """Judge a new model against the one that serves. Both need `min_requests` before it is promoted."""
    figures: dict[str, Any] = {"requests": [stable.requests, canary.requests], "errors": [stable.errors, canary.errors]}
    sure: list[str] = []
    doubtful: list[str] = []
    likely: list[str] = []  # of the doubtful ones: not to be put down to chance after all

    differing = parity.asked - parity.agreed
    figures |= {"asked": parity.asked, "agreed": parity.agreed}
    if parity.of and (parity.of - differing) / parity.of < limits.min_agreement:
        sure.append(f"{differing} of {parity.of} answers differ from evaluation's")

    increase = _rate(canary) - _rate(stable)
    p_value = error_p_value(stable, canary)
    figures |= {"error_rate_increase": round(increase, 4), "error_p_value": float(f"{p_value:.3g}")}
    if increase > limits.max_error_rate_increase:
        counts = f"{canary.errors} of {canary.requests} requests failed, of the other model's {stable.errors} of"
        said = f"{counts} {stable.requests} (p = {p_value:.2g})"
        (sure if p_value < _CERTAIN else doubtful).append(said)
        likely += [said] if p_value < _BOUND else []

    ratio, at_least = p95_ratio(stable.latency, canary.latency)
    if ratio is not None:
        figures |= {"p95_ratio": round(ratio, 3), "p95_ratio_at_least": at_least and round(at_least, 3)}
        said = f"the 95th percentile of its answer times is {ratio:.2f} times the other model's"
        if at_least is not None and at_least > limits.max_p95_ratio:
            sure.append(f"{said}, at least {at_least:.2f} times")
        elif ratio > limits.max_p95_ratio:
            doubtful.append(said)
            likely.append(said)

    if sure:
        return Judgement("roll back", "; ".join(sure), figures)
    fewest = min(stable.requests, canary.requests)
    if fewest < limits.min_requests:
        return Judgement("wait", f"{fewest} of {limits.min_requests} requests so far", figures)
    if not doubtful:
        return Judgement("promote", "it is no worse than the limits allow", figures)
    if fewest < PATIENCE * limits.min_requests:
        return Judgement("wait", f"not yet certain: {'; '.join(doubtful)}", figures)
    if not likely:
        return Judgement("promote", f"after {fewest} requests chance explains it: {'; '.join(doubtful)}", figures)
    return Judgement("roll back", f"after {fewest} requests still: {'; '.join(likely)}", figures)


def error_p_value(stable: Side, canary: Side) -> float:
    """Fisher's exact test, one-sided: how probable so many of the errors are on the new model's side by chance."""
    from scipy.stats import hypergeom

    if not canary.errors:
        return 1.0
    total = stable.requests + canary.requests
    return float(hypergeom.sf(canary.errors - 1, total, stable.errors + canary.errors, canary.requests))


def p95_ratio(stable: Mapping[float, int], canary: Mapping[float, int]) -> tuple[float | None, float | None]:
    """The ratio of the 95th percentiles, and a bound that it is at least; None where there are too few for one.

    The bound sets a lower limit of the one percentile against an upper limit of the other, by order statistics, each at
    95 %: no distribution is assumed.
    """
    from scipy.stats import binom

    n, m = sum(stable.values()), sum(canary.values())
    if not n or not m:
        return None, None
    ratio = _nth(canary, round(0.95 * m + 0.5)) / _nth(stable, round(0.95 * n + 0.5))
    low = int(binom.ppf(_BOUND, m, 0.95))  # P(fewer than this many lie below the percentile) is at most _BOUND
    high = int(binom.ppf(1 - _BOUND, n, 0.95)) + 1
    if low < 1 or high > n:
        return ratio, None
    return ratio, _nth(canary, low) / _nth(stable, high)


def _rate(side: Side) -> float:
    return side.errors / side.requests if side.requests else 0.0


def _nth(latency: Mapping[float, int], n: int) -> float:
    """The n-th smallest value, counted from 1."""
    total = 0
    for value in sorted(latency):
        total += latency[value]
        if total >= n:
            return value
    return max(latency)
