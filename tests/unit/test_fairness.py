import numpy as np
import pytest
from scipy.stats import binomtest
from statsmodels.stats.multitest import multipletests

from facemllm.scoring import fairness
from facemllm.settings import load
from tests.scored import sheet_of

PEOPLE = 120
AGES = ("young", "middle", "old")
OVERRIDES = ["evaluate.bootstrap=300"]


@pytest.fixture(scope="module")
def quick():
    return load("laptop", ["evaluate.bootstrap=100"])


def of_women_and_men(task, item, answer):
    """Rows and groups of people of two sexes in turn, `answer(person, sex)` the truth of each."""
    sexes = {person: ("female", "male")[person % 2] for person in range(PEOPLE)}
    rows = [(str(person), person, task, item, answer(person, sex)) for person, sex in sexes.items()]
    return rows, {str(person): {"gender": sex} for person, sex in sexes.items()}


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
    both = {"gender x age_band", "gender x skin_tone", "age_band x skin_tone"}
    assert set(found) == {"gender", "age_band", "skin_tone"} | both
    ages = found["age_band"]
    assert "old" in (ages["largest"]["a"], ages["largest"]["b"])
    assert ages["largest"]["p_holm"] < 0.001
    assert {gap["kind"] for gap in fairness.beyond(fairness.judged(found, 0.25))} >= {"age_band"}
    assert all("old" in gap["a"] + gap["b"] for gap in fairness.beyond(fairness.judged(found, 0.25)))
    assert fairness.beyond(fairness.judged(found, 0.9)) == []
    for gap in ages["gaps"]:
        assert gap["low"] <= gap["value"] <= gap["high"]
        assert gap["p"] <= gap["p_holm"]
    assert ages["groups"]["old"]["people"] == 40
    assert set(found["gender x age_band"]["groups"]) == {f"{sex} x {age}" for sex in ("female", "male") for age in AGES}


def test_a_group_of_too_few_people_has_no_figure_however_many_pictures(settings):
    rows, groups = asked(people=30, images=9)
    found = fairness.measure(settings, sheet_of(rows, groups), [row[4] for row in rows])["expression"]
    ages, nothing = found["age_band"], {"value": None, "low": None, "high": None}
    assert ages["groups"]["old"] == {**nothing, "n": 90, "people": 10, "unreadable": 0.0, "too_few": True}
    assert (ages["gaps"], ages["largest"]) == ([], None)
    assert found["skin_tone"]["groups"]["light"]["too_few"] is False
    assert found["skin_tone"]["gaps"] == []  # nobody to compare with


def test_unread_answers_are_counted_by_group_and_wrong(settings):
    rows, groups = asked()
    parsed = [None if groups[row[0]]["gender"] == "male" else row[4] for row in rows]
    found = fairness.measure(settings, sheet_of(rows, groups), parsed)["expression"]["gender"]
    assert (found["groups"]["male"]["unreadable"], found["groups"]["male"]["value"]) == (1.0, 0.0)
    assert found["groups"]["female"]["unreadable"] == 0.0
    assert abs(found["largest"]["value"]) == 1.0
    assert 0 <= found["largest"]["p_holm"] < 1e-6


def test_nothing_is_said_without_groups(settings):
    rows, groups = asked(12)
    assert fairness.measure(settings, sheet_of(rows), [row[4] for row in rows]) == {"expression": {}}
    otherwise = [(*row, "unseen") for row in rows]  # nothing asked outright has no figure
    assert fairness.measure(settings, sheet_of(otherwise, groups), [row[4] for row in rows]) == {}


def test_equal_groups_raise_a_false_alarm_no_more_often_than_stated(quick):
    rows, groups = asked(images=2)
    sheet = sheet_of(rows, only(groups, "age_band"))
    seeds, found, beyond = 40, 0, 0
    for seed in range(seeds):
        draw = np.random.default_rng(seed)
        able = draw.random(PEOPLE) < 0.7  # both pictures of a person are read alike
        kinds = fairness.measure(quick, sheet, answers(rows, np.repeat(able, 2)))["expression"]
        found += any(gap["p_holm"] < 0.05 for gap in kinds["age_band"]["gaps"])
        beyond += bool(fairness.beyond(fairness.judged(kinds, 0.15)))
    assert beyond == 0
    assert binomtest(found, seeds, 0.05, alternative="greater").pvalue > 0.01


