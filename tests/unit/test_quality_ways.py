"""The checks on conversations that are asked in every way: sound ones pass, and a wrong answer in any way is found."""

import pytest

from facemllm import settings, tasks
from facemllm.reformat.run import reformat
from facemllm.tables import CONVERSATIONS, FACES, TableWriter, open_table
from facemllm.tasks.asking import VARIANTS
from facemllm.validate.conversations import conversations_frame
from facemllm.validate.memory import Labels, Tallies
from tests.asked import with_attributes
from tests.conftest import face

ASKED = (
    "caption, attributes, expression, age, gender, head_pose, presence, description, landmarks, parsing, unanswerable"
)
TASKS = f"reformat.tasks=[{ASKED}]"
FORMS = "reformat.forms={native: 1, statement: 1, lettered: 1, dialogue: 1}"
CHECKS = ("answers_match_labels", "answers_in_options", "questions_known", "replies_say_answers", "image_known")


@pytest.fixture(scope="module")
def in_every_way(tmp_path_factory):
    """A faces table with all labels, some of what is asked hidden, and the conversations about it in every way."""
    folder = tmp_path_factory.mktemp("ways")
    rows = with_attributes(map(face, range(40)), "This is a man with earrings. The person has brown hair.")
    with TableWriter(folder / "faces", FACES) as table:
        table.write(rows)
    limits = settings.load("laptop", [TASKS, FORMS, "reformat.held_out=[Wearing_Earrings]"])
    reformat(limits, folder / "faces", folder / "talks")
    return folder / "faces", folder / "talks"


def checked(faces, talks):
    table = open_table(talks, CONVERSATIONS)
    labels = Labels(table.manifest["about"])
    for row in open_table(faces, FACES).iterate():
        mask = row["segmentation"]
        labels.add({name: value for name, value in row.items() if name not in ("image", "segmentation")}, mask["bytes"])
    return conversations_frame(table, labels, Tallies())


def test_sound_conversations_pass_in_every_way(in_every_way):
    frame = checked(*in_every_way)
    asked = [turn for row in open_table(in_every_way[1]).iterate() for turn in row["turns"]]
    assert {tasks.question_of(turn).variant for turn in asked} == set(VARIANTS)
    for check in CHECKS:
        assert frame[check].all(), frame[~frame[check]].iloc[0].to_dict()


@pytest.mark.parametrize("way", VARIANTS)
def test_a_wrong_answer_is_found_in_every_way(way, in_every_way, tmp_path):
    faces, talks = in_every_way
    table, rows, wrong = open_table(talks, CONVERSATIONS), [], []
    for number, row in enumerate(table.iterate()):
        for place, turn in enumerate(row["turns"]):
            others = [value for value in turn["options"] if value != turn["answer"]]
            if others and tasks.question_of(turn).variant == way and turn["form"] != "number":
                question = tasks.question_of(turn)
                turn["answer"] = others[0]
                reply = next(option.text for option in question.options if option.value == others[0])
                row["messages"][2 * place + 1]["content"][0]["text"] = reply
                wrong.append(number)
                break
        rows.append(row)
    with TableWriter(tmp_path / "wrong", CONVERSATIONS, about=table.manifest["about"]) as made:
        made.write(rows)
    frame = checked(faces, tmp_path / "wrong")
    assert wrong
    assert list(frame.index[~frame["answers_match_labels"]]) == wrong
    assert frame["replies_say_answers"].all()
