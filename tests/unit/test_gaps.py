"""The test of a gap between groups of people: its size, its power, and a permutation test beside it."""

import numpy as np
import pytest
from scipy.stats import ttest_ind

from benchmarks.fairness_power import GAPS, KINDS, PICTURES, detectable, drawn, shown, weights
from facemllm.scoring import fairness, metrics, stats
from facemllm.scoring.gaps import Memberships, measure
from facemllm.tasks import all_names, get

DRAWS = 1000  # two standard errors of a share of .05: .014


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("people", [(40, 40), (30, 120)])
def test_where_no_group_is_worse_a_gap_is_shown_one_time_in_twenty(kind, people):
    assert 0.03 <= shown(drawn(kind, DRAWS, *people, seed=1)).mean() <= 0.07


@pytest.mark.parametrize("kind", KINDS)
def test_an_injected_gap_is_shown_the_more_often_the_larger_it_is_and_the_more_people_there_are(kind):
    power = [[shown(drawn(kind, 200, people, people, gap, seed=2)).mean() for gap in GAPS] for people in (40, 80, 160)]
    assert (np.diff(power, axis=0) > -0.05).all()
    assert (np.diff(power, axis=1) > -0.05).all()
    if kind != "error in units":  # there a gap is 10 to 20 % of the error
        assert power[0][2] > 0.7
        assert power[2][0] > 0.8


@pytest.mark.parametrize("kind", KINDS)
def test_a_gap_of_the_minimum_detectable_difference_is_shown_four_times_in_five(kind):
    size = detectable(kind, drawn(kind, 300, 80, 80))
    at_it = drawn(kind, DRAWS, 80, 80, size / (8 if kind == "error in units" else 1), seed=3)
    assert 0.72 <= shown(at_it).mean() <= 0.87


def held_against(allowed, kind, gap):
    """What the gate makes of each draw, were its gap the task's only one."""
    growth = gap.growth(share=kind != "error in units").T
    for value, error, own_error, df, grown in zip(
        gap.value, gap.error, gap.own_error, gap.degrees, growth, strict=True
    ):
        test = {"error": error, "own_error": own_error, "degrees": df, "growth": grown, "value": value}
        entry = {"groups": {}, "gaps": [{**test, "a": "a", "b": "b", "p": stats.p_value(value, error, df)}]}
        yield fairness.judged({"gender": entry}, allowed)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_gap_of_the_minimum_refused_gap_is_refused_four_times_in_five(kind):
    unit = 8 if kind == "error in units" else 1
    allowed = 0.1 * unit
    none = held_against(allowed, kind, drawn(kind, 300, 80, 80))
    size = np.mean([one["minimum_refused_gap"] for one in none])
    assert size > allowed
    at_it = held_against(allowed, kind, drawn(kind, DRAWS, 80, 80, size / unit, seed=3))
    assert 0.72 <= np.mean([one["p"] < 0.05 for one in at_it]) <= 0.87


@pytest.mark.parametrize("kind", KINDS)
def test_p_is_that_of_a_permutation_test(kind):
    """Labels shuffled among people, studentised: how often a gap is as sure as the one at hand."""
    random = np.random.default_rng(4)
    for gap in (0.0, 0.06):
        first, draws = np.arange(90) < 30, 2000
        num_NK, den_NK = KINDS[kind](random, np.where(first, gap, 0.0))
        labels = random.permuted(np.broadcast_to(first, (draws, 90)), axis=1)
        labels[0] = first
        asked = [(den_NK * side[..., None]).any(-2) for side in (labels, ~labels)]
        shape = (*labels.shape, num_NK.shape[-1])
        of = Memberships(
            np.broadcast_to(num_NK, shape), np.broadcast_to(den_NK, shape), labels, np.full(labels.shape, PICTURES)
        )
        found = measure(of, weights(kind, asked[0] & asked[1]))
        sure = abs(found.value / found.error)
        p = stats.p_value(found.value[0], found.error[0], found.degrees[0])
        more, alike = sure > sure[0] + 1e-9, abs(sure - sure[0]) <= 1e-9  # few shares are possible: ties count half
        assert p == pytest.approx(more.mean() + alike.mean() / 2, abs=0.03)


def one(values, first, pictures=None, people=None):
    """A gap of a single quotient of values by one."""
    values, first = np.asarray(values, dtype=float)[:, None], np.asarray(first)
    pictures = np.ones(len(values), dtype=int) if pictures is None else np.asarray(pictures)
    den = pictures[:, None].astype(float)
    return measure(Memberships(values * den, den, first, pictures, people), np.ones(1))


def test_about_what_is_seen_the_error_is_that_of_students_t_test():
    values = np.random.default_rng(0).normal(size=50)
    found, inside = one(values, np.arange(50) < 20), np.arange(50) < 20
    expected = ttest_ind(values[inside], values[~inside])
    assert abs(found.value / found.own_error) == pytest.approx(abs(expected.statistic), rel=0.01)


def test_a_small_group_in_which_nobody_is_wrong_is_not_sure_of_it():
    """Twenty people all right beside a hundred of whom five are not: three such test sets in ten have this gap."""
    found = one(np.arange(120) >= 5, np.arange(120) >= 100)
    assert float(found.value) == pytest.approx(0.05)
    assert stats.p_value(float(found.value), float(found.error), float(found.degrees)) > 0.2
    none = one(np.ones(40), np.arange(40) < 20)
    assert (float(none.value), float(none.error)) == (0.0, 0.0)


def test_a_group_of_many_pictures_a_person_is_as_unsure_as_its_own_people():
    random, draws = np.random.default_rng(5), DRAWS
    first = np.broadcast_to(np.arange(120) < 40, (draws, 120))
    for many in (True, False):
        pictures = np.where(first == many, 6, 1)
        right = random.binomial(pictures, random.beta(2, 1, first.shape)).astype(float)
        den = pictures[..., None].astype(float)
        found = measure(Memberships(right[..., None], den, first, pictures), np.ones(1))
        assert 0.03 <= shown(found).mean() <= 0.075


def test_who_is_in_both_groups_counts_once():
    """The same people twice: whoever is read badly is so in both, and no chance is left."""
    right = np.random.default_rng(0).random(30) < 0.7
    first, twice = np.arange(60) < 30, np.stack([np.arange(30), np.arange(30, 60)])
    apart = np.concatenate([right, right])
    apart[[0, 40, 50]] ^= True
    both, alone = one(apart, first, people=twice), one(apart, first)
    assert float(both.value) == float(alone.value)
    assert float(both.error) < 0.5 * float(alone.error)
    assert float(one(np.concatenate([right, right]), first, people=twice).error) == pytest.approx(0, abs=1e-9)


def test_every_metric_that_a_task_names_is_a_quotient_or_a_mean_over_classes():
    for name in all_names():
        metric = metrics.of(get(name))
        metric = metric.of_class or metric
        assert metric.terms is not None
        facts = metric.answers == "facts" or metric.name == "f1"
        sums = np.random.default_rng(0).integers(1, 9, (5, 2 + facts)).astype(float)
        assert metrics.ratio(*metric.terms(sums)) == pytest.approx(metric.value(sums))