@pytest.mark.parametrize("skill", [0.95, 0.7])
def test_a_small_group_of_a_strong_model_raises_no_false_alarm(quick, skill):
    """Twenty people of whom nobody or one is wrong resample to hardly any error."""
    rows, _ = of_women_and_men("gender", "gender", lambda _, sex: sex)
    sheet = sheet_of(rows, {row[0]: {"skin_tone": "dark" if row[1] < 20 else "light"} for row in rows})
    alarms = found = 0
    for seed in range(25):
        for less in (0.0, 0.4):
            odds = np.where(np.arange(PEOPLE) < 20, skill - less, skill)
            right = np.random.default_rng(seed).random(PEOPLE) < odds
            (gap,) = fairness.measure(quick, sheet, answers(rows, right))["gender"]["skin_tone"]["gaps"]
            shown = gap["p_holm"] < 0.05
            assert shown == (not gap["low"] <= 0 <= gap["high"])  # one pair: the interval is that of its test
            alarms, found = alarms + (shown and not less), found + (shown and bool(less))
    assert binomtest(alarms, 25, 0.05, alternative="greater").pvalue > 0.01
    assert found >= 20  # a bias of forty points is seen four times in five


def test_rare_classes_raise_no_false_alarm(quick):
    """Of thirty people in each group one or two have an attribute; whether they are told makes half of its figure."""
    items = ("Bangs", "Wearing_Hat", "Wearing_Earrings", "Wearing_Lipstick")
    alarms = 0
    for seed in range(80):
        draw = np.random.default_rng(seed)
        truth = draw.random((60, len(items))) < 0.05
        answered = draw.random(truth.shape) < np.where(truth, 0.7, 0.97)
        rows, parsed = [], []
        for person, column in np.ndindex(truth.shape):
            here = bool(truth[person, column])
            rows.append((str(person), person, "attributes", items[column], "yes" if here else "no"))
            parsed.append("yes" if here == answered[person, column] else "no")
        groups = {str(person): {"gender": ("female", "male")[person % 2]} for person in range(60)}
        gaps = fairness.measure(quick, sheet_of(rows, groups), parsed)["attributes"]["gender"]["gaps"]
        alarms += gaps[0]["p_holm"] < 0.05
    assert binomtest(alarms, 80, 0.05, alternative="greater").pvalue > 0.01


def test_people_who_are_all_alike_in_each_group_are_told_apart(settings):
    """Nobody differs within a group, so that no resample does; women are told a year too many, men nine."""
    rows, groups = of_women_and_men("age", "age", lambda *_: "30")

    def figures(*said):
        parsed = [said[person % 2] for person in range(PEOPLE)]
        return fairness.measure(settings, sheet_of(rows, groups), parsed)["age"]

    kinds = figures("31", "39")
    assert kinds["gender"]["largest"]["value"] == -8
    assert kinds["gender"]["largest"]["p_holm"] < 1e-6
    assert len(fairness.beyond(fairness.judged(kinds, 1))) == 1
    largest = figures("31", "31")["gender"]["largest"]
    assert (largest["value"], largest["p_holm"], largest["minimum_detectable_difference"]) == (0, 1, None)


@pytest.mark.parametrize("readable", [0, 3])
def test_groups_of_which_little_can_be_read_are_not_compared(settings, readable):
    """As zero-shot answers of a tiny model: they would count among the comparisons, and in Holm's correction."""
    rows, groups = asked()
    rows += [(name, person, "gender", "gender", groups[name]["gender"]) for name, person, *_ in rows]
    parsed = [row[4] if (row[2] == "gender" and row[1] % 7) or row[1] < readable else None for row in rows]
    found = fairness.measure(settings, sheet_of(rows, groups), parsed)
    assert all(entry["gaps"] == [] and entry["largest"] is None for entry in found["expression"].values())
    assert found["expression"]["gender"]["groups"]["male"]["unreadable"] > 0.9
    alone = fairness.measure(settings, sheet_of(rows[PEOPLE:], groups), parsed[PEOPLE:])
    assert found["gender"] == alone["gender"]


