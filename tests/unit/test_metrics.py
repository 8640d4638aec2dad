import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, mean_absolute_error
from sklearn.preprocessing import MultiLabelBinarizer

from facemllm import tasks
from facemllm.scoring import metrics, stats

DRAW = np.random.default_rng(0)


def figure(metric, answers, parsed, grid=()):
    totals = metrics.columns(metric, answers, parsed, grid).sum(0, keepdims=True)
    return float(stats.of_totals(metric, totals)[0])


def sheet_of(rows, split="test"):
    """A sheet from (sample, person, task, item, answer) tuples."""
    places: dict[tuple[str, str], list[int]] = {}
    for place, (_, _, task, item, _) in enumerate(rows):
        places.setdefault((task, item), []).append(place)
    questions = {(t, q.item): q for t in tasks.all_names() for q in tasks.get(t).questions()}
    return metrics.Sheet(
        split=split,
        sample_ids=[row[0] for row in rows],
        image_ids=[f"image-{row[0]}" for row in rows],
        answers=[row[4] for row in rows],
        subjects=np.array([row[1] for row in rows]),
        rows={key: np.array(where) for key, where in sorted(places.items())},
        questions={key: questions[key] for key in places},
    )


@pytest.mark.filterwarnings("ignore:y_pred contains classes")
@pytest.mark.parametrize("classes", [["yes", "no"], ["a", "b", "c", "d", "never_true"]])
def test_accuracies_agree_with_scikit_learn(classes):
    truth = DRAW.choice(classes[:4], 300).tolist()
    said = DRAW.choice(classes, 300).tolist()
    assert figure("accuracy", truth, said) == pytest.approx(accuracy_score(truth, said), abs=1e-12)
    # classes are those of the truth, as scikit-learn has it
    assert figure("balanced_accuracy", truth, said) == pytest.approx(balanced_accuracy_score(truth, said), abs=1e-12)


def test_mean_absolute_error_agrees_with_scikit_learn():
    truth, said = DRAW.uniform(0, 90, 200), DRAW.uniform(0, 90, 200)
    found = figure("mae", [repr(float(x)) for x in truth], [repr(float(x)) for x in said], [0, 90])
    assert found == pytest.approx(mean_absolute_error(truth, said), abs=1e-12)


def test_fact_f1_agrees_with_scikit_learn():
    names = [f"k{i}=v" for i in range(8)]
    sets = [[{n for n in names if DRAW.random() < 0.4} for _ in range(60)] for _ in range(2)]
    coder = MultiLabelBinarizer(classes=names)
    expected = f1_score(coder.fit_transform(sets[0]), coder.fit_transform(sets[1]), average="micro")
    found = figure("fact_f1", *[[";".join(sorted(s)) for s in side] for side in sets])
    assert found == pytest.approx(expected, abs=1e-12)


def test_an_unreadable_answer_is_wrong_and_a_number_takes_the_worst_error_on_the_grid():
    assert figure("accuracy", ["yes", "no"], [None, "no"]) == 0.5
    assert figure("balanced_accuracy", ["yes", "no", "no"], [None, "no", "no"]) == 0.5
    assert figure("fact_f1", ["a=1;b=2"], [None]) == 0.0
    # from 10 the far end of 0..90 is 80 away, from 70 it is 70
    assert metrics.errors(["10", "70"], [None, None], [0, 45, 90]).tolist() == [80, 70]
    assert metrics.errors(["10", "10", "10"], ["nan", "inf", "old"], [0, 90]).tolist() == [80, 80, 80]
    with pytest.raises(ValueError, match="unknown metric"):
        metrics.columns("auc", ["a"], ["a"])


def test_a_table_worked_out_by_hand():
    rows = [
        ("s0", 0, "attributes", "Bangs", "yes"),
        ("s1", 1, "attributes", "Bangs", "no"),
        ("s2", 2, "attributes", "Bangs", "no"),
        ("s3", 0, "attributes", "Wearing_Hat", "no"),
        ("s4", 1, "attributes", "Wearing_Hat", "yes"),
        ("s5", 0, "expression", "expression", "fear"),
        ("s6", 1, "expression", "expression", "fear"),
        ("s7", 2, "expression", "expression", "anger"),
        ("s8", 0, "head_pose", "yaw", "10.0"),
        ("s9", 1, "head_pose", "roll", "-5.0"),
    ]
    parsed = ["yes", "no", None, "no", "no", "fear", "anger", "anger", "13.0", None]
    baseline = ["no"] * 5 + ["fear"] * 3 + ["0", "0"]
    found = metrics.summarise(sheet_of(rows), parsed, {"majority": baseline}, resamples=200, seed=0)
    attributes, expression, pose = (found["tasks"][name] for name in ("attributes", "expression", "head_pose"))
    assert attributes["items"]["Bangs"]["value"] == 0.75  # recalls 1 and 1/2
    assert attributes["items"]["Wearing_Hat"]["value"] == 0.5
    assert attributes["value"] == 0.625
    assert attributes["unparsed"] == 0.2
    assert attributes["n"] == 5
    assert attributes["baselines"] == {"majority": 0.5}
    assert expression["metric"] == "accuracy"
    assert expression["value"] == pytest.approx(2 / 3, abs=1e-6)
    assert expression["items"]["balanced_accuracy"]["value"] == 0.75
    assert expression["baselines"]["majority"] == pytest.approx(2 / 3, abs=1e-6)
    assert pose["items"]["yaw"]["value"] == 3.0
    assert pose["items"]["roll"]["value"] == 25.0  # unreadable: from -5 to the far end of -20..20
    assert pose["value"] == 14.0
    assert pose["unit"] == "degrees"
    assert pose["higher_is_better"] is False
    # closed questions: Bangs .75, Wearing_Hat .5, expression .75
    assert found["closed_mean"]["value"] == pytest.approx(2 / 3, abs=1e-6)
    # yaw is asked of one person: the bootstrap knows nothing about people
    assert pose["items"]["yaw"]["low"] is None
    assert attributes["low"] <= attributes["value"] <= attributes["high"]


def test_single_item_tasks_have_no_items_and_no_closed_mean_without_choices():
    rows = [("a", 0, "age", "age", "30.0"), ("b", 1, "age", "age", "40.0")]
    found = metrics.summarise(sheet_of(rows), ["31", "40"], {}, 100, 0)
    assert found["tasks"]["age"]["value"] == 0.5
    assert found["tasks"]["age"]["items"] == {}
    assert found["closed_mean"] is None


def test_clears_majority_both_ways():
    figure = {"low": 0.6, "high": 0.7, "higher_is_better": True, "baselines": {"majority": 0.5}}
    assert metrics.clears_majority(figure)
    assert not metrics.clears_majority({**figure, "low": 0.5})
    assert not metrics.clears_majority({**figure, "low": None})
    assert not metrics.clears_majority({**figure, "baselines": {}})
    errors = {"low": 3.0, "high": 4.0, "higher_is_better": False, "baselines": {"majority": 5.0}}
    assert metrics.clears_majority(errors)
    assert not metrics.clears_majority({**errors, "high": 5.5})
