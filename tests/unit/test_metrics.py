from typing import get_args

import numpy as np
import pytest
from sklearn import metrics as sklearn
from sklearn.preprocessing import MultiLabelBinarizer

from facemllm import tasks
from facemllm.scoring import metrics
from facemllm.scoring.sheet import Answers
from facemllm.scoring.summary import CELEBA_TASKS, summarise
from facemllm.tables.schemas import CELEBA
from facemllm.tasks.base import Metric
from tests.scored import sheet_of

DRAW = np.random.default_rng(0)


def figure(metric, answers, parsed, grid=()):
    known = metrics.get(metric)
    return float(known.value(known.columns(answers, parsed, grid).sum(0, keepdims=True))[0])


@pytest.mark.filterwarnings("ignore:y_pred contains classes")
@pytest.mark.parametrize("classes", [["yes", "no"], ["a", "b", "c", "d", "never_true"]])
def test_accuracies_agree_with_scikit_learn(classes):
    truth = DRAW.choice(classes[:4], 300).tolist()
    said = DRAW.choice(classes, 300).tolist()
    assert figure("accuracy", truth, said) == pytest.approx(sklearn.accuracy_score(truth, said), abs=1e-12)
    # classes are those of the truth, as scikit-learn has it
    assert figure("balanced_accuracy", truth, said) == pytest.approx(
        sklearn.balanced_accuracy_score(truth, said), abs=1e-12
    )


def test_mean_absolute_error_agrees_with_scikit_learn():
    truth, said = DRAW.uniform(0, 90, 200), DRAW.uniform(0, 90, 200)
    found = figure("mae", [repr(float(x)) for x in truth], [repr(float(x)) for x in said], [0, 90])
    assert found == pytest.approx(sklearn.mean_absolute_error(truth, said), abs=1e-9)
    close = figure("within_5", [repr(float(x)) for x in truth], [repr(float(x)) for x in said])
    assert close == pytest.approx(np.mean(abs(truth - said) <= 5), abs=1e-12)


def test_fact_f1_agrees_with_scikit_learn():
    names = [f"k{i}=v" for i in range(8)]
    sets = [[{n for n in names if DRAW.random() < 0.4} for _ in range(60)] for _ in range(2)]
    coder = MultiLabelBinarizer(classes=names)
    coded = [coder.fit_transform(side) for side in sets]
    stated = [[";".join(sorted(s)) for s in side] for side in sets]
    for metric, expected in (
        ("fact_f1", sklearn.f1_score),
        ("precision", sklearn.precision_score),
        ("recall", sklearn.recall_score),
    ):
        assert figure(metric, *stated) == pytest.approx(expected(*coded, average="micro"), abs=1e-12)


def test_f1_of_units_agrees_with_scikit_learn_and_an_unreadable_answer_is_a_miss_or_a_false_alarm():
    truth = DRAW.choice(["yes", "no"], 300).tolist()
    said = [None if DRAW.random() < 0.1 else str(DRAW.choice(["yes", "no"])) for _ in truth]
    wrong = {"yes": "no", "no": "yes"}
    read = [text or wrong[true] for true, text in zip(truth, said, strict=True)]
    assert figure("f1", truth, said) == pytest.approx(sklearn.f1_score(truth, read, pos_label="yes"), abs=1e-12)
    assert figure("f1", ["yes", "yes", "no", "no"], ["yes", None, None, "no"]) == 0.5  # 2 / (2 + 1 + 1)
    assert np.isnan(figure("f1", ["no"], ["no"]))  # nothing to find, nothing found


def test_an_unreadable_answer_is_wrong_and_a_number_takes_the_worst_error_on_the_grid():
    assert figure("accuracy", ["yes", "no"], [None, "no"]) == 0.5
    assert figure("balanced_accuracy", ["yes", "no", "no"], [None, "no", "no"]) == 0.5
    assert figure("fact_f1", ["a=1;b=2"], [None]) == 0.0
    # from 10 the far end of 0..90 is 80 away, from 70 it is 70
    assert metrics.errors(["10", "70"], [None, None], [0, 45, 90]).tolist() == [80, 70]
    assert metrics.errors(["10", "10", "10"], ["nan", "inf", "old"], [0, 90]).tolist() == [80, 80, 80]
    with pytest.raises(ValueError, match="unknown metric"):
        metrics.get("auc")


