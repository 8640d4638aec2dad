"""Tasks: labels from rows, options, phrases, and a parser that refuses rather than guesses."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from facemllm import tasks
from facemllm.core import digests
from facemllm.core.digests import draw
from facemllm.errors import UserError
from facemllm.tables import pairs
from facemllm.tables.schemas import fairness_groups
from facemllm.tasks import caption
from facemllm.tasks.attributes import TASK as ATTRIBUTES
from facemllm.tasks.language import MAX_TEXT
from tests.asked import phrases

BASE = ("caption", "age", "attributes", "expression", "gender", "head_pose")
QUESTIONS = [question for name in BASE for question in tasks.get(name).questions()]
EVERY = [question for name in tasks.all_names() if name != "zero_shot" for question in tasks.get(name).questions()]
TASK_OF = {question.item: tasks.get(question.task) for question in QUESTIONS}

# What people and models write, and what it plainly says; None where it does not.
ANSWERS = {
    "gender": [
        ("A woman", "female"),
        ("a man.", "male"),
        ("A", None),
        ("B", None),
        ("Option A", None),
        ("(a)", None),
        ("The person is a woman.", "female"),
        ("female", "female"),
        ("FEMALE!", "female"),
        ("Is this a woman or a man?", None),
        ("a woman or a man", None),
        ("not a man but a woman", "female"),
        ("not a man", None),
        ("womanly", None),
        ("This human", None),
        ("The man's wife, a woman", None),
        ("", None),
        ("   ...  ", None),
        ("Maybe a woman", None),
        ("yes", None),
        ("I cannot tell.", None),
    ],
    "hair_color": [
        ("brown hair", "Brown_Hair"),
        ("She has brown hair.", "Brown_Hair"),
        ("Brown_Hair", "Brown_Hair"),
        ("Brown.", "Brown_Hair"),
        ("dark brown hair", "Dark_Brown_Hair"),
        ("Dark-brown hair", "Dark_Brown_Hair"),
        ("Her hair is dark brown.", "Dark_Brown_Hair"),
        ("Her hair is grey", "Gray_Hair"),
        ("blonde hair", "Blond_Hair"),
        ("brown short hair", "Brown_Hair"),
        ("dark hair", None),
        ("brown eyes", None),
        ("brown and gray hair", None),
        ("Her hair is brown and gray.", None),
        ("brown hair or black hair", None),
        ("brown or black hair", None),
        ("red-brown hair", None),
        ("not brown hair", None),
        ("She doesn't have brown hair.", None),
        ("It isn't black hair, but brown hair.", "Brown_Hair"),
        ("brown hair and gray eyes", "Brown_Hair"),
        ("gray eyes and brown hair", "Brown_Hair"),
        ("hair", None),
        ("The brown dog has hair", None),
        ("a man with no beard, brown hair", None),
    ],
    "hair_style": [
        ("short hair", "Short_Hair"),
        ("short brown hair", "Short_Hair"),
        ("bald", "Bald"),
        ("not bald", None),
        ("A bald head", "Bald"),
        ("her hair is in a bun", "Hair_Bun"),
        ("long beard", None),
        ("long", "Long_Hair"),
        ("shoulder-length hair", "Medium_Hair"),
        ("short hair, long hair", None),
        ("short to long hair", None),
        ("buzzcut", "Buzz_Cut"),
    ],
    "beard": [
        ("no beard", "No_Beard"),
        ("No_Beard", "No_Beard"),
        ("He has no beard.", "No_Beard"),
        ("He does not have a beard.", "No_Beard"),
        ("clean-shaven", "No_Beard"),
        ("a beard", None),
        ("a full beard", "Full_Beard"),
        ("5 o'clock shadow", "5_o_Clock_Shadow"),
        ("5_o_Clock_Shadow", "5_o_Clock_Shadow"),
        ("no mustache", None),
        ("a mustache and a goatee", None),
        ("no full beard", None),
        ("no beard but a mustache", None),
        ("moustache", "Mustache"),
        ("without any facial hair", "No_Beard"),
        ("not clean shaven", None),
    ],
    "eyewear": [
        ("glasses", "Eyeglasses"),
        ("sunglasses", "Sunglasses"),
        ("no eyewear", "No_Eyewear"),
        ("She isn't wearing any glasses.", "No_Eyewear"),
        ("no sunglasses", None),
        ("glasses or sunglasses", None),
        ("The glasses are not sunglasses", None),
        ("The man wears spectacles", "Eyeglasses"),
        ("eyewear", None),
        ("holding glasses", None),
        ("wearing glasses, no hat", "Eyeglasses"),
    ],
    "eye_color": [
        ("brown eyes", "Brown_Eyes"),
        ("blue-green eyes", None),
        ("dark brown eyes", None),
        ("The eyes are hazel.", "Hazel_Eyes"),
        ("eyes", None),
        ("green", "Green_Eyes"),
    ],
    "Wearing_Hat": [
        ("yes", "yes"),
        ("No.", "no"),
        ("not wearing a hat", "no"),
        ("She is wearing a hat", "yes"),
        ("No, she has earrings.", "no"),
        ("no earrings", None),
        ("Yes, she is not wearing a hat.", None),
        ("No, he is wearing a hat.", None),
        ("Yes, he is.", "yes"),
        ("No, he isn't.", "no"),
        ("yes no", None),
        ("yes and no", None),
        ("Yes. No.", None),
        ("Is she wearing a hat?", None),
        ("The hat is missing.", "no"),
        ("without a hat", "no"),
        ("that", None),
        ("Wearing_Hat", "yes"),
        ("wearing a hat or not", None),
        ("no problem, a hat", None),
        ("a hat, yes", "yes"),
        ("yesterday", None),
        ("She took off the hat", None),
        ("no he is not", "no"),
        ("yes she is", "yes"),
        ("no she is", None),
        ("no hat", "no"),
        ("no wonder", None),
        ("a hat, no", None),
    ],
    "Wearing_Earrings": [
        ("without a hat, earrings or lipstick", None),
        ("no hat, earrings", None),
        ("no hat but earrings", "yes"),
    ],
    "Wearing_Lipstick": [
        ("lipstick", "yes"),
    ],
    "Bangs": [
        ("no bangs", "no"),
        ("True", "yes"),
        ("He holds a glass", None),
    ],
    "expression": [
        ("happy", "happiness"),
        ("Happiness", "happiness"),
        ("unhappy", None),
        ("not happy", None),
        ("happy and surprised", None),
        ("not sad, but angry", "anger"),
        ("The person looks afraid.", "fear"),
        ("contempt", "contempt"),
        ("either sad or neutral", None),
        ("madness", None),
    ],
    "age": [
        ("about 35 years old", "35"),
        ("35", "35"),
        ("37.4 years", "37.4"),
        ("35-year-old", "35"),
        ("She is thirty-five years old.", "35"),
        ("30-35 years old", None),
        ("between 30 and 40 years old", None),
        ("in his 30s", None),
        ("over 40", None),
        ("older than 40 years", None),
        ("35 degrees", None),
        ("300 years old", None),
        ("-5", None),
        ("not 35 years old", None),
        ("35 years old or 40 years old", None),
        ("35 or 40", None),
        ("3 men, 35 years old", "35"),
        ("He looks 35.", "35"),
        ("1,000", None),
        ("35,5", None),
        ("the man is 35 years old and wears 2 hats", "35"),
        ("nan", None),
        ("inf", None),
        ("１２ years old", "12"),
    ],
    "yaw": [
        ("turned 25 degrees left", "25"),
        ("turned 25 degrees right", "-25"),
        ("25 degrees to the left", "25"),
        ("turned to the right by 10 degrees", "-10"),
        ("facing straight ahead", "0"),
        ("-25", None),
        ("25", None),
        ("25 degrees", None),
        ("left", None),
        ("turned left", None),
        ("25 degrees to her left", None),
        ("tilted 5 degrees left", None),
        ("raised 10 degrees", None),
        ("turned 25 degrees left or right", None),
        ("turned 25 degrees left and 10 degrees right", None),
        ("not turned 25 degrees left", None),
        ("turned 250 degrees left", None),
        ("turned 20 to 25 degrees left", None),
        (
            "The head is turned about twenty-five degrees to the left, raised 10 degrees and tilted 5 degrees right.",
            "25",
        ),
        ("turned 25° left", "25"),
        ("0 degrees", "0"),
        ("−25 degrees", None),
        ("turned 25 degrees left. turned 5 degrees right.", None),
    ],
    "pitch": [
        ("lowered 10 degrees", "-10"),
        ("raised by 10 degrees", "10"),
        ("level", "0"),
        ("10 degrees up", "10"),
        ("10 degrees left", None),
        ("eye level", None),
        ("raised 10 degrees and lowered 5 degrees", None),
    ],
    "roll": [
        ("tilted 5 degrees right", "5"),
        ("tilted 5 degrees left", "-5"),
        ("upright", "0"),
        ("5 degrees clockwise", "5"),
        ("turned 5 degrees right", None),
        ("leaning 5 degrees to the left", "-5"),
    ],
    "caption": [
        ("A woman with brown hair, 35 years old.", "age=35;gender=female;hair_color=Brown_Hair"),
        ("A photo.", None),
        ("A man without glasses, with a hat.", "Wearing_Hat=yes;gender=male"),
        ("A man. Maybe a hat.", "gender=male"),
        ("A man with brown hair. A man with black hair.", "gender=male"),
        ("no hat, no beard, no eyewear", None),
    ],
}


def known(**true):
    """Attributes of a row in which every name of the vocabulary is known."""
    names = [o.value for item in ATTRIBUTES.items if item.form == "choice" for o in item.options]
    names += [item.name for item in ATTRIBUTES.items if item.form == "boolean"]
    return pairs({name: name in true for name in names})


def full_row(**change):
    attributes = known(Short_Hair=1, Brown_Hair=1, No_Beard=1, Eyeglasses=1, Blue_Eyes=1, Wearing_Hat=1)
    row = {"attributes": attributes, "expression": "fear", "age": 37.4000015, "gender": "female", "caption": None}
    return row | {"yaw": -23.0, "pitch": 1.0, "roll": 19.0, "skin_tone": 5} | change


@pytest.mark.parametrize(("item", "text", "value"), [(i, t, v) for i, answers in ANSWERS.items() for t, v in answers])
def test_parser_reads_what_is_said_and_no_more(item, text, value):
    assert TASK_OF[item].parse(item, text) == value


def test_parser_refuses_what_is_too_long_to_be_an_answer():
    assert TASK_OF["gender"].parse("gender", "a woman " * (MAX_TEXT // 8)) == "female"
    assert TASK_OF["gender"].parse("gender", "a woman " * (MAX_TEXT // 8 + 1)) is None


@pytest.mark.parametrize("question", [q for q in EVERY if q.options], ids=lambda q: q.item)
def test_every_option_is_read_back_from_its_text_and_its_value(question):
    task = tasks.get(question.task)
    for option in question.options:
        signed = question.task == "head_pose" and option.value != "0"  # whose sign could mean either side
        written = (option.text,) if signed else (option.text, option.value)
        for text in (*written, option.text.upper(), f"{option.text.capitalize()}."):
            assert task.parse(question.item, text) == option.value, text
        assert task.option_for(question.item, option.value) == option


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


def test_phrases_are_plain_lower_case_words_and_sides_stand_alone():
    for phrase in phrases():
        assert re.fullmatch(r"[a-z0-9]+( [a-z0-9]+)*", phrase)
        assert not re.search(r"\w(left|right)|(left|right)\w", re.sub("upright|fright", "", phrase))


def test_mirroring_swaps_the_sides_of_yaw_and_roll():
    for item in ("yaw", "roll"):
        for option in next(q for q in QUESTIONS if q.item == item).options:
            swap = {"left": "right", "right": "left"}
            mirrored = " ".join(swap.get(word, word) for word in option.text.split())
            assert float(TASK_OF[item].parse(item, mirrored)) == -float(option.value)


def test_signs_of_the_pose_are_those_of_300w_lp():
    say = {item: TASK_OF[item].option_for(item, "20").text for item in ("yaw", "pitch", "roll")}
    assert say == {"yaw": "turned 20 degrees left", "pitch": "raised 20 degrees", "roll": "tilted 20 degrees right"}


def test_questions_are_short_and_in_several_wordings():
    for question in EVERY:
        assert 2 <= len(question.templates) <= 3
        assert len(set(question.templates)) == len(question.templates)
        assert all(3 <= len(text.split()) <= 14 for text in question.templates), question
    texts = [text for question in EVERY for text in question.templates]
    assert len(set(texts)) == len(texts)


def test_grids_and_vocabularies_are_the_agreed_ones():
    values = {q.item: [o.value for o in q.options] for q in QUESTIONS}
    assert values["age"] == [str(n) for n in range(5, 86, 5)]
    assert values["yaw"] == [str(n) for n in range(-60, 61, 5)]
    assert values["pitch"] == [str(n) for n in range(-25, 26, 5)]
    assert values["roll"] == [str(n) for n in range(-20, 21, 5)]
    assert values["expression"] == ["neutral", "happiness", "sadness", "surprise", "fear", "disgust", "anger"]
    assert values["gender"] == ["female", "male"]
    assert values["caption"] == []
    assert [tasks.get(n).metric for n in ("attributes", "expression", "age", "gender", "head_pose", "caption")] == [
        "balanced_accuracy",
        "accuracy",
        "mae",
        "balanced_accuracy",
        "mae",
        "fact_f1",
    ]


def test_renderer_and_tasks_share_one_vocabulary():
    sampling = pytest.importorskip("facemllm.heads.sampling")
    values = {q.item: tuple(o.value for o in q.options) for q in QUESTIONS}
    assert values["hair_style"] == sampling.HAIR_STYLES
    assert values["hair_color"] == sampling.HAIR_COLORS
    assert values["beard"] == sampling.BEARDS
    assert values["eyewear"] == sampling.EYEWEAR
    assert values["eye_color"] == sampling.EYE_COLORS
    assert values["expression"] == sampling.EXPRESSIONS


def test_labels_are_exact_and_options_the_nearest():
    row = full_row()
    assert TASK_OF["age"].label(row, "age") == "37.4"
    assert TASK_OF["age"].option_for("age", "37.4").value == "35"
    assert [TASK_OF["age"].option_for("age", v).value for v in ("0", "37.5", "37.51", "200")] == ["5", "35", "40", "85"]
    assert TASK_OF["yaw"].label(row, "yaw") == "-23"
    assert TASK_OF["yaw"].option_for("yaw", "-23").text == "turned 25 degrees right"
    assert TASK_OF["yaw"].label({"yaw": -1e-7}, "yaw") == "0"
    assert TASK_OF["expression"].label(row, "expression") == "fear"


def test_what_is_unknown_has_no_label():
    empty = {"attributes": None}
    assert {q.item: tasks.get(q.task).label(empty, q.item) for q in QUESTIONS} == dict.fromkeys(TASK_OF)
    assert {q.item: tasks.get(q.task).phrase(empty, q.item) for q in QUESTIONS} == dict.fromkeys(TASK_OF)
    assert TASK_OF["age"].label({"age": float("nan")}, "age") is None
    assert TASK_OF["expression"].label({"expression": "contempt"}, "expression") is None
    assert TASK_OF["gender"].label({"gender": "unknown"}, "gender") is None


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
    assert ATTRIBUTES.label({"attributes": attributes}, "eyewear") == label


def test_absent_things_are_answered_but_not_mentioned():
    row = full_row()
    assert ATTRIBUTES.label(row, "beard") == "No_Beard"
    assert ATTRIBUTES.phrase(row, "beard") is None
    assert ATTRIBUTES.label(row, "Bangs") == "no"
    assert ATTRIBUTES.phrase(row, "Bangs") is None
    assert ATTRIBUTES.phrase(row, "Wearing_Hat") == "a hat"
    assert ATTRIBUTES.phrase(row, "eyewear") == "glasses"


def test_caption_facts_are_sorted_and_leave_out_what_is_absent():
    stated = caption.facts_text(caption.facts(full_row()))
    assert stated == (
        "Wearing_Hat=yes;age=35;expression=fear;eye_color=Blue_Eyes;eyewear=Eyeglasses;gender=female"
        ";hair_color=Brown_Hair;hair_style=Short_Hair;pitch=0;roll=20;yaw=-25"
    )
    assert tasks.get("caption").label(full_row(caption="A woman, no hat."), "caption") == "gender=female"
    with pytest.raises(ValueError, match="open question"):
        tasks.get("caption").option_for("caption", "age=35")


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({}, {}),
        (
            {"gender": "male", "age": 17.9, "skin_tone": 3},
            {"gender": "male", "age_band": "child", "skin_tone": "light"},
        ),
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
    assert tasks.question_text(turn) == tasks.question_of(turn).templates[1]
    for template in ("hair_color/9", "hair_color", "hair_color/-1", "age/0", "hair_color/²"):
        with pytest.raises(UserError, match="no template"):
            tasks.question_of({"task": "attributes", "template": template})


def test_unknown_task_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="known tasks: caption, action_unit_intensity"):
        tasks.get("identity")


def test_draw_is_pinned():
    assert [draw(3, "image", item) for item in ("age", "gender", "yaw", "Bangs")] == [2, 0, 0, 0]
    counts = [0, 0, 0]
    for number in range(3000):
        counts[draw(3, str(number), "age")] += 1
    assert min(counts) > 900


def test_tasks_do_not_import_torch_or_ray():
    modules = "facemllm.tasks, facemllm.reformat.run, facemllm.validate.run, facemllm.annotate.run"
    code = f"import sys, {modules}; print({{'torch', 'ray'}} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize("room", ["ingest.run", "reformat.run", "train.launch", "evaluate.run"])
def test_a_tasks_code_counts_where_it_is_asked_and_only_there(room):
    folder = digests.PACKAGE / "tasks"
    counted = {path.stem for path in digests.code_files(f"facemllm.{room}", ("age",)) if path.parent == folder}
    asked = {name for name in tasks.all_names() if name in counted}
    assert asked == (set() if room == "ingest.run" else {"age"})
