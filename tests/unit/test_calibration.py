import numpy as np
import pytest
from sklearn.calibration import calibration_curve

from facemllm.scoring import calibration
from facemllm.scoring.sheet import Answers
from tests.scored import sheet_of

OVERRIDES = ["evaluate.bootstrap=200"]


def measured(settings, confidence, right):
    rows = [(i, i, "gender", "gender", "female") for i in range(len(right))]
    parsed = ["female" if ok else "male" for ok in right]
    answers = Answers(parsed, np.zeros(len(rows), dtype=bool), np.asarray(confidence, dtype=float))
    return calibration.measure(settings, sheet_of(rows), answers)["gender"]


def test_agrees_with_scikit_learn_and_a_plain_loop(settings):
    draw = np.random.default_rng(0)
    confidence = draw.uniform(0.5, 1, 900)
    right = draw.random(900) < confidence**2
    found = measured(settings, confidence, right)
    accuracy, mean = calibration_curve(right, confidence, n_bins=15)
    assert [b["accuracy"] for b in found["bins"]] == pytest.approx(accuracy, abs=1e-9)
    assert [b["confidence"] for b in found["bins"]] == pytest.approx(mean, abs=1e-9)
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        expected += abs(right[inside].sum() - confidence[inside].sum()) / 900
    assert found["ece"] == pytest.approx(expected, abs=1e-9)
    assert not {"low", "high"} & set(found)
    assert 0 < found["expected"] < found["ece"]
    assert found["n"] == sum(b["n"] for b in found["bins"]) == 900


def test_a_calibrated_model_has_little_error_and_a_boastful_one_much(settings):
    draw = np.random.default_rng(1)
    confidence = draw.uniform(0.5, 1, 4000)
    assert measured(settings, confidence, draw.random(4000) < confidence)["ece"] < 0.04
    assert measured(settings, np.ones(1000), draw.random(1000) < 0.6)["ece"] == pytest.approx(0.4, abs=0.05)


def test_what_is_expected_of_a_calibrated_model_is_what_calibrated_models_have(settings):
    errors, expected = [], []
    for seed in range(40):
        draw = np.random.default_rng(seed)
        confidence = draw.uniform(0.5, 1, 300)
        found = measured(settings, confidence, draw.random(300) < confidence)
        errors.append(found["ece"])
        expected.append(found["expected"])
    assert np.mean(errors) > 0.03  # far from zero, though nothing is wrong
    assert np.mean(expected) == pytest.approx(np.mean(errors), rel=0.1)
    assert measured(settings, np.ones(50), [True] * 50)["expected"] == 0.0


def test_bins_are_closed_above_and_an_unread_answer_has_no_confidence(settings):
    found = measured(settings, [0.0, 1 / 15, 1.0, np.nan], [True, False, True, True])
    assert [b["n"] for b in found["bins"]] == [2, 1]
    assert found["n"] == 3
    sheet = sheet_of([("a", 0, "gender", "gender", "male"), ("a", 0, "age", "age", "30")])
    assert calibration.measure(settings, sheet, Answers.of(["male", "30"])) == {}


def test_a_confusion_of_nothing_read(settings):
    sheet = sheet_of([("a", 0, "gender", "gender", "male"), ("b", 1, "gender", "gender", "male")])
    found = calibration.confusion(sheet, Answers.of([None, None]))["gender.gender"]
    assert found == {"labels": ["female", "male"], "counts": [[0, 0], [0, 0]], "unreadable": [0, 2]}
