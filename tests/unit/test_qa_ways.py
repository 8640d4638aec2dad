"""How training and evaluation ask: ways and their shares, dialogue, what is held out, balance, mixture, bad rows."""

import hashlib
import json
import random
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from facemllm import settings, tasks
from facemllm.annotate.annotator import caption
from facemllm.cli.main import app
from facemllm.core import digests
from facemllm.errors import UserError
from facemllm.reformat.questions import Plan, rows_of
from facemllm.reformat.run import reformat
from facemllm.tables import CONVERSATIONS, FACES, TableWriter, mapping, open_table, pairs
from facemllm.tasks import asking
from facemllm.tasks.held_out import HeldOut
from facemllm.tasks.paraphrases import normal
from facemllm.version.tombstones import Marks, Tombstones
from tests.asked import with_attributes
from tests.pictures import encode
from tests.refusing import refuses

NAMES = "caption, attributes, expression, age, gender, head_pose, unanswerable"
DEFAULT = [tasks.get(name) for name in NAMES.split(", ")]
WHOLE = "reformat.held_out_combinations=[]"  # no training face is left out
PLAIN = ("reformat.held_out=[]", "reformat.forms.statement=0", "reformat.unseen_wordings=false")


def face(number, split="train", source="render"):
    """A face that answers every question, with the caption that says so."""
    rng = random.Random(number)
    row = {
        "image_id": hashlib.sha256(f"{source} {number}".encode()).hexdigest(),
        "image": {"bytes": f"picture {number}".encode(), "path": None},
        "source": source,
        "source_id": str(number),
        "subject_id": f"{number:032x}",
        "split": split,
        "expression": rng.choice(("neutral", "happiness")),
        "age": 20.0 + number % 50,
        "gender": rng.choice(("female", "male")),
        "skin_tone": 1 + number % 10,
        **{"yaw": -7.5, "pitch": 0.0, "roll": 3.25},
    }
    (row,) = with_attributes([row], "", seed=number)
    return row | {"caption": caption(row | {"attributes": mapping(row["attributes"])})}


@pytest.fixture
def talks(faces_table, tmp_path):
    """`talks(rows, *overrides)`: the conversations about these faces, as rows, and their manifest."""
    made = iter(range(1000))

    def make(rows, *overrides):
        number = next(made)
        limits = settings.load("laptop", [WHOLE, *overrides])
        manifest = reformat(limits, faces_table(rows, name=f"faces{number}"), tmp_path / f"talks{number}")
        return list(open_table(tmp_path / f"talks{number}", CONVERSATIONS).iterate()), manifest

    return make


def way_of(turn):
    return tasks.question_of(turn).variant


def text_of(message):
    return message["content"][-1]["text"]


def exchanges(row):
    return list(zip(row["turns"], map(text_of, row["messages"][::2]), map(text_of, row["messages"][1::2]), strict=True))


def test_names_are_digests_of_canonical_json(talks):
    odd = face(1) | {"subject_id": None, "source_id": 'a "quoted" \\ näme\n'}
    masked = face(2, "test") | {"segmentation": {"bytes": b"mask", "path": None}}
    rows, _ = talks([odd, masked], "reformat.forms.lettered=1", "reformat.forms.dialogue=1")
    for row, source in zip(rows, (odd, masked), strict=True):
        names = ("image_id", "split", "source", "subject_id", "groups", "messages", "turns")
        mask = source["segmentation"]
        content = {name: row[name] for name in names} | {"segmentation": mask and digests.of_bytes(mask["bytes"])}
        assert row["conversation_id"] == digests.of_json(content)
        for turn in row["turns"]:
            item = tasks.question_of(turn).item
            assert turn["sample_id"] == digests.of_json([row["image_id"], turn["task"], item, turn["template"]])


