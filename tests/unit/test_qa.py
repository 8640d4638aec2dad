"""Faces to conversations: which turns, in which words, under which names, and that the table trains as it is."""

import pytest

from facemllm import settings, tasks
from facemllm.reformat.run import reformat
from facemllm.tables import CONVERSATIONS, mapping, open_table, pairs
from facemllm.version.tombstones import Marks, Tombstones
from tests.asked import conversation, with_attributes
from tests.refusing import refuses

ALL = [tasks.get(name) for name in ("caption", "attributes", "expression", "age", "gender", "head_pose")]


@pytest.fixture(scope="module")
def laptop():
    """The default tasks, asked outright, nothing held out."""
    nothing = ["reformat.held_out=[]", "reformat.held_out_combinations=[]"]
    return settings.load("laptop", [*nothing, "reformat.forms.statement=0", "reformat.unseen_wordings=false"])


@pytest.fixture
def rows(face_rows):
    """Faces that say something about every question."""
    return lambda count=40: with_attributes(face_rows(count), "A woman with brown hair.")


def text_of(message):
    return message["content"][-1]["text"]


def test_a_conversation_asks_all_that_is_known(rows):
    made = conversation(rows(1)[0], ALL)
    asked = [(turn["task"], turn["template"].split("/")[0]) for turn in made["turns"]]
    assert asked == [(q.task, q.item) for task in ALL for q in task.questions()]
    assert set(made) == set(CONVERSATIONS.names)
    assert mapping(made["groups"]) == {"gender": "female", "age_band": "young", "skin_tone": "light"}
    assert made["segmentation"] == rows(1)[0]["segmentation"]
    assert made["images"] == [rows(1)[0]["image"]]


def test_messages_are_a_chat_with_the_image_first(rows):
    made = conversation(rows(1)[0], ALL)
    roles = [message["role"] for message in made["messages"]]
    assert roles == ["user", "assistant"] * len(made["turns"])
    kinds = [[part["type"] for part in message["content"]] for message in made["messages"]]
    assert kinds == [["image", "text"]] + [["text"]] * (len(roles) - 1)
    assert made["messages"][0]["content"][0] == {"type": "image", "text": None}
    # the caption is answered as annotated, and marked by its facts
    assert made["turns"][0]["answer"] == "gender=female;hair_color=Brown_Hair"
    assert text_of(made["messages"][1]) == "A woman with brown hair."


def test_turns_agree_with_their_messages_and_every_wording_is_used(rows):
    used = set()
    for row in rows():
        made = conversation(row, ALL)
        for turn, asked, answered in zip(made["turns"], made["messages"][::2], made["messages"][1::2], strict=True):
            question, task = tasks.question_of(turn), tasks.get(turn["task"])
            used.add(turn["template"])
            assert text_of(asked) == question.templates[int(turn["template"].rpartition("/")[2])]
            assert turn["form"] == question.form
            assert turn["options"] == [option.value for option in question.options]
            assert turn["follows"] is False
            assert turn["answer"] == (label := task.item(question.item).label(row))
            said = task.item(question.item).parse(text_of(answered))
            assert said == (task.item(question.item).option_for(label).value if question.form == "number" else label)
    few = {f"{q.item}/{n}" for task in ALL for q in task.questions() for n in range(len(q.templates))}
    many = {f"{i.name}/{n}" for task in ALL for i in task.items for n in range(len((*i.templates, *i.paraphrases)))}
    assert few <= used <= many


def test_unknown_labels_give_no_question(rows):
    row = rows(1)[0] | {"age": None, "expression": None, "attributes": pairs({"Bangs": True}), "caption": None}
    asked = [turn["template"].split("/")[0] for turn in conversation(row, ALL)["turns"]]
    assert asked == ["Bangs", "gender", "yaw", "pitch", "roll"]
    nothing = row | dict.fromkeys(("attributes", "gender", "yaw", "pitch", "roll"))
    assert conversation(nothing, ALL) is None


def test_wordings_and_names_of_turns_do_not_depend_on_other_tasks_or_rows(rows):
    row = rows(1)[0]
    alone = {turn["sample_id"] for task in ALL for turn in conversation(row, [task])["turns"]}
    together = conversation(row, ALL)["turns"]
    assert alone == {turn["sample_id"] for turn in together}
    without_age = conversation(row | {"age": None}, ALL)["turns"]
    assert [turn for turn in together if turn["task"] != "age"] == without_age


def test_a_conversation_is_named_by_all_its_content(rows):
    row = rows(1)[0]
    name = conversation(row, ALL)["conversation_id"]
    assert name == conversation(dict(row), ALL)["conversation_id"]
    changes = [{"split": "test"}, {"caption": "A woman."}, {"age": 77.0}, {"segmentation": None}, {"subject_id": "x"}]
    changed = {conversation(row | change, ALL)["conversation_id"] for change in changes}
    assert len(changed | {name}) == 1 + len(changes)


