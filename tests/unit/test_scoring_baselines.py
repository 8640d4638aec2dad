import numpy as np
import pytest

from facemllm.evaluate.baselines import baselines, training_sheet
from facemllm.scoring.sheet import Answers, read_sheet
from facemllm.scoring.summary import summarise
from facemllm.tables import CONVERSATIONS, TableWriter, open_table
from tests.pictures import encode

TRAIN = [("gender", "gender/0"), ("unanswerable", "unanswerable/0")]
TEST = [*TRAIN, ("gender", "gender:unseen/0"), ("zero_shot", "Wearing_Earrings/0"), ("age", "age/0")]
TEST += [("caption", "caption/0"), ("unanswerable", "unanswerable_new/0")]
OVERRIDES = ["evaluate.bootstrap=100", "evaluate.baseline_pixels=8"]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Women are bright, men are dark; training asks for nothing else."""
    out = tmp_path_factory.mktemp("baselines") / "conversations"
    draw = np.random.default_rng(0)
    with TableWriter(out, CONVERSATIONS) as writer:
        for number in range(60):
            split, asked = ("train", TRAIN) if number < 40 else ("test", TEST)
            shade = draw.integers(0, 100, (16, 16, 3)) + (155 if number % 2 else 0)
            answers = {"gender": ("male", "female")[number % 2], "zero_shot": ("yes", "no")[number // 2 % 2]}
            answers |= {"age": "30", "caption": "age=30"}
            answers["unanswerable"] = "answered" if number % 4 == 1 else "cannot_tell"
            turns = [{"sample_id": f"{number} {name}", "task": task, "template": name} for task, name in asked]
            turns = [{**turn, "options": [], "answer": answers[turn["task"]]} for turn in turns]
            face = {"image_id": f"i{number}", "subject_id": f"p{number}", "split": split, "source": "render"}
            images = [{"bytes": encode(shade.astype(np.uint8)), "path": None}]
            writer.write([{"conversation_id": f"c{number}", **face, "images": images, "turns": turns}])
    return open_table(out, CONVERSATIONS)


def test_what_training_never_asks_is_answered_by_chance_and_other_ways_not_at_all(settings, table):
    sheet = read_sheet(table, "test")
    found = baselines(settings, table, sheet, training_sheet(table))
    constant, linear = found["constant"], found["pixels"]
    for (task, item), rows in sheet.rows.items():
        said = {constant[row] for row in rows}
        known = {"zero_shot": "yes", "age": "45", "caption": None, "unanswerable": "cannot_tell"}
        assert said == {known.get(task, "female")}, (task, item)
        if task != "gender" and item != "unanswerable":
            assert {linear[row] for row in rows} == {None}
    (other,) = sheet.variants.values()
    assert {constant[row] for row in other} == {linear[row] for row in other} == {None}

    figures = summarise(sheet, Answers.of(sheet.answers), found, 100, 0)["tasks"]
    assert figures["gender"]["baselines"] == {"constant": 0.5, "pixels": 1.0}
    assert figures["zero_shot"]["baselines"] == {"constant": 0.5, "pixels": None}
    assert figures["age"]["baselines"] == {"constant": 15.0, "pixels": None}
    assert figures["caption"]["baselines"] == {"constant": None, "pixels": None}
    new = figures["unanswerable"]["items"]["unanswerable_new"]
    assert new["baselines"] == {"constant": 0.5, "pixels": None}
    assert new["recall_by_class"] == {"answered": {"value": 1.0, "n": 5}, "cannot_tell": {"value": 1.0, "n": 15}}
    assert figures["unanswerable"]["recall_by_class"]["cannot_tell"]["n"] == 30
