"""Combinations of characteristics that training does not see together, and what evaluation says of them."""

import hashlib
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from facemllm import settings, tasks
from facemllm.cli.main import app
from facemllm.evaluate.run import score
from facemllm.reformat.run import COMBINED, reformat
from facemllm.report.terminal import combinations as lines
from facemllm.scoring.combinations import measure
from facemllm.tables import CONVERSATIONS, PREDICTIONS, TableWriter, mapping, open_table, pairs
from facemllm.tasks.combinations import Combinations
from tests.pictures import encode
from tests.refusing import refuses
from tests.scored import sheet_of, write_predictions

KEY = "reformat.held_out_combinations"
BOTH = ("Eyeglasses", "Bangs")
EYEWEAR = ("No_Eyewear", "Eyeglasses", "Sunglasses")


def face(number, split="train", eyewear="No_Eyewear", bangs=False, source="render", **more):
    attributes = {name: name == eyewear for name in EYEWEAR} | {"Bangs": bangs}
    return {
        "image_id": hashlib.sha256(f"{source} {number}".encode()).hexdigest(),
        "image": {"bytes": encode(np.full((16, 16, 3), number % 256, np.uint8)), "path": None},
        **{"source": source, "source_id": str(number), "subject_id": f"p{number}", "split": split},
        **{"attributes": pairs(attributes), "expression": "neutral", "gender": "female", **more},
    }


FOUR = [("No_Eyewear", False), ("Eyeglasses", False), ("No_Eyewear", True), ("Eyeglasses", True)]


def four(split, start):
    """Four faces: neither, the one, the other, both."""
    return [face(start + n, split, *labels) for n, labels in enumerate(FOUR)]


FACES = four("train", 0)


@pytest.fixture
def talks(faces_table, tmp_path):
    """`talks(rows, combinations, *overrides)`: folder of the conversations, and their manifest."""
    made = iter(range(100))

    def make(rows, combinations, *overrides):
        number = next(made)
        chosen = settings.load("laptop", [f"{KEY}={json.dumps(combinations)}", *overrides])
        out = tmp_path / f"talks{number}"
        return out, reformat(chosen, faces_table(rows, name=f"faces{number}"), out)

    return make


def test_training_faces_that_show_a_combination_are_left_out_and_all_others_stay(talks):
    rows = [row for n, split in enumerate(("train", "validation", "test")) for row in four(split, 10 * n)]
    out, manifest = talks(rows, [BOTH])
    kept = {row["image_id"] for row in open_table(out, CONVERSATIONS).iterate(["image_id"])}
    assert {row["image_id"] for row in rows} - kept == {rows[3]["image_id"]}
    (refused,) = open_table(out).refused()
    assert (refused["row"], refused["reason"]) == (3, f"{COMBINED}Eyeglasses with Bangs")
    counts = {"train": 1, "validation": 1, "test": 1}
    assert manifest["about"]["held_out_combinations"] == [{"names": list(BOTH), "faces": counts}]
    plain, without = talks(rows, [])
    assert open_table(plain).rows == 12
    assert "held_out_combinations" not in without["about"]
    same = {row["image_id"]: row["turns"] for row in open_table(plain, CONVERSATIONS).iterate()}
    assert all(same[row["image_id"]] == row["turns"] for row in open_table(out, CONVERSATIONS).iterate())


def test_a_task_that_is_not_asked_tells_what_a_face_shows_but_no_sensitive_one():
    asked_for = [tasks.get("expression")]
    shown = [Combinations([BOTH], asked_for).shown({**row, "attributes": mapping(row["attributes"])}) for row in FACES]
    assert shown == [[], [], [], [0]]
    refuses("no characteristic 'gender=female'", Combinations, [["gender=female", "Bangs"]])
    assert Combinations([["gender=female", "Bangs"]], [tasks.get("gender")])


def test_caps_balance_and_combinations_count_the_same_faces(talks):
    rows = [row for n in range(5) for row in four("train", 4 * n)]
    out, manifest = talks(rows, [BOTH], "reformat.mixture.caps={render: 10}", "reformat.balance=1")
    assert manifest["about"]["mixture"]["sources"] == {"render": {"faces": 15, "taken": 10}}
    assert open_table(out).rows == 10


