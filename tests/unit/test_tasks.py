"""Tasks: labels from rows, options, phrases, and a parser that refuses rather than guesses."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from facemllm import tasks
from facemllm.core import digests
from facemllm.core.digests import draw, drawn
from facemllm.heads import sampling as s
from facemllm.tables import pairs
from facemllm.tables.schemas import fairness_groups
from facemllm.tasks import caption
from facemllm.tasks.answers import MAX_TEXT
from facemllm.tasks.attributes import TASK as ATTRIBUTES
from tests.asked import phrases
from tests.refusing import refuses

BASE = ("caption", "age", "attributes", "expression", "gender", "head_pose")
QUESTIONS = [question for name in BASE for question in tasks.get(name).questions()]
EVERY = [question for name in tasks.all_names() if name != "zero_shot" for question in tasks.get(name).questions()]
VALUES = {question.item: tuple(option.value for option in question.options) for question in QUESTIONS}
TASK_OF = {question.item: tasks.get(question.task) for question in QUESTIONS}

# What people and models write, and what it plainly says; nothing where it does not.
PARSED = list(csv.DictReader((Path(__file__).parent / "parsed.csv").open(newline="", encoding="utf-8")))


def known(**true):
    """Attributes of a row in which every name of the vocabulary is known."""
    names = [o.value for item in ATTRIBUTES.items if item.form == "choice" for o in item.options]
    names += [item.name for item in ATTRIBUTES.items if item.form == "boolean"]
    return pairs({name: name in true for name in names})


def full_row(**change):
    attributes = known(Short_Hair=1, Brown_Hair=1, No_Beard=1, Eyeglasses=1, Blue_Eyes=1, Wearing_Hat=1)
    row = {"attributes": attributes, "expression": "fear", "age": 37.4000015, "gender": "female", "caption": None}
    return row | {"yaw": -23.0, "pitch": 1.0, "roll": 19.0, "skin_tone": 5} | change


@pytest.mark.parametrize("row", PARSED, ids=lambda row: f"{row['item']}: {row['text']}")
def test_parser_reads_what_is_said_and_no_more(row):
    assert TASK_OF[row["item"]].item(row["item"]).parse(row["text"]) == (row["value"] or None)


def test_parser_refuses_what_is_too_long_to_be_an_answer():
    read = [TASK_OF["gender"].item("gender").parse("a woman " * (MAX_TEXT // 8 + more)) for more in (0, 1)]
    assert read == ["female", None]


def test_every_option_is_read_back_from_its_text_and_its_value():
    for question in EVERY:
        task = tasks.get(question.task)
        for option in question.options:
            signed = question.task == "head_pose" and option.value != "0"  # whose sign could mean either side
            written = (option.text,) if signed else (option.text, option.value)
            for text in (*written, option.text.upper(), f"{option.text.capitalize()}."):
                assert task.item(question.item).parse(text) == option.value, text
            assert task.item(question.item).option_for(option.value) == option


def test_phrases_are_unique_and_none_begins_another():
    owners: dict[str, set[tuple[str, str]]] = {}
    for question in QUESTIONS:
        for option in question.options:
            if question.form != "boolean":
                owners.setdefault(option.text, set()).add((question.item, option.value))
    for item in ATTRIBUTES.items:
        if item.form == "boolean":
            owners.setdefault(item.mention("yes"), set()).add((item.name, "yes"))
    assert all(len(owner) == 1 for owner in owners.values())
    assert set(owners) | {"yes", "no"} <= set(phrases())
    words = {phrase: phrase.split() for phrase in owners}
    for short in words.values():
        for long in words.values():
            assert short == long or long[: len(short)] != short, (short, long)
    for phrase in phrases():  # and in a mirrored picture the sides are words to swap
        assert re.fullmatch(r"[a-z0-9]+( [a-z0-9]+)*", phrase)
        assert not re.search(r"\w(left|right)|(left|right)\w", re.sub("upright|fright", "", phrase))


def test_mirroring_swaps_the_sides_of_yaw_and_roll():
    for item in ("yaw", "roll"):
        for option in next(q for q in QUESTIONS if q.item == item).options:
            swap = {"left": "right", "right": "left"}
            mirrored = " ".join(swap.get(word, word) for word in option.text.split())
            assert float(TASK_OF[item].item(item).parse(mirrored)) == -float(option.value)


def test_signs_of_the_pose_are_those_of_300w_lp():
    say = {item: TASK_OF[item].item(item).option_for("20").text for item in ("yaw", "pitch", "roll")}
    assert say == {"yaw": "turned 20 degrees left", "pitch": "raised 20 degrees", "roll": "tilted 20 degrees right"}


def test_questions_are_short_and_in_several_wordings():
    for question in EVERY:
        assert question.item == "unanswerable_new" or 2 <= len(question.templates) <= 3
        assert len(set(question.templates)) == len(question.templates)
        assert all(3 <= len(text.split()) <= 14 for text in question.templates), question
    texts = [text for question in EVERY for text in question.templates]
    assert len(set(texts)) == len(texts)


def test_grids_and_vocabularies_are_the_agreed_ones():
    assert VALUES["age"] == tuple(str(n) for n in range(5, 86, 5))
    for item, limit in (("yaw", 60), ("pitch", 25), ("roll", 20)):
        assert VALUES[item] == tuple(str(n) for n in range(-limit, limit + 1, 5))
    assert VALUES["expression"] == ("neutral", "happiness", "sadness", "surprise", "fear", "disgust", "anger")
    assert (VALUES["gender"], VALUES["caption"]) == (("female", "male"), ())
    metrics = ["fact_f1", "mae", "balanced_accuracy", "accuracy", "balanced_accuracy", "mae"]
    assert [tasks.get(name).metric for name in BASE] == metrics


def test_renderer_and_tasks_share_one_vocabulary():
    shared = ("hair_style", "hair_color", "beard", "eyewear", "eye_color", "expression")
    drawn = (s.HAIR_STYLES, s.HAIR_COLORS, s.BEARDS, s.EYEWEAR, s.EYE_COLORS, s.EXPRESSIONS)
    assert tuple(VALUES[item] for item in shared) == drawn


def test_labels_are_exact_and_options_the_nearest():
    row = full_row()
    assert TASK_OF["age"].item("age").label(row) == "37.4"
    assert TASK_OF["age"].item("age").option_for("37.4").value == "35"
    nearest = {v: TASK_OF["age"].item("age").option_for(v).value for v in ("0", "37.5", "37.51", "200")}
    assert nearest == {"0": "5", "37.5": "35", "37.51": "40", "200": "85"}
    assert TASK_OF["yaw"].item("yaw").label(row) == "-23"
    assert TASK_OF["yaw"].item("yaw").option_for("-23").text == "turned 25 degrees right"
    assert TASK_OF["yaw"].item("yaw").label({"yaw": -1e-7}) == "0"
    assert TASK_OF["expression"].item("expression").label(row) == "fear"


def test_what_is_unknown_or_impossible_has_no_label():
    empty = {"attributes": None}
    assert {q.item: tasks.get(q.task).item(q.item).label(empty) for q in QUESTIONS} == dict.fromkeys(TASK_OF)
    nothing = [("age", float("nan")), ("age", 999.0), ("age", -1.0), ("yaw", 120.0)]
    for item, value in (*nothing, ("expression", "contempt"), ("gender", "unknown")):
        assert TASK_OF[item].item(item).label({item: value}) is None
    assert TASK_OF["yaw"].item("yaw").label({"yaw": 80.0}) == "80"


@pytest.mark.parametrize(
    ("attributes", "label"),
    [
        (known(Eyeglasses=1), "Eyeglasses"),
        (known(), None),
        (known(Eyeglasses=1, Sunglasses=1), None),
        ([p for p in known(Eyeglasses=1) if p["name"] != "Sunglasses"], None),
        ([p if p["name"] != "Sunglasses" else {**p, "value": None} for p in known(Eyeglasses=1)], None),
    ],
)
def test_a_group_is_known_only_if_all_its_members_are_and_one_is_true(attributes, label):
    assert ATTRIBUTES.item("eyewear").label({"attributes": attributes}) == label


def test_absent_things_are_answered_but_not_mentioned():
    row = full_row()
    for item, label in (("beard", "No_Beard"), ("Bangs", "no")):
        found = ATTRIBUTES.item(item)
        assert (found.label(row), found.mention(label)) == (label, None)
    assert ATTRIBUTES.item("Wearing_Hat").mention("yes") == "a hat"
    assert ATTRIBUTES.item("eyewear").mention("Eyeglasses") == "glasses"


def test_caption_facts_are_sorted_and_leave_out_what_is_absent():
    stated = caption.facts_text(caption.facts(full_row()))
    assert stated == (
        "Wearing_Hat=yes;age=35;expression=fear;eye_color=Blue_Eyes;eyewear=Eyeglasses;gender=female"
        ";hair_color=Brown_Hair;hair_style=Short_Hair;pitch=0;roll=20;yaw=-25"
    )
    item = tasks.get("caption").item("caption")
    assert item.label(full_row(caption="A woman, no hat.")) == "gender=female"
    refuses("open question", item.option_for, "age=35", error=ValueError)


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({}, {}),
        ({"gender": "male", "age": 17.9}, {"gender": "male", "age_band": "child"}),
        ({"gender": "male", "skin_tone": 3}, {"gender": "male", "skin_tone": "light"}),
        ({"age": 18, "skin_tone": 4}, {"age_band": "young", "skin_tone": "medium"}),
        ({"age": 36, "skin_tone": 7}, {"age_band": "middle", "skin_tone": "dark"}),
        ({"age": 60.0, "skin_tone": 0}, {"age_band": "old"}),
        ({"age": 59.9, "skin_tone": 10}, {"age_band": "middle", "skin_tone": "dark"}),
    ],
)
def test_fairness_groups(row, found):
    assert fairness_groups(row) == found


def test_turns_name_their_question_and_wording():
    turn = {"task": "attributes", "template": "hair_color/1"}
    assert tasks.question_of(turn).item == "hair_color"
    assert tasks.question_of({**turn, "template": "hair_color/9999"}) == tasks.question_of(turn)  # of a longer list
    for template in ("hair_color", "hair_color/-1", "age/0", "hair_color/²"):
        refuses("no template", tasks.question_of, {"task": "attributes", "template": template})


def test_unknown_task_is_refused_with_the_known_ones():
    refuses("known tasks: caption, action_unit_intensity", tasks.get, "identity")


def test_draws_are_pinned_and_even():
    assert [draw(3, "image", item) for item in ("age", "gender", "yaw", "Bangs")] == [2, 0, 0, 0]
    assert drawn((2, 3, 5), "image", "item") == [0, 0, 0]
    for firsts in ([draw(3, str(n), "age") for n in range(3000)], [drawn((3, 4), str(n))[0] for n in range(3000)]):
        assert min(firsts.count(value) for value in range(3)) > 900


def test_tasks_and_what_makes_tables_do_not_import_torch_or_ray():
    rooms = ("tasks.characteristics", "scoring.consistency", "reformat.run", "validate.run", "annotate.run")
    modules = ", ".join(f"facemllm.{room}" for room in rooms)
    code = f"import sys, {modules}; print({{'torch', 'ray'}} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize("room", ["ingest.run", "reformat.run", "train.launch", "evaluate.run"])
def test_a_tasks_code_counts_where_it_is_asked_and_only_there(room):
    folder = digests.PACKAGE / "tasks"
    counted = {path.stem for path in digests.code_files(f"facemllm.{room}", ("age",)) if path.parent == folder}
    asked = {name for name in tasks.all_names() if name in counted}
    assert asked == (set() if room == "ingest.run" else {"age"})


@pytest.mark.parametrize(("task", "item", "center"), [("age", "age", "median"), ("head_pose", "yaw", "mean")])
def test_a_number_stands_for_its_distribution(task, item, center):
    """The median has the least expected absolute error of all answers, the mean the least squared one, found by trying
    them, with the weight of a step spread evenly over what is nearest to it."""
    question = tasks.get(task).question(item)
    assert question.center == center
    grid = np.array([float(option.value) for option in question.options])
    draw = np.random.default_rng(0)
    inside = np.linspace(-2.5, 2.5, 51)[:-1] + 0.05
    tried = np.linspace(grid[0] - 2.5, grid[-1] + 2.5, 1701)
    for _ in range(20):
        weights = draw.dirichlet(np.full(len(grid), 0.3))
        truth, mass = (grid[:, None] + inside).ravel(), np.repeat(weights / len(inside), len(inside))
        off = abs(tried[:, None] - truth)
        best = tried[((off if center == "median" else off**2) @ mass).argmin()]
        assert question.number(list(weights)) == pytest.approx(best, abs=0.11)
    certain = [float(value == grid[-1]) for value in grid]
    assert question.number(certain) == grid[-1]


def test_all_angles_are_answered_by_the_mean_and_years_by_the_median():
    centers = {name: {question.center for question in tasks.get(name).questions()} for name in ("head_pose", "age")}
    assert centers == {"head_pose": {"mean"}, "age": {"median"}}
