"""The judgement of a canary: what is certain, what is doubtful, what is chance; and how well it tells."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.stats

from facemllm.errors import UserError
from facemllm.serve.canary import PATIENCE, Limits, Parity, Side, error_p_value, judge, p95_ratio
from facemllm.serve.local.meters import Meter, bucket
from facemllm.serve.local.target import side
from facemllm.settings import load
from tests.refusing import refuses

LIMITS = Limits(50, 0.01, 1.5, 0.98)
QUICK = {0.1: 50}
UNASKED = Parity()


def decided(stable: Side, canary: Side, parity: Parity = UNASKED, limits: Limits = LIMITS) -> str:
    return judge(stable, canary, parity, limits).decision


def test_an_equal_model_is_promoted_once_there_are_enough_requests_of_both() -> None:
    enough = Side(50, 0, QUICK)
    assert decided(enough, enough, Parity(20, 20, 20)) == "promote"
    few = Side(49, 0, {0.1: 49})
    assert decided(enough, few) == decided(few, enough) == decided(Side(), Side()) == "wait"
    assert decided(Side(50, 5, {0.1: 45}), Side(50, 5, {0.1: 45})) == "promote", "both fail alike"
    assert decided(Side(50, 5, {0.1: 45}), enough) == "promote", "better than the one before"


def test_what_is_certainly_worse_does_not_wait() -> None:
    good = Side(20, 0, {0.1: 20})
    assert decided(good, Side(10, 10)) == "roll back"
    assert "differ from evaluation's" in judge(good, good, Parity(50, 4, 2), LIMITS).reason
    assert decided(good, good, Parity(100, 4, 2)) == "wait", "two of a hundred are allowed"
    slow = judge(Side(100, 0, {0.1: 100}), Side(100, 0, {0.3: 100}), Parity(), LIMITS)
    assert (slow.decision, slow.figures["p95_ratio"], slow.figures["p95_ratio_at_least"]) == ("roll back", 3.0, 3.0)
    assert "3.00 times" in slow.reason


def test_what_may_be_chance_waits_and_only_what_is_likely_is_rolled_back_in_the_end() -> None:
    good = Side(50, 0, QUICK)
    assert decided(good, Side(50, 2, {0.1: 48})) == "wait"
    end = PATIENCE * 50
    last = Side(end, 0, {0.1: end})
    assert decided(last, Side(end, 8, {0.1: end - 8})) == "roll back"
    assert decided(last, Side(end, 3, {0.1: end - 3})) == "promote"
    flaky = Side(end, 10, {0.1: end - 10})
    assert decided(flaky, replace(flaky, errors=13)) == "promote", "chance explains three more of ten"
    slower = {0.1: 40, 0.2: 10}
    assert decided(Side(50, 0, QUICK), Side(50, 0, slower)) == "wait"
    loose = replace(LIMITS, max_p95_ratio=2.0, max_error_rate_increase=0.1)
    assert decided(Side(50, 0, QUICK), Side(50, 2, slower), limits=loose) == "promote"


def test_statistics_are_those_of_scipy() -> None:
    for stable, canary in ((Side(90, 1), Side(10, 3)), (Side(50, 4), Side(60, 9)), (Side(7, 0), Side(5, 0))):
        table = [[canary.errors, canary.requests - canary.errors], [stable.errors, stable.requests - stable.errors]]
        assert error_p_value(stable, canary) == pytest.approx(scipy.stats.fisher_exact(table, "greater").pvalue)
    rng = np.random.default_rng(0)
    bad = 0
    for _ in range(200):
        times = [rng.lognormal(0, 0.5, 120) * factor for factor in (1.0, 1.5)]
        ratio, at_least = p95_ratio(*(Counter(one.tolist()) for one in times))
        assert ratio == pytest.approx(np.quantile(times[1], 0.95) / np.quantile(times[0], 0.95), rel=0.2)
        assert at_least is not None
        bad += at_least > 1.5
    assert bad <= 4, "the bound holds at its level"
    assert p95_ratio({}, {1.0: 3}) == (None, None)
    assert p95_ratio({1.0: 3}, {2.0: 3}) == (2.0, None)


def test_power_and_size_by_simulation() -> None:
    """The figures that the module states, within their own error."""
    rng = np.random.default_rng(1)

    def rolled_back(rate: float, slow: float, tries: int = 40) -> float:
        return sum(_step(rng, rate, slow) for _ in range(tries)) / tries

    assert rolled_back(0, 1.0) <= 0.05
    assert rolled_back(0.1, 1.0) >= 0.9
    assert rolled_back(0, 3.0) >= 0.9


def _step(rng: Any, rate: float, slow: float) -> bool:
    """One step of a trial, looked at every five requests; whether the new model is rolled back."""
    times: list[list[float]] = [[], []]
    errors = [0, 0]
    while True:
        for which, factor in enumerate((1.0, slow)):
            failed = rng.binomial(5, rate) if which else 0
            spikes = np.where(rng.random(5 - failed) < 0.02, rng.uniform(2, 6, 5 - failed), 1)
            times[which] += (0.05 * factor * rng.lognormal(0, 0.35, 5 - failed) * spikes).tolist()
            errors[which] += failed
        one, other = (
            Side(len(found) + failed, failed, Counter(map(bucket, found)))
            for found, failed in zip(times, errors, strict=True)
        )
        if (decision := decided(one, other)) != "wait":
            return decision == "roll back"


def test_counters_become_sides() -> None:
    meter = Meter()
    meter.answered(200, 0.1)
    before = {"backends": {"a": Meter(**{**vars(meter), "latency": Counter(meter.latency)}).to_dict()}}
    meter.answered(200, 0.1)
    meter.answered(404, 0.3)
    meter.answered(500, 0.001)
    meter.answered(429, 0.001)
    meter.failed(refused=True)
    now = {"backends": {"a": meter.to_dict()}}
    assert side(before, now, "a", latency=True) == Side(4, 2, {bucket(0.1): 1, bucket(0.3): 1})
    assert side(before, now, "a", latency=False) == Side(4, 2, {})
    assert side(before, now, "b", latency=True) == Side()
    for seconds in (0.0, 0.00012, 0.05, 1, 90):
        assert max(seconds, 1e-4) <= bucket(seconds) * 1.0001
        assert bucket(seconds) <= max(seconds, 1e-4) * 1.0501


@pytest.mark.parametrize("steps", ["[]", "[10, 50]", "[50, 10, 100]", "[0, 100]", "[50, 50, 100]"])
def test_steps_that_lead_nowhere_are_refused(steps: str) -> None:
    refuses(r"serve\.canary\.steps", load, "laptop", [f"serve.canary.steps={steps}"], error=UserError)