def test_every_metric_that_a_task_may_name_is_known_with_its_direction_and_its_baseline():
    for name in get_args(Metric):
        found = metrics.get(name)
        assert found.name == name
        assert found.constant is not None
        beside = {other for other in found.also if metrics.get(other).constant is None}
        assert beside <= {"within_5", "precision", "recall"}
    assert metrics.also(tasks.get("age")) == ("within_5",)
    assert metrics.also(tasks.get("action_unit_intensity")) == ()  # five grades are all there are
    assert [metrics.label(name) for name in ("mae", "by_likelihood")] == ["mean error", "by likelihood"]


def test_constant_answers_are_the_best_there_are():
    def constant(metric, answers):
        return metrics.get(metric).constant(answers)

    assert constant("accuracy", ["b", "a", "b", "a", "c"]) == "a"  # ties fall to the first by name
    assert float(constant("mae", ["1", "2", "50"])) == 2
    assert constant("f1", ["no"] * 9 + ["yes"]) == "yes"  # F1 2/11; "no" has none
    stated = ["gender=male;hat=yes", "gender=male", "gender=male", "gender=female", "gender=female;rare=yes"]
    assert metrics.facts(constant("fact_f1", stated)) == {"gender=male"}
    draw = np.random.default_rng(3)
    stated = [
        ";".join(f"k{k}={'x' if draw.random() < 0.7 else 'y'}" for k in range(6) if draw.random() < (k + 1) / 7)
        for _ in range(200)
    ]
    # no other prefix, no single fact more or less, is a better constant

    def f1(said):
        shared = sum(len(metrics.facts(text) & said) for text in stated)
        return 2 * shared / sum(len(metrics.facts(text)) + len(said) for text in stated)

    best = metrics.facts(constant("fact_f1", stated))
    everything = {fact for text in stated for fact in metrics.facts(text)}
    assert all(f1(best ^ {fact}) <= f1(best) for fact in everything)


def test_sums_are_exact_in_any_order():
    values = metrics.exact(DRAW.uniform(0, 90, 10_000))
    assert values.sum() == values[::-1].sum() == np.sort(values).sum()
    assert abs(values - np.round(values, 9)).max() < 1e-9


def test_a_table_worked_out_by_hand():
    rows = [
        ("i0", 0, "attributes", "Bangs", "yes"),
        ("i1", 1, "attributes", "Bangs", "no"),
        ("i2", 2, "attributes", "Bangs", "no"),
        ("i0", 0, "attributes", "Wearing_Hat", "no"),
        ("i1", 1, "attributes", "Wearing_Hat", "yes"),
        ("i0", 0, "expression", "expression", "fear"),
        ("i1", 1, "expression", "expression", "fear"),
        ("i2", 2, "expression", "expression", "anger"),
        ("i0", 0, "head_pose", "yaw", "10.0"),
        ("i1", 1, "head_pose", "roll", "-5.0"),
    ]
    parsed = ["yes", "no", None, "no", "no", "fear", "anger", "anger", "13.0", None]
    baseline = ["no"] * 5 + ["fear"] * 3 + ["0", "0"]
    found = summarise(sheet_of(rows), Answers.of(parsed), {"constant": baseline}, resamples=200, seed=0)
    attributes, expression, pose = (found["tasks"][name] for name in ("attributes", "expression", "head_pose"))
    assert attributes["items"]["Bangs"]["value"] == 0.75  # recalls 1 and 1/2
    assert attributes["items"]["Wearing_Hat"]["value"] == 0.5
    assert (attributes["value"], attributes["unreadable"], attributes["n"]) == (0.625, 0.2, 5)
    assert attributes["refused"] == 0.0
    assert attributes["baselines"] == {"constant": 0.5}
    assert attributes["also"]["accuracy"]["value"] == pytest.approx((2 / 3 + 1 / 2) / 2, abs=1e-12)  # mean of items
    assert attributes["items"]["Bangs"]["also"]["accuracy"]["value"] == pytest.approx(2 / 3, abs=1e-12)
    assert expression["metric"] == "accuracy"
    assert expression["value"] == pytest.approx(2 / 3, abs=1e-12)
    assert expression["items"]["balanced_accuracy"]["value"] == 0.75
    assert expression["also"]["balanced_accuracy"]["value"] == 0.75
    assert expression["baselines"]["constant"] == pytest.approx(2 / 3, abs=1e-12)
    items = {name: item["value"] for name, item in pose["items"].items()}
    assert items == {"yaw": 3.0, "roll": 25.0}  # unreadable: from -5 to the far end of -20..20
    assert (pose["value"], pose["also"]["within_5"]["value"]) == (14.0, 0.5)
    assert (pose["unit"], pose["higher_is_better"]) == ("degrees", False)
    # closed questions: Bangs .75, Wearing_Hat .5, expression .75
    assert found["closed_mean"]["value"] == pytest.approx(2 / 3, abs=1e-12)
    # yaw is asked of one person: the bootstrap knows nothing about people
    assert pose["items"]["yaw"]["low"] is None
    assert attributes["low"] <= attributes["value"] <= attributes["high"]


