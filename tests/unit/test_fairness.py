import numpy as np
import pytest
from scipy.stats import binomtest

from facemllm import settings as settings_module
from facemllm.scoring import fairness
from tests.scored import sheet_of

PEOPLE = 120
AGES = ("young", "middle", "old")


@pytest.fixture(scope="module")
def settings():
    return settings_module.load("laptop", ["evaluation.bootstrap=300"])


def asked(people=PEOPLE, images=1):
    """Expressions of people, half of them women, of three ages, some of unknown skin tone."""
    rows, groups = [], {}
    for person in range(people):
        for image in range(images):
            name = f"{person}.{image}"
            rows.append((name, person, "expression", "expression", ("happiness", "sadness", "anger")[person // 6 % 3]))
            groups[name] = {"gender": ("female", "male")[person % 2], "age_band": AGES[person // 2 % 3]}
            if person % 10:
                groups[name]["skin_tone"] = "light"
    return rows, groups


def only(groups, kind):
    return {name: {kind: own[kind]} for name, own in groups.items()}


def answers(rows, right):
    return [row[4] if ok else "fear" for row, ok in zip(rows, right, strict=True)]


def test_a_bias_in_one_group_is_found_and_named(settings):
    rows, groups = asked()
    draw = np.random.default_rng(0)
    old = np.array([groups[row[0]]["age_band"] == "old" for row in rows])
    parsed = answers(rows, np.where(old, draw.random(PEOPLE) < 0.3, draw.random(PEOPLE) < 0.9))
    found = fairness.measure(settings, sheet_of(rows, groups), parsed)["expression"]
    assert set(found) == {
        "gender",
        "age_band",
        "skin_tone",
        "gender x age_band",
        "gender x skin_tone",
        "age_band x skin_tone",
    }
    ages = found["age_band"]
    assert "old" in (ages["largest"]["a"], ages["largest"]["b"])
    assert ages["largest"]["p_holm"] < 0.001
    assert {gap["kind"] for gap in fairness.beyond(found, 0.25)} >= {"age_band"}
    assert all("old" in gap["a"] + gap["b"] for gap in fairness.beyond(found, 0.25))
    assert fairness.beyond(found, 0.9) == []
    for gap in ages["gaps"]:
        assert gap["low"] <= gap["value"] <= gap["high"]
        assert gap["p"] <= gap["p_holm"]
    assert ages["groups"]["old"]["people"] == 40
    assert set(found["gender x age_band"]["groups"]) == {f"{sex} x {age}" for sex in ("female", "male") for age in AGES}


def test_a_group_of_too_few_people_has_no_figure_however_many_pictures(settings):
    rows, groups = asked(people=30, images=9)
    found = fairness.measure(settings, sheet_of(rows, groups), [row[4] for row in rows])["expression"]
    old = found["age_band"]["groups"]["old"]
    assert old == {"value": None, "low": None, "high": None, "n": 90, "people": 10, "unparsed": 0.0, "too_few": True}
    assert found["age_band"]["gaps"] == []
    assert found["age_band"]["largest"] is None
    assert found["skin_tone"]["groups"]["light"]["too_few"] is False
    assert found["skin_tone"]["gaps"] == []  # nobody to compare with


def test_unread_answers_are_counted_by_group_and_wrong(settings):
    rows, groups = asked()
    parsed = [None if groups[row[0]]["gender"] == "male" else row[4] for row in rows]
    found = fairness.measure(settings, sheet_of(rows, groups), parsed)["expression"]["gender"]
    assert found["groups"]["male"]["unparsed"] == 1.0
    assert found["groups"]["male"]["value"] == 0.0
    assert found["groups"]["female"]["unparsed"] == 0.0
    assert abs(found["largest"]["value"]) == 1.0
    assert found["largest"]["p_holm"] == 0.0  # nobody differs within a group: no chance can explain it


def test_nothing_is_said_without_groups(settings):
    rows, _ = asked(12)
    assert fairness.measure(settings, sheet_of(rows), [row[4] for row in rows]) == {"expression": {}}
    rows, groups = asked(12)
    otherwise = [(*row, "unseen") for row in rows]  # nothing asked outright has no figure
    assert fairness.measure(settings, sheet_of(otherwise, groups), [row[4] for row in rows]) == {}


def test_equal_groups_raise_a_false_alarm_no_more_often_than_stated(settings):
    rows, groups = asked(images=2)
    sheet = sheet_of(rows, only(groups, "age_band"))
    settings = settings.model_copy(update={"evaluation": settings.evaluation.model_copy(update={"bootstrap": 200})})
    seeds, found, beyond = 60, 0, 0
    for seed in range(seeds):
        draw = np.random.default_rng(seed)
        able = draw.random(PEOPLE) < 0.7  # both pictures of a person are read alike
        kinds = fairness.measure(settings, sheet, answers(rows, np.repeat(able, 2)))["expression"]
        found += any(gap["p_holm"] < 0.05 for gap in kinds["age_band"]["gaps"])
        beyond += bool(fairness.beyond(kinds, 0.15))
    assert beyond == 0
    assert binomtest(found, seeds, 0.05, alternative="greater").pvalue > 0.01


def test_a_gap_at_the_very_limit_is_refused_at_most_one_time_in_twenty(settings):
    rows, groups = asked()
    sheet = sheet_of(rows, only(groups, "gender"))
    settings = settings.model_copy(update={"evaluation": settings.evaluation.model_copy(update={"bootstrap": 200})})
    male = np.array([groups[row[0]]["gender"] == "male" for row in rows])
    refused = 0
    for seed in range(60):
        draw = np.random.default_rng(1000 + seed)
        kinds = fairness.measure(settings, sheet, answers(rows, draw.random(PEOPLE) < np.where(male, 0.5, 0.75)))
        refused += bool(fairness.beyond(kinds["expression"], 0.25))
    assert binomtest(refused, 60, 0.05, alternative="greater").pvalue > 0.01


def test_classes_that_only_one_group_has_make_no_gap(settings):
    """Nobody of one sex wears earrings; a model that always says no treats both alike on what can be compared."""
    rows, groups = [], {}
    for person in range(PEOPLE):
        woman = person % 2 == 0
        truth = "yes" if woman and person % 4 == 0 else "no"
        rows.append((str(person), person, "attributes", "Wearing_Earrings", truth))
        groups[str(person)] = {"gender": "female" if woman else "male"}
    found = fairness.measure(settings, sheet_of(rows, groups), ["no"] * len(rows))["attributes"]["gender"]
    assert {name: group["value"] for name, group in found["groups"].items()} == {"female": 0.5, "male": 1.0}
    assert found["largest"]["value"] == 0.0


def test_where_groups_are_the_classes_the_gap_is_that_of_their_recalls(settings):
    rows, groups = [], {}
    for person in range(PEOPLE):
        sex = ("female", "male")[person % 2]
        rows.append((str(person), person, "gender", "gender", sex))
        groups[str(person)] = {"gender": sex}
    parsed = ["male" if row[4] == "male" or number % 8 == 0 else "female" for number, row in enumerate(rows)]
    gap = fairness.measure(settings, sheet_of(rows, groups), parsed)["gender"]["gender"]["largest"]
    assert abs(gap["value"]) == 0.25