@pytest.mark.parametrize(
    ("combinations", "message"),
    [
        ([["Sunglases", "Bangs"]], r"held_out_combinations: no characteristic 'Sunglases'; did you mean Sunglasses"),
        ([["Sunglasses", "Eyeglasses"]], r"Sunglasses and Eyeglasses are two answers to 'eyewear', so no face shows"),
        ([["Wearing_Earrings", "Bangs"]], r"Wearing_Earrings is held out of training by itself \(reformat\.held_out\)"),
        ([["Bangs"]], r"held_out_combinations\.0: List should have at least 2 items"),
        ([["Bangs", "Bangs"]], r"held_out_combinations: names Bangs, Bangs twice"),
        ([BOTH, BOTH[::-1]], r"held_out_combinations: names Eyeglasses, Bangs twice"),
        ([["Eyeglasses", "expression=neutral"]], r"every training face shows Eyeglasses with expression=neutral"),
    ],
)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(talks, tmp_path, combinations, message):
    refuses(message, talks, [face(n, eyewear="Eyeglasses") for n in range(4)], combinations)
    assert not (tmp_path / "talks0").exists()


def test_a_combination_that_no_face_shows_is_said_in_one_line(faces_table, tmp_path):
    arguments = ["reformat", str(faces_table(four("train", 0))), str(tmp_path / "talks")]
    result = CliRunner().invoke(app, [*arguments, "--set", f"{KEY}=[[Sunglasses, Bangs]]"])
    assert result.exit_code == 0
    said = "no face shows Sunglasses with Bangs, so nothing is held out and nothing can be measured"
    assert [line for line in result.stderr.splitlines() if KEY in line] == [f"{KEY}: {said}"]


def asked(groups):
    """(image, person, task, item, answer) of faces, and the answers given; `groups` are (eyewear, bangs, said eyewear,
    said bangs, how many)."""
    rows, said = [], []
    for eyewear, bangs, said_eyewear, said_bangs, count in groups:
        for _ in range(count):
            number = len(rows) // 2
            rows += [(f"i{number}", number, "attributes", "eyewear", eyewear)]
            rows += [(f"i{number}", number, "attributes", "Bangs", bangs)]
            said += [said_eyewear, said_bangs]
    return rows, said


GROUPS = [
    ("Eyeglasses", "yes", "Eyeglasses", "yes", 12),
    ("Eyeglasses", "yes", "Eyeglasses", "no", 6),
    ("Eyeglasses", "yes", None, "yes", 6),
    ("Eyeglasses", "no", "Eyeglasses", "no", 27),
    ("Eyeglasses", "no", "Sunglasses", "no", 3),
    ("No_Eyewear", "yes", "No_Eyewear", "yes", 16),
    ("No_Eyewear", "yes", "No_Eyewear", "no", 4),
    ("No_Eyewear", "no", "Eyeglasses", "yes", 50),
]


def measured(groups, combinations=(BOTH,), rivals=None):
    rows, said = asked(groups)
    sheet = sheet_of(rows)
    chosen = settings.load("laptop")
    given = {name: [answer(row) for row in rows] for name, answer in (rivals or {}).items()}
    return measure(chosen, sheet, said, given, combinations)


def test_shares_are_those_of_a_table_worked_out_by_hand():
    def constant(row):
        return {"eyewear": "Eyeglasses", "Bangs": "no"}[row[3]]

    found = measured(GROUPS, rivals={"constant": constant})["Eyeglasses with Bangs"]
    assert (found["faces"], found["people"], found["too_few"]) == (24, 24, False)
    assert found["all"]["value"] == 12 / 24
    assert found["expected"]["value"] == pytest.approx(27 / 30 * 16 / 20)
    assert found["difference"]["value"] == pytest.approx(0.5 - 0.72)
    assert found["baselines"] == {"constant": 0.0}
    glasses, bangs = (found["characteristics"][name] for name in BOTH)
    assert [glasses[kind]["value"] for kind in ("together", "apart", "difference")] == pytest.approx([0.75, 0.9, -0.15])
    assert [bangs[kind]["value"] for kind in ("together", "apart")] == [0.75, 0.8]
    assert (glasses["people_apart"], bangs["faces_apart"]) == (30, 20)
    assert [one["baselines"]["constant"] for one in (glasses, bangs)] == [1.0, 0.0]
    for figure in (found["all"], found["expected"], found["difference"], glasses["together"], bangs["apart"]):
        assert figure["low"] < figure["value"] < figure["high"]


