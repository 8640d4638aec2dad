"""The grammar of paraphrases: many wordings, the same each time, none that evaluation keeps, each found again."""

import csv
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import facemllm.tasks.wordings
from facemllm import tasks
from facemllm.tasks import asking
from facemllm.tasks.paraphrases import Topic, admitted, expand, normal, paraphrases
from facemllm.tasks.wordings import kept, written
from facemllm.train.data import mirror_text
from tests.unit.test_tasks_asking import ROWS

NAMES = [name for name in tasks.all_names() if name != "zero_shot"]
ITEMS = [item for name in NAMES for item in tasks.get(name).items]
ASKED = [i for n in ("attributes", "expression", "age", "gender", "head_pose") for i in tasks.get(n).items]


def rows_of(name):
    with Path(facemllm.tasks.wordings.__file__).with_name(name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_pattern_gives_all_its_texts():
    assert expand("is [the|this] hat [very] big") == [
        "is the hat very big",
        "is the hat big",
        "is this hat very big",
        "is this hat big",
    ]


def test_items_have_many_wordings_that_differ_and_fit_into_a_template():
    for item in ASKED:
        assert 100 <= len(item.paraphrases) <= 350, item.name
    for item in ITEMS:
        assert len(item.paraphrases) >= 13
        assert len(set(item.wordings)) == len(item.wordings)
        assert len(item.templates) + len(item.paraphrases) < 10_000
        assert all(text.strip() == text and len(text.split()) <= 30 for text in item.paraphrases)


def test_they_are_worded_in_many_ways():
    for item in ASKED:
        texts = [text.casefold() for text in item.paraphrases]
        assert len({text.split()[0] for text in texts}) >= 15, item.name
        marks = Counter(text[-1] if text[-1] in "?." else "" for text in texts)
        assert min(marks.values()) >= 8, item.name
        assert any(text[0].islower() for text in item.paraphrases)
    hair = " ".join(text.casefold() for text in tasks.get("attributes").item("hair_color").paraphrases)
    assert re.search(r"\bcolour\b", hair)
    assert re.search(r"\bcolor\b", hair)
    assert "what's" in hair


def test_no_wording_that_evaluation_keeps_is_ever_made():
    made = {normal(text) for item in ITEMS for text in item.paraphrases if item.name != "unanswerable_new"}
    made |= {normal(mirror_text(text)) for item in ITEMS for text in item.templates if item.name != "unanswerable_new"}
    made |= {normal(mirror_text(text)) for i in ITEMS for text in i.paraphrases if i.name != "unanswerable_new"}
    kept = {normal(text): text for item in ITEMS for text in item.unseen}
    kept |= {normal(text): text for text in tasks.get("unanswerable").item("unanswerable_new").templates}
    assert not made & set(kept)
    for item in ITEMS:
        longer = [f" {words} " for text in item.unseen if (words := normal(text)).count(" ") >= 3]
        said = [f" {normal(text)} " for text in item.paraphrases if item.name != "unanswerable_new"]
        assert not [text for text in said if any(words in text for words in longer)]


def test_wordings_by_others_are_of_items_that_are_asked_and_ask_what_no_template_does():
    rows = rows_of("kept_wordings.csv")
    assert all(row["item"] in {item.name for item in ITEMS} and row["question"].strip() for row in rows)
    said = [normal(row["question"]) for row in rows]
    assert len(set(said)) == len(said)
    assert not set(said) & {
        normal(text) for item in ITEMS for text in item.templates if item.name != "unanswerable_new"
    }
    for item in ASKED:
        assert set(kept(item.name)) <= set(item.unseen)
        assert not rows or len(kept(item.name)) >= 12, item.name


def test_wordings_written_for_training_are_asked_as_they_stand_but_for_those_that_evaluation_keeps():
    rows = rows_of("training_wordings.csv")
    assert all(row["item"] in {item.name for item in ITEMS} and row["question"].strip() for row in rows)
    assert len({normal(row["question"]) for row in rows}) == len(rows)
    sided = {row["item"] for row in rows if re.search(r"\b(?:left|right)\b", row["question"], re.IGNORECASE)}
    assert sided == {"yaw", "roll"}, "a mirror would swap the word"
    assert not [row for row in rows if "earring" in row["question"].lower()], "held out by default"
    for item in ITEMS:
        said = {normal(text) for text in item.paraphrases}
        left = [text for text in written(item.name) if normal(text) not in said]
        assert len(left) <= 0.03 * len(written(item.name)), left
    assert {item.name for item in ASKED if not written(item.name)} == {"Wearing_Earrings"}, "held out of training"
    asked = ("IS THAT A HAT", "hat?", "A cap, then?", "a cap then")
    assert admitted(asked, ("Hat?",), ("Is that a hat?",)) == ("A cap, then?",)


def test_a_kept_wording_is_left_out_in_whatever_spelling_and_with_what_stands_before_it():
    topic = Topic(direct=("what [color|colour] is the hair", "which hair is it"))
    assert any("what" in text.casefold() for text in paraphrases(("Hair?",), (), topic))
    left = paraphrases(("Hair?",), ("WHAT COLOUR is the hair",), topic)
    assert left
    assert all("hair is it" in text.casefold() for text in left)
    sided = Topic(direct=("how far is it turned left",))
    assert paraphrases(("Turned?",), ("How far is it turned right?",), sided) == ()


def test_no_two_items_share_a_wording():
    owners: dict[str, set[str]] = {}
    for item in ITEMS:
        for text in item.wordings:
            owners.setdefault(normal(text), set()).add(item.name)
    assert [names for names in owners.values() if len(names) > 1] == []


def test_they_are_the_same_in_every_process():
    code = (
        "from facemllm import tasks; from facemllm.core.digests import of_json;"
        "print(of_json([i.paraphrases for n in ('attributes', 'head_pose', 'landmarks', 'unanswerable')"
        " for i in tasks.get(n).items]))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": s}
        ).stdout
        for s in ("1", "2")
    }
    assert len(found) == 1