def test_training_asks_each_item_outright_and_beside_it_in_every_way_with_a_weight(talks):
    rows, manifest = talks(
        [face(n) for n in range(200)],
        "reformat.held_out=[]",
        "reformat.tasks=[attributes, caption, expression, age, gender, head_pose, unanswerable]",
        "reformat.forms={native: 2, statement: 1, lettered: 1, dialogue: 0}",
    )
    said, places = Counter(), Counter()
    items = [item for task in DEFAULT for item in task.items if item.name != "unanswerable_new"]
    for row in rows:
        asked = defaultdict(list)
        for turn in row["turns"]:
            asked[tasks.question_of(turn).item].append(turn)
        assert set(asked) == {item.name for item in items}
        for item in items:
            ways = Counter(map(way_of, asked[item.name]))
            statements = [turn for turn in asked[item.name] if way_of(turn) == "statement"]
            assert ways["native"] == 1
            assert ways["lettered"] == (item.form in ("choice", "boolean"))
            assert len(statements) == min(len(item.claims), asking.CLAIMS)
            assert len({turn["template"].partition("=")[2] for turn in statements}) == len(statements)
            if statements:
                assert [turn["answer"] for turn in statements].count("true") == 1
                said.update(tasks.question_of(turn).claim for turn in statements if item.name == "expression")
                places[statements[0]["answer"]] += 1
    assert len(said) == 7
    assert set(places) == {"true"}
    assert manifest["about"]["forms"] == {
        "native": 2.0,
        "statement": 1.0,
        "lettered": 1.0,
        "dialogue": 0,
        "unseen": True,
    }


def test_evaluation_asks_outright_first_and_then_in_every_way_with_a_weight(talks):
    forms = "reformat.forms={native: 1, statement: 0.1, lettered: 0.1, dialogue: 0}"
    rows, _ = talks([face(n, "test") for n in range(20)], "reformat.held_out=[]", forms)
    plain, _ = talks([face(n, "test") for n in range(20)], *PLAIN)
    for row, native in zip(rows, plain, strict=True):
        ways = [way_of(turn) for turn in row["turns"]]
        assert ways == sorted(ways, key=("native", "unseen", "statement", "lettered").index)
        assert set(ways) == {"native", "unseen", "statement", "lettered"}
        kept = len(native["turns"])
        assert row["turns"][:kept] == native["turns"]
        assert row["messages"][: 2 * kept] == native["messages"]


ALL_FORMS = "reformat.forms={native: 1, statement: 1, lettered: 1, dialogue: 1}"


def test_every_reply_reads_as_its_answer_and_training_uses_no_unseen_wording(talks):
    rows, _ = talks([face(n, split) for n in range(40) for split in ("train", "test")], ALL_FORMS)
    every = [item for name in tasks.all_names() for item in tasks.get(name).items]
    unseen = {normal(wording) for item in every for wording in item.unseen}
    assert unseen
    counts, shown = Counter(), set()
    for row in rows:
        for turn, asked, reply in exchanges(row):
            question = tasks.question_of(turn)
            assert asked == question.templates[int(turn["template"].rpartition("/")[2])]
            counts[question.variant] += 1
            if question.form != "number":
                assert tasks.read(question, reply) == turn["answer"]
            if row["split"] == "train":
                assert normal(asked.split(" A. ")[0]) not in unseen
            else:
                shown.add(normal(asked))
    assert all(counts[way] for way in asking.VARIANTS)
    assert unseen & shown


def test_dialogues_stand_in_a_share_of_the_faces_and_follow_their_opener(talks):
    forms = ("reformat.forms.dialogue=1", "reformat.forms.statement=0")
    rows, _ = talks([face(n) for n in range(120)], "reformat.held_out=[]", *forms)
    with_talk = 0
    for row in rows:
        talk = [n for n, turn in enumerate(row["turns"]) if way_of(turn) == "dialogue"]
        if not talk:
            continue
        with_talk += 1
        assert talk == list(range(talk[0], talk[-1] + 1))
        assert [row["turns"][n]["follows"] for n in talk] == [False] + [True] * (len(talk) - 1)
        items = [tasks.question_of(t).item for t in row["turns"] if way_of(t) != "dialogue"]
        assert not {tasks.question_of(row["turns"][n]).item for n in talk} & set(items)
    assert with_talk / len(rows) == pytest.approx(0.5, abs=0.1)
    assert all(not t["follows"] for row in rows for t in row["turns"] if way_of(t) != "dialogue")


