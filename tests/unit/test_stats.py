import math

import numpy as np
import pytest
from scipy.stats import ttest_1samp
from statsmodels.stats.multitest import multipletests

from facemllm.scoring import metrics, stats


def sums_of(right: np.ndarray, subjects: np.ndarray) -> stats.Sums:
    columns = np.stack([right, np.ones_like(right)], axis=1)
    return stats.Sums(metrics.ACCURACY, stats.by_subject(subjects, columns, subjects.max() + 1))


def interval_of(right: np.ndarray, subjects: np.ndarray, resamples: int, seed: int) -> stats.Interval:
    return stats.interval(stats.replicate({"a": sums_of(right, subjects)}, resamples, seed)["a"])


def test_rows_are_summed_into_their_people_and_a_mean_leaves_out_undefined_figures_per_resample():
    found = stats.by_subject(np.array([1, 0, 1, 3]), [[1, 10], [2, 20], [3, 30], [4, 40]], 4)
    assert found.tolist() == [[2, 20], [4, 40], [0, 0], [4, 40]]
    found = metrics.mean([np.array([1.0, np.nan, np.nan]), np.array([0.0, 0.5, np.nan])])
    assert (found[0], found[1]) == (0.5, 0.5)
    assert np.isnan(found[2])


def test_equals_a_naive_bootstrap_over_people():
    draw = np.random.default_rng(5)
    subjects = np.repeat(np.arange(40), draw.integers(1, 6, 40))
    ability = draw.random(40)
    right = (draw.random(len(subjects)) < ability[subjects]).astype(float)
    classes = draw.integers(0, 3, len(subjects))
    asked = np.eye(3)[classes]
    columns = np.stack([asked * right[:, None], asked], axis=2).reshape(len(right), -1)
    figures = {
        "plain": sums_of(right, subjects),
        "balanced": stats.Sums(metrics.BALANCED_ACCURACY, stats.by_subject(subjects, columns, 40)),
    }
    fast = stats.replicate(figures, 4000, seed=1)

    naive: dict[str, list[float]] = {"plain": [], "balanced": []}
    for _ in range(2000):
        rows = np.concatenate([np.flatnonzero(subjects == person) for person in draw.integers(0, 40, 40)])
        naive["plain"].append(right[rows].mean())
        recalls = [right[rows][classes[rows] == c].mean() for c in range(3) if (classes[rows] == c).any()]
        naive["balanced"].append(float(np.mean(recalls)))
    assert fast["plain"][0] == pytest.approx(right.mean(), abs=1e-12)
    for name, values in naive.items():
        found = stats.interval(fast[name])
        assert (found.low, found.high) == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=0.012)


def test_interval_of_alike_images_is_that_of_people_not_of_images():
    draw = np.random.default_rng(0)
    per_person = draw.integers(0, 2, 60).astype(float)
    once = interval_of(per_person, np.arange(60), 2000, 0)
    copied = interval_of(np.repeat(per_person, 10), np.repeat(np.arange(60), 10), 2000, 0)
    assert copied == once  # ten copies of each image bring no certainty


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    draw = np.random.default_rng(2)
    covered = 0
    for trial in range(200):
        ability = draw.beta(4, 2, 80)  # mean 2/3
        right = (draw.random((80, 3)) < ability[:, None]).astype(float).reshape(-1)
        found = interval_of(right, np.repeat(np.arange(80), 3), 300, trial)
        covered += found.low <= 2 / 3 <= found.high
    assert 0.90 <= covered / 200 <= 0.98


def test_depends_on_the_seed_alone_and_not_on_blocks(monkeypatch):
    figure = {"a": sums_of(np.random.default_rng(0).integers(0, 2, 50).astype(float), np.arange(50))}
    whole = stats.replicate(figure, 500, seed=3)["a"]
    assert np.array_equal(whole, stats.replicate(figure, 500, seed=3)["a"])
    assert not np.array_equal(whole, stats.replicate(figure, 500, seed=4)["a"])
    monkeypatch.setattr(stats, "_BLOCK", 50 * 7)
    assert np.array_equal(whole, stats.replicate(figure, 500, seed=3)["a"])


def test_paired_difference_is_narrower_than_unpaired():
    draw = np.random.default_rng(1)
    ability = draw.random(200)
    first = (draw.random(200) < ability).astype(float)
    second = first.copy()
    second[:6] = 1 - second[:6]
    people = np.arange(200)
    a, b = (stats.replicate({"a": sums_of(right, people)}, 2000, 0)["a"] for right in (first, second))
    other = stats.replicate({"a": sums_of(second, people)}, 2000, 9)["a"]
    paired, unpaired = stats.interval(a - b), stats.interval(a - other)
    assert paired.value == pytest.approx(first.mean() - second.mean())
    assert paired.high - paired.low < 0.4 * (unpaired.high - unpaired.low)
    assert np.all(stats.replicate({"a": sums_of(first, people)}, 100, 0)["a"] - a[:101] == 0)


def test_one_person_gives_no_interval_and_nothing_gives_nothing():
    found = interval_of(np.array([1.0, 0.0]), np.array([0, 0]), 100, 0)
    assert found.value == 0.5
    assert np.isnan([found.low, found.high]).all()
    assert stats.replicate({}, 100, 0) == {}


def test_p_values_are_those_of_a_t_test_and_of_holm():
    draw = np.random.default_rng(0)
    gaps = draw.normal(0.05, 0.3, 60)
    expected = ttest_1samp(gaps, 0.0).pvalue
    error = gaps.std(ddof=1) / np.sqrt(60)
    for value in (gaps.mean(), -gaps.mean()):
        assert stats.p_value(value, error, 59) == pytest.approx(expected, abs=1e-12)
    assert math.isnan(stats.p_value(0.1, 0.0, 59))  # people who do not differ say nothing about chance
    assert stats.p_value(0.0, 0.0, 59) == 1.0
    assert np.isnan(stats.p_value(0.1, 0.1, 0))
    p_values = draw.random(9) ** 3
    assert stats.holm(p_values) == pytest.approx(list(multipletests(p_values, method="holm")[1]), abs=1e-12)
    found = stats.holm([0.01, float("nan"), 0.04, 0.03])
    assert found[:1] + found[2:] == pytest.approx([0.03, 0.06, 0.06])
    assert np.isnan(found[1])
    assert stats.holm([]) == []


def test_the_smallest_difference_is_found_four_times_in_five():
    draw = np.random.default_rng(1)
    error = 0.02
    least = stats.minimum_detectable_difference(error)
    found = [stats.p_value(draw.normal(least, error), error, 10_000) < 0.05 for _ in range(4000)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.02)