def test_p_values_are_corrected_for_all_gaps_of_the_evaluation(settings):
    rows, groups = asked()
    rows += [(name, person, "gender", "gender", groups[name]["gender"]) for name, person, *_ in rows]
    draw = np.random.default_rng(3)
    parsed = answers(rows, draw.random(len(rows)) < 0.8)
    found = fairness.measure(settings, sheet_of(rows, groups), parsed)
    gaps = [gap for kinds in found.values() for entry in kinds.values() for gap in entry["gaps"]]
    assert len(found) == 2
    p_values = [gap["p"] for gap in gaps]
    assert [gap["p_holm"] for gap in gaps] == pytest.approx(multipletests(p_values, method="holm")[1], abs=1e-9)
    least = min(gaps, key=lambda gap: gap["p"])
    assert least["p_holm"] == pytest.approx(min(1, len(gaps) * least["p"]))
    for entry in (entry for kinds in found.values() for entry in kinds.values() if entry["gaps"]):
        assert entry["largest"]["p_holm"] in [gap["p_holm"] for gap in entry["gaps"]]


def test_what_exceeds_a_limit_is_corrected_for_all_gaps_of_the_task(settings):
    """A gap that passes the limit alone does not among twelve others of another kind."""

    def kind(*gaps):
        groups = {name: {"people": 100} for a, b, _ in gaps for name in (a, b)}
        test = {"error": 0.05, "own_error": 0.05, "degrees": 99, "growth": [0, 0], "p": 0.5}
        return {"groups": groups, "gaps": [{"a": a, "b": b, "value": value, **test} for a, b, value in gaps]}

    alone = {"gender": kind(("female", "male", 0.36))}
    assert [gap["p_holm"] for gap in fairness.beyond(fairness.judged(alone, 0.25))] == [pytest.approx(0.0302, abs=1e-3)]
    many = {**alone, "age_band": kind(*[(f"a{n}", f"b{n}", 0.26) for n in range(12)])}
    assert fairness.beyond(fairness.judged(many, 0.25)) == []
    clear = {**many, "gender": kind(("female", "male", 0.6))}
    assert [(gap["kind"], gap["a"]) for gap in fairness.beyond(fairness.judged(clear, 0.25))] == [("gender", "female")]


def test_a_gap_at_the_very_limit_is_refused_at_most_one_time_in_twenty(quick):
    rows, groups = asked()
    sheet = sheet_of(rows, only(groups, "gender"))
    male = np.array([groups[row[0]]["gender"] == "male" for row in rows])
    refused = 0
    for seed in range(40):
        draw = np.random.default_rng(1000 + seed)
        kinds = fairness.measure(quick, sheet, answers(rows, draw.random(PEOPLE) < np.where(male, 0.5, 0.75)))
        refused += bool(fairness.beyond(fairness.judged(kinds["expression"], 0.25)))
    assert binomtest(refused, 40, 0.05, alternative="greater").pvalue > 0.01


def test_classes_that_only_one_group_has_make_no_gap(settings):
    """Nobody of one sex wears earrings; a model that always says no treats both alike on what can be compared."""
    rows, groups = of_women_and_men("attributes", "Wearing_Earrings", lambda person, _: ("no", "yes")[person % 4 == 0])
    found = fairness.measure(settings, sheet_of(rows, groups), ["no"] * len(rows))["attributes"]["gender"]
    assert {name: group["value"] for name, group in found["groups"].items()} == {"female": 0.5, "male": 1.0}
    assert found["largest"]["value"] == 0.0


def test_where_groups_are_the_classes_the_gap_is_that_of_their_recalls(settings):
    rows, groups = of_women_and_men("gender", "gender", lambda _, sex: sex)
    parsed = ["male" if row[4] == "male" or number % 8 == 0 else "female" for number, row in enumerate(rows)]
    gap = fairness.measure(settings, sheet_of(rows, groups), parsed)["gender"]["gender"]["largest"]
    assert abs(gap["value"]) == 0.25
