"""Figures of hand-written answers, held against scikit-learn, fairlearn and a table worked out by hand."""

import csv
import importlib
import json
import sys
from collections import Counter
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fairlearn.metrics import MetricFrame
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix

from facemllm import tasks
from facemllm.evaluate.run import encode, score
from facemllm.scoring import consistency
from facemllm.scoring.sheet import Answers, read_sheet
from facemllm.scoring.summary import summarise
from facemllm.tables import CONVERSATIONS, PREDICTIONS, TableWriter, open_table
from facemllm.tasks import answers
from tests.refusing import refuses
from tests.scored import template, write_conversations, write_predictions

ROWS = list(csv.DictReader((Path(__file__).parent / "scored" / "answers.csv").open(encoding="utf-8")))
PARSED = [row["parsed"] or None for row in ROWS]
UNREAD = "?"
OVERRIDES = ["evaluate.bootstrap=200", "evaluate.min_group=2"]

pytestmark = pytest.mark.filterwarnings("ignore:y_pred contains classes", "ignore:A single label")


def asked(row):
    return row["image"], row["person"], row["task"], row["item"], row["answer"], row["way"], row["claim"] or None


def native(task):
    return [row for row in ROWS if row["way"] == "native" and row["task"] == task]


def truth(rows):
    return [row["answer"] for row in rows]


def said(rows):
    return [row["parsed"] or UNREAD for row in rows]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    groups = {row["image"]: {"gender": row["gender"], "age_band": row["age_band"]} for row in ROWS}
    return write_conversations(tmp_path_factory.mktemp("fixture") / "conversations", map(asked, ROWS), groups)


@pytest.fixture(scope="module")
def predictions(table):
    return write_predictions(table.parent / "predictions", PARSED, [row["raw"] for row in ROWS])


@pytest.fixture(scope="module")
def metrics(settings, table, predictions):
    return score(settings, table, predictions, table.parent / "metrics.json")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["raw"])
def test_the_answers_are_read_as_a_person_reads_them(row):
    wording = template(row["item"], row["way"], row["claim"])
    turn = {"task": row["task"], "template": wording, "options": row["options"].split()}
    assert tasks.read(tasks.question_of(turn), row["raw"]) == (row["parsed"] or None)
    assert (not row["parsed"] and answers.refuses(row["raw"])) == bool(row["refused"])


def test_figures_equal_a_table_worked_out_by_hand(metrics):
    table = {
        "gender": (Fraction(1, 2), Fraction(4, 12), Fraction(1, 12)),  # women 3 of 6, men 3 of 6
        "expression": (Fraction(6, 12), Fraction(3, 12), Fraction(1, 12)),
        # bangs (3/5 + 4/7) / 2, hat (2/3 + 3/4) / 2, eyewear (1 + 1/2 + 1) / 3
        "attributes": ((Fraction(41, 70) + Fraction(17, 24) + Fraction(5, 6)) / 3, Fraction(3, 23), Fraction(0)),
        # errors: .5, 59 (26 to 85), 2, 58.25 (63.25 to 5), 11, 75 (80 to 5), 15, 5
        "age": (Fraction("225.75") / 8, Fraction(3, 8), Fraction(1, 8)),
        # AU12: 2 hits, 2 misses, 1 false alarm; AU4: 2 hits, 1 false alarm
        "action_units": ((Fraction(4, 7) + Fraction(4, 5)) / 2, Fraction(2, 10), Fraction(1, 10)),
        # shared 3 + 0 + 2, only said 1, only true 1 + 1 + 1
        "caption": (Fraction(10, 14), Fraction(1, 3), Fraction(1, 3)),
    }
    assert set(metrics["tasks"]) == set(table)
    for task, (value, unreadable, refused) in table.items():
        entry = metrics["tasks"][task]
        by_hand = {"value": float(value), "unreadable": float(unreadable), "refused": float(refused)}
        assert {name: entry[name] for name in by_hand} == pytest.approx(by_hand, abs=1e-9), task
        assert entry["low"] <= entry["value"] <= entry["high"]
    caption = metrics["tasks"]["caption"]["also"]
    assert caption["precision"]["value"] == pytest.approx(5 / 6, abs=1e-9)
    assert caption["recall"]["value"] == pytest.approx(5 / 8, abs=1e-9)
    ways = metrics["consistency"]["ways"]
    shares = {way: [entry[name]["value"] for name in ("accuracy", "agreement")] for way, entry in ways.items()}
    # lettered: right A, "A woman, so B", B. a man; the same as outright in i00, i01
    assert shares["lettered"] == pytest.approx([3 / 8, 2 / 8], abs=1e-9)
    # statements: i00 and i05 are right, i00 and i07 say what was said outright
    assert shares["statement"] == pytest.approx([2 / 5, 2 / 5], abs=1e-9)
    assert ways["statement"]["n"] == 5
    # both captions speak of gender, the first also of bangs, age and eyewear (wrongly), the last of the hat (denied)
    by_relation = metrics["consistency"]["captions"]["by_relation"]
    relations = {entry["relation"].removeprefix("the caption agrees on "): entry for entry in by_relation}
    broken = {name: relations[name]["broken_by_model"] for name in ("eyewear", "Wearing_Hat", "gender")}
    assert broken == {"eyewear": 1.0, "Wearing_Hat": 1.0, "gender": 0.0}
    assert relations["eyewear"]["broken_by_truth"] == 0.0


