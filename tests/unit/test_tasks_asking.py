"""Ways to ask: what is put about a face is found again from the stored turn, and its true answer is read back."""

import random
from hashlib import sha256

import numpy as np
import pytest

from facemllm import tasks
from facemllm.tables.schemas import SEGMENTATION
from facemllm.tasks import age_range, asking, ethnicity, expression_135, expression_compound
from facemllm.tasks.base import Option, Task
from facemllm.tasks.wordings import kept
from tests.pictures import encode
from tests.refusing import refuses

NAMES = tasks.all_names()
CLOSED_WAYS = (asking.NATIVE, asking.UNSEEN, asking.STATEMENT, asking.LETTERED)
MOODS = ("neutral", "happiness", "sadness", "contempt", "grief", *expression_compound.ELEVEN)


def segmentation(classes):
    """A PNG that shows each of these classes in a row of its own."""
    rows = np.repeat(np.array([0, *sorted(classes)], np.uint8)[:, None], 40, axis=1)
    return {"bytes": encode(np.repeat(rows, 2, axis=0)), "path": None}


def random_row(seed):
    """A row of `faces` with most labels known, in contradiction nowhere."""
    chance = random.Random(seed)
    known = {}
    for name in ("presence", "presence_of_persons", "attributes"):
        for item in tasks.get(name).items:
            if item.form == "boolean":
                known[item.name] = chance.choice([True, False])
    for item in tasks.get("attributes").items:
        if item.form == "choice":
            true = chance.choice(item.options).value
            known |= {option.value: option.value == true for option in item.options}
    source = chance.choice(["render", "disfa", "bp4d", "emo135", *ethnicity.SCHEMES])
    category = chance.choice(ethnicity.SCHEMES[source][1]) if source in ethnicity.SCHEMES else None
    points = [[chance.uniform(0, 128), chance.uniform(0, 128)] for _ in range(chance.choice([5, 68]))]
    units = {f"AU{n}": float(chance.choice([0, 1] if source == "bp4d" else range(6))) for n in range(1, 27)}
    visible = [n for n in range(1, len(SEGMENTATION)) if chance.random() < 0.7]
    return {
        **{"image_id": sha256(str(seed).encode()).hexdigest(), "source": source, "attributes": known},
        "expression": chance.choice(["happiness", *MOODS] if source != "emo135" else expression_135.NAMES),
        "age": chance.choice([None, chance.uniform(0, 100)]),
        "age_range": chance.choice([None, "4-19", *age_range.RANGES]),
        **{"gender": chance.choice(["female", "male"]), "ethnicity": category},
        **{name: chance.uniform(-most, most) for name, most in (("yaw", 60), ("pitch", 25), ("roll", 20))},
        **{"width": 128, "height": 128, "landmarks": points, "action_units": units},
        **{"segmentation": segmentation(visible), "caption": "A woman with brown hair, about 35 years old."},
    }


ROWS = [random_row(seed) for seed in range(150)]


def turn_of(task, asked):
    values = [option.value for option in asked.question.options]
    return {"task": task.name, "template": asked.template, "options": values}


def check(task, asked):
    """The stored turn leads back to the question, and the true reply to the answer."""
    question = asking.question_of(task, turn_of(task, asked))
    assert question == asked.question
    assert question.templates[int(asked.template.rpartition("/")[2])] == asked.text
    read = asking.read(task, question, asked.reply)
    if question.form == "number":
        assert read == task.item(question.item).option_for(asked.answer).value
    else:
        assert read == asked.answer, (asked.text, asked.reply)


