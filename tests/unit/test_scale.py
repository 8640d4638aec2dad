"""The model of benchmarks/scale.py against closed forms: queues, stragglers, failures; and sums done by hand."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import integrate
from scipy import stats as scipy_stats

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import scale


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def likeliest(**other: float) -> dict[str, np.ndarray]:
    return {name: np.array([other.get(name, rate.likely)]) for name, rate in scale.RATES.items()}


@pytest.mark.parametrize("used", [0.3, 0.6, 0.8])
def test_one_request_a_pass_waits_as_pollaczek_and_khinchine_say(generator: np.random.Generator, used: float) -> None:
    found = scale.latencies(used / 0.01, 0.008, 0.002, 1, generator, 40_000).mean()
    assert found == pytest.approx(0.01 + used * 0.01 / (2 * (1 - used)), rel=0.08)


def test_passes_over_many_carry_what_one_by_one_cannot(generator: np.random.Generator) -> None:
    rate = 1.5 / 0.02  # more than one by one: a pass of one takes 20 ms, of sixteen 35
    assert scale.latencies(rate, 0.001, 0.019, 1, generator).max() > 10
    assert scale.latencies(rate, 0.001, 0.019, 16, generator).max() < 0.2


def test_the_busiest_rate_keeps_the_limit_and_a_little_more_does_not(generator: np.random.Generator) -> None:
    rate = scale.busiest(0.01, 0.0, 1, 0.06, generator)
    wait = scipy_stats.expon.isf(0.01, scale=0.01)  # an M/M/1 of the same pace would be worse
    assert 0.6 < rate * 0.01 < 0.95
    assert wait < 0.06
    for share, kept in ((0.9, True), (1.1, False)):
        late = np.quantile(scale.latencies(rate * share, 0.01, 0.0, 1, generator, 30_000), 0.99)
        assert (late <= 0.06) == kept
    assert scale.busiest(0.05, 0.02, 16, 0.06, generator) == 0


@pytest.mark.parametrize("workers", [1, 8, 64])
def test_the_slowest_worker_is_the_mean_of_the_largest_log_normal(generator: np.random.Generator, workers: int) -> None:
    sigma = math.sqrt(math.log1p(0.1**2))
    one = scipy_stats.lognorm(sigma, scale=math.exp(-(sigma**2) / 2))
    mean, _ = integrate.quad(lambda x: 1 - one.cdf(x) ** workers, 0, 3)
    assert scale.slowest(workers, 0.1, generator, 8_000) == pytest.approx(mean, rel=0.01)


def test_a_run_with_failures_lasts_as_daly_says(generator: np.random.Generator) -> None:
    interval, save, restart, life = 100.0, 5.0, 20.0, 400.0
    runs = [scale.with_failures(4_000, interval, save, restart, life, generator) for _ in range(600)]
    assert np.mean(runs) / 4_000 == pytest.approx(float(scale.stretched(interval, save, restart, life)), rel=0.03)


def test_youngs_interval_is_the_best_where_saving_is_short() -> None:
    save, restart, life = 2.0, 30.0, 20_000.0
    best = float(scale.young(save, life))
    assert best == pytest.approx(math.sqrt(2 * 2 * 20_000))
    lost = [float(scale.stretched(best * share, save, restart, life)) for share in (0.7, 1.0, 1.4)]
    assert lost[1] == min(lost)
    assert lost[1] - 1 == pytest.approx(math.sqrt(2 * save / life) + restart / life, rel=0.05)


def test_sums_by_hand(generator: np.random.Generator) -> None:
    model = scale.Model("toy", 1e9, 0.0, 1e8, image_tokens=100)
    assert scale.operations(model, 100) == 6 * 1e9 * 200
    assert scale.all_reduce_s(8e9, 4, np.array([1e9]))[0] == pytest.approx(12.0)
    calm = likeliest(jitter=1e-9, hidden=1.0, gpu_life=1e15, volume_read=1e18, peak=1e15, mfu=0.5)
    found = scale.training(calm, model, 10, 1e6, 1_000, generator)
    operations = sum(scale.operations(model, text) for text in scale.STAGES.values())
    assert found["days"][0] * 86400 == pytest.approx(1e6 * operations / 10 / 5e14, rel=1e-3)
    assert found["of ideal"][0] == pytest.approx(1, rel=1e-3)
    twice = scale.training(calm, model, 2_000, 1e6, 1_000, generator)
    assert twice["of ideal"][0] == pytest.approx(0.5, rel=1e-3)  # a thousand faces leave a thousand GPUs idle
    bound = scale.training({**calm, "volume_read": np.array([1e6])}, model, 10, 1e6, 1_000, generator)
    assert bound["days"][0] * 86400 == pytest.approx(3 * 1e6 * 336**2 * 3 / 1e6, rel=1e-3)
    assert bound["draws in which the volume is the limit"][0] == 1
    stored = scale.data(likeliest(stored=1e5), 1e6)
    assert stored["three tables (TB)"][0] == pytest.approx(0.3)


def test_serving_counts_replicas_of_the_busiest_minute(generator: np.random.Generator) -> None:
    found = scale.serving(likeliest(burst=2.0), scale.MODELS[0], 1_000, 0.5, generator)
    assert found["GPUs"][0] == math.ceil(2_000 / found["requests a second and GPU"][0])
    assert 0.5 < found["used share of a GPU"][0] < 1
    hopeless = scale.serving(likeliest(), scale.MODELS[0], 1_000, 0.001, generator)
    assert np.isnan(hopeless["GPUs"][0])