def test_groups_equal_those_of_fairlearn(metrics):
    measures = {"gender": balanced_accuracy_score, "expression": accuracy_score}
    for task, measure in measures.items():
        rows = native(task)
        for kind in (("gender",), ("age_band",), ("gender", "age_band")):
            frame = MetricFrame(
                metrics={"value": measure, "unreadable": lambda _, texts: float(np.mean(texts == UNREAD))},
                y_true=np.array(truth(rows)),
                y_pred=np.array(said(rows)),
                sensitive_features=pd.DataFrame({part: [row[part] for row in rows] for part in kind}),
            )
            found = metrics["fairness"][task][" x ".join(kind)]
            named = [(name if isinstance(name, str) else " x ".join(name)) for name in frame.by_group.index]
            expected = dict(zip(named, frame.by_group.to_dict("records"), strict=True))
            assert set(found["groups"]) == set(expected)
            for name, entry in expected.items():
                assert {key: found["groups"][name][key] for key in entry} == pytest.approx(entry, abs=1e-9)
            assert abs(found["largest"]["value"]) == pytest.approx(frame.difference()["value"], abs=1e-9)
            for gap in found["gaps"]:
                between = expected[gap["a"]]["value"] - expected[gap["b"]]["value"]
                assert gap["value"] == pytest.approx(between, abs=1e-9)
            assert len(found["gaps"]) == len(list(combinations(expected, 2)))


def test_confusion_equals_that_of_scikit_learn(metrics):
    found = metrics["confusion"]["expression.expression"]
    rows = [row for row in native("expression") if row["parsed"]]
    assert found["counts"] == confusion_matrix(truth(rows), said(rows), labels=found["labels"]).tolist()
    assert "contempt" in found["labels"]  # no option of the question, yet an answer
    unreadable = Counter(row["answer"] for row in native("expression") if not row["parsed"])
    assert found["unreadable"] == [unreadable[label] for label in found["labels"]]
    assert sum(map(sum, found["counts"])) + sum(found["unreadable"]) == 12


def test_the_same_answers_give_the_same_bytes_and_any_changed_one_others(settings, table, predictions, metrics):
    assert encode(score(settings, table, predictions)) == (table.parent / "metrics.json").read_bytes()
    assert json.loads((table.parent / "metrics.json").read_bytes()) == metrics
    digest = open_table(predictions, PREDICTIONS).digest
    sheet = read_sheet(open_table(table, CONVERSATIONS), "test")
    assert sheet.answers == [ROWS[int(sample)]["answer"] for sample in sheet.sample_ids.to_pylist()]

    quick = settings.model_copy(update={"evaluate": settings.evaluate.model_copy(update={"bootstrap": 2})})

    def figures(parsed):
        ordered = [parsed[int(sample)] for sample in sheet.sample_ids.to_pylist()]
        return encode([summarise(sheet, Answers.of(ordered), {}, 2, 0), consistency.measure(quick, sheet, ordered)])

    before = figures(PARSED)
    for place, row in enumerate(ROWS):
        changed = list(PARSED)
        changed[place] = row["answer"] if row["parsed"] != row["answer"] else None
        assert figures(changed) != before, row
    out = write_predictions(table.parent / "changed", changed, [r["raw"] for r in ROWS])
    assert open_table(out, PREDICTIONS).digest != digest


def test_the_order_of_a_table_plays_no_part(settings, table, predictions, metrics, tmp_path):
    rows = list(open_table(predictions, PREDICTIONS).iterate())
    with TableWriter(tmp_path / "shuffled", PREDICTIONS, about={"split": "test"}) as writer:
        writer.write(rows[::-1])
    other = score(settings, table, tmp_path / "shuffled")
    assert {**other, "predictions_digest": ""} == {**metrics, "predictions_digest": ""}