def test_single_item_tasks_have_no_items_and_no_closed_mean_without_choices():
    rows = [("a", 0, "age", "age", "30.0"), ("b", 1, "age", "age", "40.0")]
    found = summarise(sheet_of(rows), Answers.of(["31", "40"]), {}, 100, 0)
    assert (found["tasks"]["age"]["value"], found["tasks"]["age"]["items"]) == (0.5, {})
    assert found["closed_mean"] is None


def test_attributes_held_out_of_training_stay_out_of_the_closed_mean_and_other_ways_out_of_all_figures():
    rows = [
        ("a", 0, "attributes", "Bangs", "yes"),
        ("b", 1, "attributes", "Bangs", "no"),
        ("a", 0, "zero_shot", "Wearing_Earrings", "yes"),
        ("b", 1, "zero_shot", "Wearing_Earrings", "no"),
        ("a", 0, "attributes", "Bangs", "true", "statement", "yes"),
        ("b", 1, "attributes", "Bangs", "no", "unseen"),
    ]
    parsed = ["yes", "no", "no", "no", "false", "yes"]
    chance = ["no", "no", "yes", "yes", None, None]
    baselines = {"constant": chance, "pixels": chance[:2] + [None] * 4}
    found = summarise(sheet_of(rows), Answers.of(parsed), baselines, 100, 0)
    assert found["closed_mean"]["value"] == found["tasks"]["attributes"]["value"] == 1.0
    assert found["tasks"]["zero_shot"]["value"] == 0.5
    assert found["tasks"]["zero_shot"]["baselines"] == {"constant": 0.5, "pixels": None}
    assert found["tasks"]["attributes"]["n"] == 2


def test_celebas_forty_have_their_mean_accuracy_where_all_are_asked():
    draw = np.random.default_rng(2)
    rows = [
        (f"i{i}", i, task, name, "yes" if draw.random() < 0.2 else "no")
        for i in range(30)
        for name in CELEBA
        for task in CELEBA_TASKS
        if tasks.get(task).find(name)
    ]
    parsed = [row[4] if draw.random() < 0.9 else None for row in rows]
    found = summarise(sheet_of(rows), Answers.of(parsed), {}, 100, 0)
    right = [row[4] == said for row, said in zip(rows, parsed, strict=True)]
    assert found["celeba_40"]["accuracy"]["value"] == pytest.approx(np.mean(right), abs=1e-9)
    assert found["celeba_40"]["accuracy"]["low"] < np.mean(right) < found["celeba_40"]["accuracy"]["high"]
    assert summarise(sheet_of(rows[1::40]), Answers.of(parsed[1::40]), {}, 100, 0)["celeba_40"] is None


def test_the_power_note_is_that_of_a_paired_difference_seen_four_times_in_five():
    rows = [(i, i, "gender", "gender", "female" if i % 2 else "male") for i in range(400)]
    right = np.random.default_rng(4).random(400) < 0.8
    said = [row[4] if ok else "other" for ok, row in zip(right, rows, strict=True)]
    one = summarise(sheet_of(rows), Answers.of(said), {}, 1000, 0)["tasks"]["gender"]
    # by hand: sqrt(0.8 * 0.2 / 400) = 0.02, times 1.96 + 0.84
    assert one["minimum_detectable_difference"] == pytest.approx(2.8 * 0.02, rel=0.12)


def test_clears_constant_both_ways():
    figure = {"low": 0.6, "high": 0.7, "higher_is_better": True, "baselines": {"constant": 0.5}}
    assert metrics.clears_constant(figure)
    for change in ({"low": 0.5}, {"low": None}, {"baselines": {}}):
        assert not metrics.clears_constant(figure | change)
    errors = {"low": 3.0, "high": 4.0, "higher_is_better": False, "baselines": {"constant": 5.0}}
    assert metrics.clears_constant(errors)
    assert not metrics.clears_constant({**errors, "high": 5.5})