def test_intervals_go_by_people_and_keep_a_width_where_all_are_right():
    """Twice as many pictures of the same people say nothing more; 24 of 24 right is not certainty."""
    rows, said = asked(GROUPS)
    twice = [(image + again, *row) for again in ("", "+") for image, *row in rows]
    chosen = settings.load("laptop")
    one = measure(chosen, sheet_of(rows), said, {}, [BOTH])["Eyeglasses with Bangs"]
    other = measure(chosen, sheet_of(twice), said * 2, {}, [BOTH])["Eyeglasses with Bangs"]
    assert (other["faces"], other["people"]) == (48, 24)
    assert other["all"] == one["all"]
    sure = measured([("Eyeglasses", "yes", "Eyeglasses", "yes", 24), *GROUPS[3:]])["Eyeglasses with Bangs"]
    assert sure["all"] == {"value": 1.0, "low": pytest.approx(0.025 ** (1 / 24)), "high": 1.0}
    assert sure["difference"]["low"] > 0
    never = measured([("Eyeglasses", "yes", None, "no", 24), *GROUPS[3:]])["Eyeglasses with Bangs"]
    assert never["all"]["high"] == pytest.approx(1 - 0.025 ** (1 / 24))


def test_intervals_hold_the_truth_nineteen_times_in_twenty():
    """Of models that are no worse when seeing both: how often the difference's interval leaves out zero."""
    draw = np.random.default_rng(0)
    missed = 0
    for _ in range(200):
        right = draw.random((90, 2)) < (0.95, 0.85)
        said = [("Eyeglasses" if a else None, "yes" if b else "no") for a, b in right[:30]]
        groups = [("Eyeglasses", "yes", *answers, 1) for answers in said]
        groups += [("Eyeglasses", "no", "Eyeglasses" if a else None, "no", 1) for a in right[30:60, 0]]
        groups += [("No_Eyewear", "yes", "No_Eyewear", "yes" if b else "no", 1) for b in right[60:, 1]]
        found = measured(groups)["Eyeglasses with Bangs"]["difference"]
        missed += not found["low"] <= 0 <= found["high"]
    assert missed <= 20


def test_few_people_and_a_split_that_does_not_ask_are_told():
    few = measured([("Eyeglasses", "yes", "Eyeglasses", "yes", 19), *GROUPS[3:]])
    assert few["Eyeglasses with Bangs"]["too_few"]
    (line,) = lines(few)
    assert "all right in 100.0% [82.4%, 100.0%] of 19 faces of 19 people" in line
    assert line.endswith("; too few people to go by")
    (silent,) = measured(GROUPS, [["Eyeglasses", "expression=fear"]]).values()
    assert (silent["faces"], silent["all"]["value"], silent["characteristics"]) == (0, None, {})
    (line,) = lines({"Eyeglasses with expression=fear": silent})
    assert line.endswith("no face shows it and is asked about it")


def test_scoring_reports_the_combinations_of_the_conversations(talks, tmp_path):
    rows = [row for n, split in enumerate(["train"] + ["test"] * 30) for row in four(split, 10 * n)]
    out, _ = talks(rows, [BOTH])
    turns = [turn for row in open_table(out, CONVERSATIONS).iterate(split="test") for turn in row["turns"]]
    names = [turn["sample_id"] for turn in turns]
    write_predictions(tmp_path / "plain", [turn["answer"] for turn in turns])
    answered = list(open_table(tmp_path / "plain").iterate())
    for row in answered:
        row["sample_id"] = names[int(row["sample_id"])]
    with TableWriter(tmp_path / "said", PREDICTIONS, about={"split": "test"}) as writer:
        writer.write(answered)
    # chosen by the conversations, whatever the settings of today name
    chosen = settings.load("laptop", ["evaluate.bootstrap=100", f"{KEY}=[]"])
    found = score(chosen, out, tmp_path / "said")["combinations"]["Eyeglasses with Bangs"]
    assert (found["faces"], found["people"], found["all"]["value"]) == (30, 30, 1.0)
    # in training nobody has both, so what is commonest there is none of them
    assert found["baselines"]["constant"] == 0.0
    arguments = ["score", str(out), str(tmp_path / "said"), str(tmp_path / "metrics.json")]
    result = CliRunner().invoke(app, [*arguments, "--set", "evaluate.bootstrap=100"])
    assert "combination held out of training, Eyeglasses with Bangs: all right in 100.0%" in result.stdout
    assert json.loads((tmp_path / "metrics.json").read_text())["combinations"]


def test_the_default_combinations_are_known():
    chosen = settings.load("laptop").reformat
    asked_for = [tasks.get(name) for name in chosen.tasks]
    assert len(Combinations(chosen.held_out_combinations, asked_for, chosen.held_out).names) == 2