def test_an_evaluation_folder_brings_its_other_tables_along(settings, table, predictions, metrics, tmp_path):
    folder = tmp_path / "evaluation"
    raw = [row["raw"] for row in ROWS]
    write_predictions(folder / "predictions", PARSED, raw)
    assert score(settings, table, folder) == metrics
    assert (metrics["generation"], metrics["disturbed"]) == (None, {})
    some = {place: PARSED[place] for place, row in enumerate(ROWS) if row["image"] < "i06" and row["way"] == "native"}
    write_predictions(folder / "disturbed" / "blur", dict.fromkeys(some), kind="blur")
    write_predictions(folder / "disturbed" / "dark", some, kind="dark")
    write_predictions(folder / "generated", {p: "happiness" for p in some if ROWS[p]["task"] == "expression"})
    found = score(settings, table, folder)
    blur, again = found["disturbed"]["blur"], found["generation"]
    assert (blur["faces"], blur["after"]["value"]) == (6, 0.0)
    assert blur["change"]["value"] == -blur["before"]["value"] < 0
    assert found["disturbed"]["dark"]["change"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    # of the six, happiness was the likeliest in i00, i03 and i05
    assert again["agreement"]["value"] == again["by_task"]["expression"]["value"] == 0.5
    assert (again["n"], again["unreadable"], again["both_unreadable"]) == (6, 0.0, 0.0)
    write_predictions(folder / "disturbed" / "jpeg", {len(ROWS): None}, [*raw, ""], kind="jpeg")
    refuses("1 predictions answer no question", score, settings, table, folder)


ZERO = [(str(i), i, "zero_shot", "Wearing_Earrings", ("yes", "no")[i % 2]) for i in range(20)]


def test_zero_shot_is_also_judged_by_the_likeliest_option(settings, tmp_path):
    table = write_conversations(tmp_path / "conversations", ZERO)
    scores = [{"no": 0.1, "yes": 0.7} if i % 4 == 0 else {"no": 0.6, "yes": 0.2} for i in range(20)]
    write_predictions(tmp_path / "a", [None] * 20, ["(none of the options)"] * 20, scores)
    found = score(settings, table, tmp_path / "a")["tasks"]["zero_shot"]
    likeliest = found["also"]["by_likelihood"]
    assert (found["value"], likeliest["value"]) == (0.0, 0.75)
    assert likeliest["low"] < 0.75 < likeliest["high"]
    assert found["items"]["Wearing_Earrings"]["also"]["by_likelihood"]["value"] == 0.75
    write_predictions(tmp_path / "b", [None] * 20, [""] * 20, [*scores[:-1], None])
    assert "by_likelihood" not in score(settings, table, tmp_path / "b")["tasks"]["zero_shot"]["also"]


def test_two_answers_that_cannot_be_read_do_not_agree(settings, tmp_path):
    table = write_conversations(tmp_path / "conversations", ZERO)
    write_predictions(tmp_path / "e" / "predictions", ["yes"] * 10 + [None] * 10)
    write_predictions(tmp_path / "e" / "generated", ["yes"] * 5 + [None] * 10 + ["no"] * 5)
    found = score(settings, table, tmp_path / "e")["generation"]
    assert found["agreement"]["value"] == 0.25
    assert (found["both_unreadable"], found["unreadable"]) == (0.25, 0.5)


def test_predictions_and_labels_that_mean_nothing_are_refused(settings, tmp_path):
    table = write_conversations(tmp_path / "conversations", ZERO)
    for place, odd in enumerate((1.2, -0.1, float("nan"))):
        scores = [{"no": 0.4, "yes": 0.6}] * 19 + [{"no": odd, "yes": 0.6}]
        write_predictions(tmp_path / str(place), ["yes"] * 20, scores=scores)
        said = "question 19 has the score .*; scores are probabilities from 0 to 1"
        refuses(said, score, settings, table, tmp_path / str(place))
    write_predictions(tmp_path / "one", ["yes"] * 20)
    answered = list(open_table(tmp_path / "one").iterate())
    answered[7]["model_digest"] = "d" * 64
    with TableWriter(tmp_path / "two", PREDICTIONS, about={"split": "test"}) as writer:
        writer.write(answered)
    said = "question 7 was answered by model dddddddddddd, others by mmmmmmmmmmmm"
    refuses(said, score, settings, table, tmp_path / "two")
    ages = write_conversations(tmp_path / "ages", [("a", 0, "age", "age", "30"), ("b", 1, "age", "age", "thirty")])
    write_predictions(tmp_path / "c", ["30", "30"])
    refuses("the answer 'thirty' to question 1 of age is no number", score, settings, ages, tmp_path / "c")


def test_nothing_heavy_is_loaded_to_score(settings, table, predictions, monkeypatch):
    def ours():
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "facemllm"}

    for name in ("torch", "transformers", "ray", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)  # whoever imports it fails
    before = ours()
    for name in before:
        del sys.modules[name]
    try:
        importlib.import_module("facemllm.evaluate.run").score(settings, table, predictions)
    finally:
        for name in ours():
            del sys.modules[name]
        sys.modules.update(before)