@pytest.mark.parametrize("way", CLOSED_WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_every_way_leads_from_the_row_to_the_question_and_back_to_the_answer(name, way):
    task, count = tasks.get(name), 0
    for row in ROWS[: 150 if name != "zero_shot" else 20]:
        for item in task.items:
            if (asked := asking.ask(task, item, way, row)) is not None:
                assert asked.question.task == name
                assert asked.question.item == item.name
                assert asked.question.variant == way
                check(task, asked)
                count += 1
    askable = {asking.UNSEEN: "unseen", asking.STATEMENT: "claims"}.get(way)
    if way == asking.LETTERED:
        expected = any(item.form in ("choice", "boolean") for item in task.items)
    else:
        expected = askable is None or any(getattr(item, askable) for item in task.items)
    assert (count > 0) == expected


def test_every_item_has_a_label_somewhere_and_unseen_wordings_but_for_captions():
    for name in NAMES:
        for item in tasks.get(name).items:
            assert any(item.label(row) is not None for row in ROWS), item.name
            own = [text for text in item.unseen if text not in kept(item.name)]
            assert len(own) in ((0,) if item.form == "open" else (1, 2)), item.name


def test_dialogues_lead_back_too_and_their_later_turns_depend_on_a_yes():
    task, openings = tasks.get("attributes"), []
    for row in ROWS:
        asked = asking.dialogue(task, row)
        assert len(asked) != 1
        before = None
        for one in asked:
            check(task, one)
            if one.question.claim == asking.PRESENT:
                openings.append(one.answer)
            else:
                assert before.reply == "yes"
                assert before.question.item == one.question.item
                assert asking.implied(task, before.question, one.answer) == before.answer
            before = one
    assert {"yes", "no"} == set(openings)
    assert asking.dialogue(task, {"image_id": "a", "attributes": {}}) == []
    assert asking.dialogue(tasks.get("age"), ROWS[0]) == []


def test_a_dialogue_by_hand():
    task = tasks.get("attributes")
    known = {option.value: option.value == "No_Beard" for option in task.item("beard").options}
    known |= {option.value: option.value == "Sunglasses" for option in task.item("eyewear").options}
    said = {
        tuple((one.question.item, one.question.claim, one.reply) for one in asking.dialogue(task, row))
        for row in ({"image_id": str(n), "attributes": known} for n in range(20))
    }
    beard, eyes = ("beard", "present", "no"), (("eyewear", "present", "yes"), ("eyewear", None, "sunglasses"))
    assert said == {(beard, *eyes), (*eyes, beard)}


def test_half_of_the_statements_are_true_whatever_the_label():
    for name, item in (("attributes", "Wearing_Hat"), ("attributes", "hair_color"), ("gender", "gender")):
        task = tasks.get(name)
        row = dict(ROWS[0], gender="male")
        asked = [asking.ask(task, task.item(item), "statement", row | {"image_id": str(n)}) for n in range(2000)]
        label = task.item(item).label(row)
        assert 900 < sum(one.answer == "true" for one in asked) < 1100
        for one in asked:
            assert (one.question.claim == label) == (one.answer == "true")
            assert asking.implied(task, one.question, label) == one.answer


def test_claims_read_well():
    claims = {item.name: item.claims for name in NAMES for item in tasks.get(name).items}
    assert claims["Wearing_Hat"] == {"yes": "a hat can be seen", "no": "a hat cannot be seen"}
    assert claims["expression"]["fear"] == "the face looks fearful"
    assert claims["gender"]["female"] == "this is a woman"
    assert claims["age"] == claims["visible_parts"] == claims["caption"] == {}


def test_options_behind_letters_hold_the_truth_in_an_order_of_their_own():
    task = tasks.get("attributes")
    item, orders, places = task.item("hair_color"), set(), [0] * asking.SHOWN
    known = {option.value: option.value == "Red_Hair" for option in item.options}
    for number in range(800):
        row = {"image_id": str(number), "attributes": known}
        asked = asking.ask(task, item, "lettered", row)
        values = tuple(option.value for option in asked.question.options)
        assert len(values) == asking.SHOWN == len(set(values))
        assert values[-1] == asking.NOT_VISIBLE
        assert values["ABCDEFGH".index(asked.reply)] == "Red_Hair" == asked.answer
        assert f"{asked.reply}. red hair" in asked.text
        orders.add(values)
        places[values.index("Red_Hair")] += 1
        other = asking.ask(task, item, "lettered", row | {"age": 3.0, "source": "celeba", "split": "test"})
        assert other == asked
    assert len(orders) > 500
    assert min(places[:-1]) > 70
    assert places[-1] == 0


GRIEF = {"source": "emo135", "expression": "grief"}


def test_of_many_options_some_are_shown_and_always_the_true_one():
    task, places = tasks.get("expression_135"), [0] * asking.SHOWN
    for number in range(400):
        asked = asking.ask(task, task.items[0], "lettered", GRIEF | {"image_id": str(number)})
        assert len(asked.question.options) == asking.SHOWN
        places["ABCDEFGH".index(asked.reply)] += 1
    assert min(places) > 25


def test_what_the_labels_say_is_hidden_is_answered_as_not_visible():
    task = tasks.get("attributes")
    rows = {
        "hair_color": ({"Bald": True}, None),
        "hair_style": ({"Wearing_Hat": True}, segmentation([1, 2, 14])),
        "eye_color": ({"Sunglasses": True}, None),
    }
    for name, (attributes, mask) in rows.items():
        row = {"image_id": "a", "attributes": attributes, "segmentation": mask}
        asked = asking.ask(task, task.item(name), "lettered", row)
        assert asked.answer == asking.NOT_VISIBLE
        check(task, asked)
        assert asking.ask(task, task.item(name), "native", row) is None
        assert asking.ask(task, task.item(name), "lettered", {"image_id": "a", "attributes": {}}) is None
    assert asking.ask(task, task.item("beard"), "lettered", {"image_id": "a", "attributes": {}}) is None


def test_names_of_items_are_unique_and_wordings_of_training_and_evaluation_disjoint():
    items = [item for name in NAMES if name != "zero_shot" for item in tasks.get(name).items]
    assert len({item.name for item in items}) == len(items)
    trained = {text for item in items for text in item.templates}
    for name in NAMES:
        for follow in tasks.get(name).follow_ups:
            trained |= {*follow.templates, *follow.opener.templates}
    unseen = [text for item in items for text in item.unseen]
    assert len(set(unseen)) == len(unseen)
    assert not trained & set(unseen)


def test_implied_answers_of_the_other_ways():
    task = tasks.get("attributes")
    row = ROWS[0]
    label = task.item("hair_color").label(row)
    for way in ("unseen", "lettered"):
        asked = asking.ask(task, task.item("hair_color"), way, row)
        assert asking.implied(task, asked.question, label) == label
    eyes = tasks.question_of({"task": "attributes", "template": "beard:dialogue=present/0"})
    assert [asking.implied(task, eyes, value) for value in ("No_Beard", "Goatee")] == ["no", "yes"]
    letters = {"task": "attributes", "template": "eyewear:lettered/0", "options": ["Sunglasses", "No_Eyewear"]}
    assert asking.implied(task, tasks.question_of(letters), "Eyeglasses") is None


@pytest.mark.parametrize(
    "template",
    [
        *("statement/0", "statement=Green_Hair/0", "statement=Brown_Hair/9", "unseen=Brown_Hair/0", "unseen/99"),
        *("lettered/0", "lettered/0 Brown_Hair Green_Hair", "lettered=Brown_Hair/0 Brown_Hair", "sung/0"),
        *("dialogue=gone/0", "dialogue/0"),
    ],
)
def test_unknown_wordings_are_refused(template):
    way, *options = template.split()
    item = "hair_style" if way == "dialogue/0" else "hair_color"
    turn = {"task": "attributes", "template": f"{item}:{way}", "options": options or None}
    refuses("no template", tasks.question_of, turn)


def test_a_new_task_is_a_task_like_any_other():
    item = tasks.get("gender").items[0]
    made = Task(name="made", metric="accuracy", unit="", items=(item,), use="a test")
    asked = asking.ask(made, made.items[0], "native", ROWS[0])
    assert asked.question.task == "made"
    assert Option(value="male", text="a man") in asked.question.options