def test_adding_a_source_a_row_or_a_task_moves_no_other_turn(talks):
    forms = (ALL_FORMS, "reformat.balance=0.7")
    ours = [face(n, split) for n in range(30) for split in ("train", "test")]
    alone, _ = talks(ours, *forms)
    others = [face(n, source="celeba") for n in range(20)]
    mixed, _ = talks([*others[:10], *ours, *others[10:]], *forms)
    assert [row for row in mixed if row["source"] == "render"] == alone
    fewer = f"reformat.tasks=[{NAMES}, age_range]"
    more, _ = talks(ours, *forms, fewer)
    for row, before in zip(more, alone, strict=True):
        assert [turn for turn in row["turns"] if turn["task"] != "age_range"] == before["turns"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reformat.reasons.gender=null", r"reformat\.reasons\.gender: the task 'gender' is sensitive"),
        ("reformat.reasons.gender='  '", r"reformat\.reasons\.gender"),
        ("reformat.reasons.gendre=why", r"reformat\.reasons\.gendre: no task 'gendre'; did you mean gender"),
        (f"reformat.tasks=[{NAMES}, zero_shot]", r"reformat\.tasks: 'zero_shot' is asked at evaluation alone"),
        ("reformat.held_out=[Wearing_Earings]", r"reformat\.held_out: no attribute .* did you mean Wearing_Earrings"),
        ("reformat.held_out=[Goatee]", r"'Goatee' is an option of 'beard' in the task 'attributes'"),
        ("reformat.mixture.caps={raf-db: 10}", r"reformat\.mixture\.caps names raf-db, which the faces"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(talks, tmp_path, override, message):
    refuses(message, talks, [face(1)], override)
    assert not (tmp_path / "talks0").exists()


def test_what_states_a_sensitive_answer_in_passing_needs_its_reason_too():
    unasked = settings.load("laptop").reformat.model_copy(update={"tasks": ["caption"], "reasons": {}})
    refuses("the task 'caption' states what the sensitive task 'gender' asks", Plan, unasked)


HELD = "reformat.held_out=[Wearing_Earrings, Bangs]"
WORDS = (b"earring", b"bangs", b"fringe")


def texts_of(talks):
    """All text of the training conversations as bytes, pictures aside."""
    rows = open_table(talks, CONVERSATIONS).iterate(split="train")
    left = [{name: value for name, value in row.items() if name not in ("images", "segmentation")} for row in rows]
    return json.dumps(left, ensure_ascii=False).encode().lower()


@pytest.mark.parametrize("share", [0, 1])
def test_held_out_attributes_are_in_no_byte_of_a_training_conversation(share, faces_table, tmp_path):
    every = f"reformat.tasks=[{NAMES}, presence, description, parsing]"
    forms = f"reformat.forms={{native: 1, statement: {share}, lettered: {share}, dialogue: {share}}}"
    every_class = np.arange(64, dtype=np.uint8).reshape(8, 8) % 19  # an earring among them
    mask = {"bytes": encode(every_class), "path": None}
    rows = [face(n, split) | {"segmentation": mask} for n in range(40) for split in ("train", "validation")]
    limits = settings.load("laptop", [every, forms, HELD, WHOLE])
    reformat(limits, faces_table(rows), tmp_path / "talks")
    held = texts_of(tmp_path / "talks")
    assert len(held) > 25_000
    assert not [word for word in WORDS if word in held]
    reformat(
        settings.load("laptop", [every, forms, "reformat.held_out=[]", WHOLE]), tmp_path / "faces", tmp_path / "all"
    )
    shown = texts_of(tmp_path / "all")
    assert all(word in shown for word in WORDS[:2])


def test_evaluation_asks_what_is_held_out_as_zero_shot_alone(talks):
    rows, manifest = talks([face(n, "test") for n in range(30)], HELD)
    assert manifest["about"]["reasons"] == {"gender": settings.load("laptop").reformat.reasons["gender"]}
    assert manifest["about"]["held_out"] == ["Wearing_Earrings", "Bangs"]
    for number, row in enumerate(rows):
        asked = [tasks.question_of(turn) for turn in row["turns"]]
        zero = [(question.item, question.variant) for question in asked if question.task == "zero_shot"]
        assert zero == [("Wearing_Earrings", "native"), ("Bangs", "native")]
        assert not {"Wearing_Earrings", "Bangs"} & {q.item for q in asked if q.task != "zero_shot"}
        known = mapping(face(number)["attributes"])
        answers = [turn["answer"] for turn in row["turns"] if turn["task"] == "zero_shot"]
        assert answers == ["yes" if known[name] else "no" for name in ("Wearing_Earrings", "Bangs")]
    trained, _ = talks([face(n) for n in range(30)], HELD)
    assert not [turn for row in trained for turn in row["turns"] if turn["task"] == "zero_shot"]


def test_captions_of_the_oracle_lose_no_other_fact():
    held = HeldOut.of(["Wearing_Earrings"], DEFAULT)
    task, lost = tasks.get("caption"), 0
    for number in range(200):
        row = face(number)
        facts = set(task.item("caption").parse(row["caption"]).split(";")) - {"Wearing_Earrings=yes"}
        left = held.caption(row["caption"])
        lost += left is None or set(task.item("caption").parse(left).split(";")) != facts
        assert left is None or "earring" not in left.lower()
        assert left is None or not (" ," in left or "  " in left or left.endswith((" with.", " has.", "and.")))
    assert lost == 0


def test_what_is_held_out_and_never_asked_is_said(faces_table, tmp_path):
    rows = [face(n, split) for n, split in enumerate(("train", "test", "validation"))]
    for row in rows:
        row["attributes"] = [pair for pair in row["attributes"] if pair["name"] != "Bangs"]
    faces_table(rows)
    typed = ["reformat", str(tmp_path / "faces"), str(tmp_path / "talks"), "--set", HELD, "--set", WHOLE]
    result = CliRunner().invoke(app, typed)
    assert result.exit_code == 0, result.output
    assert "warning: reformat.held_out Bangs: no face of validation or test has a label for it" in result.stderr
    about = open_table(tmp_path / "talks").manifest["about"]
    assert about["held_out_questions"] == {"Wearing_Earrings": 2, "Bangs": 0}


def test_rare_columns_are_there_in_a_row_with_changes():
    whole = face(1) | {"age_range": "20-29", "alt_text": "A face.", "landmarks": [[1.0, 2.0]]}
    batch = pa.RecordBatch.from_pylist([face(0), whole], FACES)
    changed = rows_of(batch)[1].but(caption="Another.")
    assert (changed["caption"], changed["age_range"], changed.get("alt_text")) == ("Another.", "20-29", "A face.")
    assert (changed["landmarks"], changed.get("no such column", 7)) == ([[1.0, 2.0]], 7)


def test_balance_evens_out_the_answers_of_every_source_in_training_alone(talks):
    def made(number, source, share, split="train"):
        row = face(number, split, source)
        hat = {"Wearing_Hat": random.Random(number).random() < share}
        return row | {"attributes": pairs({**mapping(row["attributes"]), **hat}), "caption": None}

    rows = [made(n, "render", 0.1) for n in range(300)] + [made(n, "celeba", 0.8) for n in range(300)]
    rows += [made(n, "render", 0.1, "test") for n in range(300, 350)]

    def hats(found, source, split):
        turns = (t for row in found if (row["source"], row["split"]) == (source, split) for t in row["turns"])
        return Counter(turn["answer"] for turn in turns if turn["template"].startswith("Wearing_Hat/"))

    plain, even = talks(rows, *PLAIN)[0], talks(rows, *PLAIN, "reformat.balance=1.0")[0]
    for source, rare in (("render", "yes"), ("celeba", "no")):
        before, after = hats(plain, source, "train"), hats(even, source, "train")
        assert after[rare] == before[rare]
        assert after.total() - after[rare] == pytest.approx(after[rare], rel=0.25)
    assert hats(even, "render", "test") == hats(plain, "render", "test")
    half = hats(talks(rows, *PLAIN, "reformat.balance=0.5")[0], "celeba", "train")
    assert hats(even, "celeba", "train")["yes"] < half["yes"] < hats(plain, "celeba", "train")["yes"]


def test_balance_leaves_an_item_of_one_answer_alone_and_thins_every_way_of_asking_alike(talks):
    rows = [face(n) | {"attributes": pairs({"Wearing_Hat": False, "Bangs": n % 4 == 0})} for n in range(100)]
    found, _ = talks(rows, *PLAIN, "reformat.balance=1.0")
    asked = Counter(turn["template"].split("/")[0] for row in found for turn in row["turns"])
    assert asked["Wearing_Hat"] == 100
    assert asked["Bangs"] < 70
    rows = [face(n) | {"attributes": pairs({"Wearing_Hat": n % 5 == 0}), "caption": None} for n in range(500)]
    forms = "reformat.forms={native: 1, statement: 1, lettered: 0, dialogue: 0}"
    found, _ = talks(rows, "reformat.held_out=[]", f"reformat.tasks=[{NAMES}]", "reformat.balance=1.0", forms)
    ways = Counter(way_of(turn) for row in found for turn in row["turns"] if turn["template"].startswith("Wearing_Hat"))
    assert ways["native"] == pytest.approx(200, rel=0.15)
    assert ways["statement"] == 2 * ways["native"]


def test_balance_and_mixture_do_not_count_who_was_forgotten(talks, tmp_path):
    rows = [face(n) | {"attributes": pairs({"Bangs": n < 30}), "caption": None} for n in range(100)]
    home = f"storage.home={tmp_path / 'home'}"
    gone = frozenset(row["subject_id"] for row in rows[20:30] + rows[40:])
    tombstones = Tombstones.of(settings.load("laptop", [home]))
    tombstones.add("subject", Marks(subject=gone), reason="asked for it", by="Ada Lovelace")
    left = rows[:20] + rows[30:40]
    for override in ("reformat.balance=1.0", "reformat.mixture.caps={render: 25}", "reformat.mixture.temperature=2"):
        found, manifest = talks(rows, *PLAIN, home, override)
        without, alone = talks(left, *PLAIN, override)
        assert found == without
        assert manifest["about"].get("mixture") == alone["about"].get("mixture")


def test_mixture_caps_a_source_or_thins_large_ones_and_says_what_it_took(talks):
    rows = [face(n, source=s) for s, many in (("celeba", 100), ("render", 18)) for n in range(many)]
    rows += [face(n, "test", "celeba") for n in range(100, 106)]
    found, manifest = talks(rows, *PLAIN, "reformat.mixture.caps={celeba: 24}")
    taken = {("celeba", "train"): 24, ("celeba", "test"): 6, ("render", "train"): 18}
    assert Counter((row["source"], row["split"]) for row in found) == taken
    sources = manifest["about"]["mixture"]["sources"]
    assert sources == {"celeba": {"faces": 100, "taken": 24}, "render": {"faces": 18, "taken": 18}}
    assert manifest["quarantined"] == 76
    alone, _ = talks([row for row in rows if row["source"] == "celeba"], *PLAIN, "reformat.mixture.caps={celeba: 24}")
    assert alone == [row for row in found if row["source"] == "celeba"]
    rows = [face(n, source=s) for s, many in (("celeba", 80), ("render", 20)) for n in range(many)]
    for temperature, taken in (("2", 40), ("1.000001", 80)):
        found, _ = talks(rows, *PLAIN, f"reformat.mixture.temperature={temperature}")
        assert Counter(row["source"] for row in found) == {"celeba": taken, "render": 20}


def test_a_row_that_cannot_be_answered_is_refused_with_task_item_and_reason(talks, monkeypatch, tmp_path):
    item = tasks.get("expression").items[0]
    monkeypatch.setitem(item.__dict__, "_by_value", {**item._by_value, "bored": None})
    found, manifest = talks([face(1) | {"expression": "bored"}, face(2)])
    assert (len(found), manifest["quarantined"]) == (1, 1)
    (refused,) = open_table(tmp_path / "talks0").refused()
    assert refused["reason"].startswith("task 'expression', item 'expression': its label cannot be answered")


def test_a_broken_wording_is_refused_with_its_rows(talks, monkeypatch, tmp_path):
    task = tasks.get("age")
    own, broken = type(task).question, replace(task.question("age"), templates=("How old is {}?",) * 3)
    monkeypatch.setattr(type(task), "question", lambda self, item: broken if item == "age" else own(self, item))
    task.memo.clear()
    without = face(2) | {"age": None}
    try:
        found, _ = talks([face(1, "test"), without], *PLAIN)
    finally:
        task.memo.clear()
    assert [row["image_id"] for row in found] == [without["image_id"]]
    (refused,) = open_table(tmp_path / "talks0").refused()
    assert refused["reason"] == "task 'age', item 'age': the wording has a slot that nothing fills: How old is {}?"


def test_columns_written_at_once_give_the_bytes_of_rows(face_rows, tmp_path):
    rows = [row | {"source_id": str(n)} for n in range(8) for row in face_rows()]
    empty = dict.fromkeys(FACES.names)
    with TableWriter(tmp_path / "rows", FACES) as table:
        table.write(rows)
    cuts = (0, 1, 130, 131, 300, len(rows))
    with TableWriter(tmp_path / "columns", FACES) as table:
        for start, end in pairwise(cuts):
            if start == 131:
                table.write(rows[start:end])
            else:
                table.write_table(pa.Table.from_pylist([empty | row for row in rows[start:end]], FACES))
    assert open_table(tmp_path / "rows").digest == open_table(tmp_path / "columns").digest
    with pytest.raises(UserError, match="column 'image_id' must not be empty"), TableWriter(tmp_path / "b", FACES) as t:
        t.write_table(pa.Table.from_pylist([empty | {"image": rows[0]["image"]}], FACES.remove_metadata()))
    assert not (tmp_path / "b").exists()