def test_a_mirrored_item_has_the_mirrored_wordings():
    landmarks = tasks.get("landmarks")
    for part in ("eye", "eyebrow"):
        left, right = (landmarks.item(f"{side}_{part}_region") for side in ("left", "right"))
        assert [mirror_text(text) for text in left.paraphrases] == list(right.paraphrases)
    for item in ITEMS:
        for text in item.paraphrases:
            assert mirror_text(mirror_text(text)) == text
            assert not re.search(r"clockwise|lfet|rihgt|letf|rigth", text)


@pytest.mark.parametrize("name", ["attributes", "expression", "age", "head_pose", "caption", "parsing"])
def test_training_is_asked_in_many_wordings_and_each_is_found_again(name):
    task = tasks.get(name)
    used: Counter[str] = Counter()
    for number in range(400):
        row = dict(ROWS[number % len(ROWS)], image_id=str(number), split="train")
        for item in task.items:
            asked = asking.ask(task, item, asking.NATIVE, row)
            if asked is None:
                continue
            question = tasks.question_of({"task": name, "template": asked.template, "options": None})
            assert question == asked.question
            assert question.templates[int(asked.template.partition("/")[2])] == asked.text
            assert asked.text in (*item.templates, *item.paraphrases)
            assert asked == asking.ask(task, item, asking.NATIVE, dict(row, age=row["age"]))
            used[item.name, asked.text in item.templates] += 1
            plain = asking.ask(task, item, asking.NATIVE, row | {"split": "test"})
            assert plain.text in item.templates
    for item in task.items:
        asked_so = [used[item.name, native] for native in (True, False)]
        assert sum(asked_so) == 0 or 0.15 < asked_so[0] / sum(asked_so) < 0.35, item.name