def test_table_is_the_same_however_the_faces_are_cut(rows, faces_table, laptop, tmp_path):
    many = [row | {"image_id": f"{n:064x}"} for n, row in enumerate(rows() * 4)]
    whole = reformat(laptop, faces_table(many, name="whole"), tmp_path / "a")
    cut = reformat(laptop, faces_table(many, name="cut", shard_mb=0), tmp_path / "b")
    assert len(open_table(tmp_path / "cut").manifest["shards"]) == 2
    assert whole["shards"] == cut["shards"]
    assert whole["parents"] == [open_table(tmp_path / "whole").digest]
    again = reformat(laptop, tmp_path / "whole", tmp_path / "c")
    assert again["digest"] == whole["digest"]
    samples = [t["sample_id"] for row in open_table(tmp_path / "a").iterate(["turns"]) for t in row["turns"]]
    assert len(set(samples)) == len(samples) == 160 * 17 + sum(row["split"] != "train" for row in many)


def test_caption_is_first_whatever_the_settings_say_and_once(rows, faces_table, laptop, tmp_path):
    asked = laptop.reformat.model_copy(update={"tasks": ["age", "caption", "age", "gender"]})
    shuffled = laptop.model_copy(update={"reformat": asked})
    about = {"sources": ["celeba", "render"], "uses": ["train", "evaluate"]}  # travel on
    manifest = reformat(shuffled, faces_table(rows(2), about=about), tmp_path / "out")
    assert manifest["about"].items() >= (about | {"tasks": ["caption", "age", "gender"]}).items()
    first = next(iter(open_table(tmp_path / "out").iterate()))
    assert [turn["task"] for turn in first["turns"]] == ["caption", "age", "gender"]


def test_a_row_without_questions_is_quarantined(rows, faces_table, laptop, tmp_path):
    silent = ("caption", "attributes", "expression", "age", "gender", "yaw", "pitch", "roll")
    good = rows(3)
    faces = faces_table([good[0], good[1] | dict.fromkeys(silent), good[2]])
    manifest = reformat(laptop, faces, tmp_path / "out")
    assert (manifest["rows"], manifest["quarantined"]) == (2, 1)
    (refused,) = open_table(tmp_path / "out").refused()
    assert refused == {"file": open_table(faces).digest, "row": 1, "reason": "no known label answers a question"}


def test_unknown_task_or_wrong_table_is_refused(laptop, faces_table, conversations_table, tmp_path):
    bad = laptop.model_copy(update={"reformat": laptop.reformat.model_copy(update={"tasks": ["who_is_it"]})})
    refuses("no task 'who_is_it'", reformat, bad, faces_table(), tmp_path / "out")
    refuses("'faces/1' is needed", reformat, laptop, conversations_table(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_forgotten_people_are_not_asked_about(rows, faces_table, laptop, tmp_path):
    made = rows(4)
    settings = laptop.model_copy(update={"storage": laptop.storage.model_copy(update={"home": str(tmp_path / "home")})})
    marks = Marks(subject=frozenset({made[0]["subject_id"]}))
    Tombstones.of(settings).add("subject", marks, reason="asked for it", by="Ada Lovelace")
    manifest = reformat(settings, faces_table(made), tmp_path / "out")
    left = sum(row["subject_id"] != made[0]["subject_id"] for row in made)
    assert 0 < left < 4
    assert (manifest["rows"], manifest["quarantined"]) == (left, 4 - left)
    assert {row["reason"] for row in open_table(tmp_path / "out").refused()} == {"forgotten"}


def test_labels_of_ones_own_that_nothing_is_asked_about_are_said(rows, faces_table, laptop, tmp_path, capsys):
    made = rows(4)
    for place, row in enumerate(made):
        row["source"] = "imagefolder"
        row["attributes"] = pairs({"Eyeglasses": True, "Bangs": False, "Attractive": True, "Blue_Eyes": place > 1})
        row["expression"] = "grumpy" if place else "anger"
    table = faces_table(made)
    manifest = reformat(laptop, table, tmp_path / "own")
    assert manifest["about"]["unasked"] == {"Attractive": 4, "Blue_Eyes": 4, "Eyeglasses": 4, "expression grumpy": 3}
    said = capsys.readouterr().err
    assert (
        "about Eyeglasses (4 faces); add presence to reformat.tasks and presence: 1.0 to the tasks of a stage" in said
    )
    assert "with a reason in reformat.reasons.presence_of_persons" in said
    assert "no task has a question about Blue_Eyes (4 faces), expression grumpy (3 faces)" in said
    asking = laptop.model_copy(update={"reformat": laptop.reformat.model_copy(update={"tasks": ["presence"]})})
    assert "Eyeglasses" not in reformat(asking, table, tmp_path / "asked")["about"]["unasked"]
    assert "unasked" not in reformat(laptop, faces_table(rows(4), "drawn"), tmp_path / "of drawn")["about"]
