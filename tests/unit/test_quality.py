"""The suites: sound tables pass; every check finds the row that breaks it, of all that stand together, and no other."""

import io
import json
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from facemllm import settings, tasks
from facemllm.core import digests
from facemllm.tables import CONVERSATIONS, FACES, TableWriter, mapping, open_table, pairs
from facemllm.validate.conversations import conversations_frame
from facemllm.validate.faces import _decoded, annotated_frame, raw_frame
from facemllm.validate.memory import Labels, Originals, Tallies
from facemllm.validate.run import validate
from facemllm.validate.suites import Check, annotated_checks, conversations_checks, raw_checks, run_suite
from facemllm.version import ledger
from tests.asked import conversation
from tests.conftest import face
from tests.pictures import encode
from tests.refusing import refuses

LIMITS = ["validate.min_rows=20", "validate.caption_share=1.0"]
LIMITS += ["validate.contradiction_share=0.0", "validate.disagreement_share=0.0"]
ASKED = [tasks.get(name) for name in ("caption", "gender", "age", "head_pose")]


@pytest.fixture(scope="module")
def limits():
    return settings.load("laptop", LIMITS)


def sealed(row, data):
    """The row with other image bytes and the id that belongs to them."""
    return row | {"image": {"bytes": data, "path": None}, "image_id": digests.of_bytes(data)}


def png(pixels):
    return {"bytes": encode(np.asarray(pixels, np.uint8)), "path": None}


def recoded(row):
    """The row's picture saved again: other bytes, the same look."""
    return png(Image.open(io.BytesIO(row["image"]["bytes"])))["bytes"]


def other_split(row):
    return "train" if row["split"] != "train" else "test"


# row -> what is done to it, and the checks that must then fail there
FACE_FAULTS = {
    0: (lambda r, rows: {"image_id": "0" * 64}, {"digest_matches"}),
    1: (lambda r, rows: sealed(r, r["image"]["bytes"][:200]), {"decodes"}),
    2: (lambda r, rows: sealed(r, b"<svg/>"), {"decodes"}),
    3: (lambda r, rows: {"width": 64}, {"size_matches", "segmentation_matches_size"}),
    4: (lambda r, rows: {"yaw": float("nan")}, {"numbers_finite"}),
    5: (lambda r, rows: {"box": [4.0, 4.0, 44.0, 480.0]}, {"box_inside"}),
    6: (lambda r, rows: {"box": [4.0, 4.0, 20.0, 44.0]}, {"box_large"}),
    7: (lambda r, rows: {"landmarks": [[-3.0, 20.0]]}, {"landmarks_inside"}),
    8: (lambda r, rows: {"segmentation": {"bytes": b"PNG", "path": None}}, {"segmentation_decodes"}),
    9: (lambda r, rows: {"segmentation": png([[0] * 8] * 8)}, {"segmentation_matches_size"}),
    10: (lambda r, rows: {"segmentation": png([[19] * 48] * 48)}, {"segmentation_classes_ok"}),
    11: (lambda r, rows: {"expression": "Very Happy"}, {"expression_form", "expression_known"}),
    12: (lambda r, rows: {"expression": "happily_surprised"}, {"expression_known"}),
    13: (lambda r, rows: {"gender": "unknown"}, {"gender_known"}),
    14: (lambda r, rows: {"age": 130.0}, {"age_range"}),
    15: (lambda r, rows: {"skin_tone": 11}, {"skin_tone_range"}),
    16: (lambda r, rows: {"yaw": 200.0}, {"yaw_range", "yaw_usual"}),
    17: (lambda r, rows: {"pitch": -200.0}, {"pitch_range", "pitch_usual"}),
    18: (lambda r, rows: {"roll": 181.0}, {"roll_range", "roll_usual"}),
    19: (lambda r, rows: {"action_units": pairs({"AU12": 9.0})}, {"action_units_ok"}),
    20: (lambda r, rows: {"caption": " "}, {"has_caption"}),
    21: (lambda r, rows: {"attributes": pairs({"Bald": True, "Bangs": True})}, {"attributes_agree"}),
    22: (lambda r, rows: {"split": other_split(r)}, {"subject_in_one_split"}),
    23: (lambda r, rows: {}, {"subject_in_one_split"}),  # the other picture of the same person
    24: (lambda r, rows: sealed(r, recoded(rows[29])), {"alike_in_one_split"}),
    25: (lambda r, rows: {"image_id": r["image_id"].upper()}, {"image_id_form", "digest_matches"}),
    26: (lambda r, rows: {"split": "dev", "subject_id": None}, {"split_known"}),
    27: (lambda r, rows: {"source": None}, {"source_present"}),
    28: (lambda r, rows: {"image_id": None}, {"image_id_present", "digest_matches"}),
    29: (lambda r, rows: {}, {"alike_in_one_split"}),
    30: (lambda r, rows: {}, {"image_id_unique"}),
    31: (lambda r, rows: sealed(r, rows[30]["image"]["bytes"]), {"image_id_unique"}),
    32: (lambda r, rows: {"pitch": -120.0}, {"pitch_usual"}),
    33: (lambda r, rows: {"source": "nowhere"}, {"source_known"}),
    34: (lambda r, rows: {"source": "facexbench"}, {"terms_allow_use"}),  # in the train split, for evaluation only
    35: (lambda r, rows: {"caption": "This is a woman."}, {"caption_agrees"}),
    36: (lambda r, rows: {"source": "celeba"}, {"source_known"}),  # withdrawn by the ledger of these tests
}
ANNOTATED_ONLY = {"has_caption", "caption_agrees", "attributes_agree"}


def turn(row, number, **change):
    return {"turns": [t | change if n == number else t for n, t in enumerate(row["turns"])]}


def messages(row, change):
    copied = json.loads(json.dumps(row["messages"]))
    change(copied)
    return {"messages": copied}


def swap_roles(m):
    m[0]["role"], m[1]["role"] = m[1]["role"], m[0]["role"]


def reply(row, number, text):
    return messages(row, lambda m: m[2 * number + 1]["content"][0].update(text=text))


IMAGE = {"type": "image", "text": None}
YES_NO = {"form": "boolean", "options": ["yes", "no"]}
MISMATCH = {"answers_match_labels", "replies_say_answers"}
TALK_FAULTS = {
    0: (lambda r, rows: {"conversation_id": rows[1]["conversation_id"]}, {"conversation_id_unique"}),
    1: (lambda r, rows: {}, {"conversation_id_unique"}),
    2: (lambda r, rows: {"image_id": digests.of_bytes(b"x"), "images": [sealed(r, b"x")["image"]]}, {"image_known"}),
    3: (lambda r, rows: {"split": "dev", "subject_id": None}, {"split_known", "split_matches", "subject_matches"}),
    4: (lambda r, rows: {"subject_id": "someone else"}, {"subject_matches"}),
    5: (lambda r, rows: {"images": [rows[6]["images"][0]]}, {"image_matches"}),
    6: (lambda r, rows: {"images": r["images"] * 2}, {"image_matches"}),
    7: (lambda r, rows: {"turns": r["turns"][:1]}, {"turns_match"}),
    8: (lambda r, rows: {"turns": [], "messages": []}, {"turns_match", "image_first"}),
    9: (lambda r, rows: messages(r, swap_roles), {"roles_alternate"}),
    10: (lambda r, rows: messages(r, lambda m: m[0]["content"].pop(0)), {"image_first"}),
    11: (lambda r, rows: messages(r, lambda m: m[2]["content"].append(IMAGE)), {"image_first"}),
    12: (lambda r, rows: messages(r, lambda m: m[3]["content"][0].update(text="  ")), {"texts_filled"}),
    13: (lambda r, rows: turn(r, 0, answer=""), {"texts_filled", "answers_match_labels"}),
    14: (lambda r, rows: turn(r, 0, sample_id=rows[15]["turns"][0]["sample_id"]), {"samples_unique"}),
    15: (lambda r, rows: {}, {"samples_unique"}),
    16: (lambda r, rows: turn(r, 1, answer="other"), {"answers_in_options", *MISMATCH}),
    17: (lambda r, rows: turn(r, 1, options=None), {"answers_in_options"}),
    18: (lambda r, rows: turn(r, 1, **YES_NO, answer="maybe"), {"answers_in_options", *MISMATCH}),
    19: (lambda r, rows: {"source": None}, {"source_present", "source_matches"}),
    20: (lambda r, rows: {"split": "test"}, {"split_matches", "subject_in_one_split"}),
    21: (lambda r, rows: {}, {"subject_in_one_split"}),
    22: (lambda r, rows: {"conversation_id": None}, {"conversation_id_present"}),
    23: (lambda r, rows: {"image_id": "f" * 64}, {"image_known", "image_matches"}),
    24: (lambda r, rows: {"source": "fairface"}, {"source_matches"}),
    25: (lambda r, rows: {"segmentation": rows[26]["segmentation"]}, {"segmentation_matches"}),
    26: (lambda r, rows: {"groups": pairs({"gender": "female"})}, {"groups_match"}),
    27: (lambda r, rows: turn(r, 2, template="age:sung/0"), {"questions_known"}),
    28: (lambda r, rows: turn(r, 2, task="height"), {"questions_known"}),
    29: (lambda r, rows: turn(r, 3, answer="70"), MISMATCH),
    30: (lambda r, rows: reply(r, 1, "a robot"), {"replies_say_answers"}),
    31: (lambda r, rows: reply(r, 2, "about 5 years old"), {"replies_say_answers"}),
    32: (lambda r, rows: reply(r, 0, "A person with sunglasses."), {"replies_say_answers"}),
    33: (lambda r, rows: turn(r, 0, answer="gender=nobody"), {"answers_match_labels"}),
}


def write(folder, schema, rows):
    """A table that may lack what the writer asks for, as one made by another program may."""
    writer = TableWriter(folder, schema)
    writer._required = []
    with writer as table:
        table.write(rows)
    return open_table(folder)


def with_faults(rows, faults):
    return [row | (faults[n][0](row, rows) if n in faults else {}) for n, row in enumerate(rows)]


@pytest.fixture(scope="module")
def sound_rows():
    """Forty faces whose captions say what their labels say."""
    return [described(face(number)) for number in range(40)]


def described(row):
    who = {"female": "woman", "male": "man"}[row["gender"]]
    return row | {"caption": f"This is a {who}, {row['age']:.0f} years old."}


@pytest.fixture(scope="module")
def entries(limits):
    rows = ledger.entries(limits)
    return rows | {"celeba": rows["celeba"].model_copy(update={"status": "withdrawn"})}


def usable(entries):
    return [key for key, entry in entries.items() if entry.status != "withdrawn"]


@pytest.fixture(scope="module")
def broken(sound_rows, entries, limits, tmp_path_factory):
    """Outcomes of the suites on tables with every fault, by (table, check)."""
    folder, quality, names = tmp_path_factory.mktemp("broken"), limits.validate, usable(entries)
    faces = write(folder / "faces", FACES, with_faults(sound_rows, FACE_FAULTS))
    frame = raw_frame(faces, quality, entries, Originals())
    outcomes = run_suite("faces", raw_checks(quality, names), frame)
    frame = annotated_frame(faces, quality, entries, None, Labels(), Tallies())
    outcomes += run_suite("annotated", annotated_checks(quality, names, with_raw=False), frame)
    labels = Labels()
    annotated_frame(write(folder / "sound", FACES, sound_rows), quality, entries, None, labels, Tallies())
    spoken = [conversation(row, ASKED) for row in sound_rows]
    talks = write(folder / "talks", CONVERSATIONS, with_faults(spoken, TALK_FAULTS))
    frame = conversations_frame(talks, labels, Tallies())
    outcomes += run_suite("conversations", conversations_checks(quality), frame)
    return {(outcome.table, outcome.name): outcome for outcome in outcomes}


def expected(faults):
    rows = {}
    for row, (_, checks) in faults.items():
        for check in checks:
            rows.setdefault(check, []).append(row)
    return sorted(rows.items())


SHOWN = (
    [("faces", check, rows) for check, rows in expected(FACE_FAULTS) if check not in ANNOTATED_ONLY]
    + [("annotated", *item) for item in expected(FACE_FAULTS)]
    + [("conversations", *item) for item in expected(TALK_FAULTS)]
)


@pytest.mark.parametrize(("table", "check", "rows"), SHOWN)
def test_a_check_finds_the_broken_rows_and_no_others(broken, table, check, rows):
    outcome = broken[(table, check)]
    assert (bool(outcome.error), outcome.passed) == (False, False)
    assert [example["row"] for example in outcome.examples] == rows[:5]
    assert outcome.failed == len(rows)
    assert f"first row {rows[0]}, image" in outcome.line()


def test_every_check_was_shown_to_fail(broken):
    counted = {"min_rows", "splits_present"}  # about the whole table: the tests below
    assert {key for key in broken if key[1] not in counted} == {(table, check) for table, check, _ in SHOWN}
    assert all(broken[key].passed for key in broken if key[1] in counted)
    assert broken[("conversations", "answers_match_labels")].severity == "critical"


@pytest.mark.parametrize(
    ("table", "check", "message"),
    [
        ("annotated", "caption_agrees", "(gender: the caption says female, the label male)"),
        ("annotated", "terms_allow_use", "(facexbench)"),
        ("annotated", "attributes_agree", "(Bald and Bangs)"),
        ("conversations", "answers_match_labels", "(caption: )"),
        ("conversations", "questions_known", "(age age:sung/0)"),
    ],
)
def test_a_failing_row_is_told_in_words(broken, table, check, message):
    assert message in broken[(table, check)].line()


# what annotation does to a sound row, and what must then be found: the failing check and the column it tells
CHANGES = {
    0: (lambda r: {"source_id": "other"}, "identity_kept", "source_id"),
    1: (lambda r: {"split": other_split(r)}, "identity_kept", "split"),
    2: (lambda r: {"subject_id": None}, "identity_kept", "subject_id"),
    3: (lambda r: {"source": "fairface"}, "identity_kept", "source"),
    4: (lambda r: {"width": 64}, "identity_kept", "width"),
    5: (lambda r: {"gender": {"female": "male", "male": "female"}[r["gender"]]}, "labels_kept", "gender"),
    6: (lambda r: {"age": None}, "labels_kept", "age"),
    7: (lambda r: {"yaw": 10.5}, "labels_kept", "yaw"),
    8: (lambda r: {"box": [4.0, 4.0, 44.0, 43.0]}, "labels_kept", "box"),
    9: (lambda r: {"attributes": pairs({"Smiling": None, "Bald": False})}, "labels_kept", "attributes"),
    10: (lambda r: {"attributes": pairs({"Bald": True})}, "labels_kept", "attributes"),
    11: (lambda r: {"action_units": []}, "labels_kept", "action_units"),
    12: (lambda r: {"segmentation": png([[3] * 48] * 48)}, "labels_kept", "segmentation"),
    13: (lambda r: {"segmentation": None}, "labels_kept", "segmentation"),
    14: (lambda r: sealed(r, b"another picture"), "in_raw", ""),
}
ADDITIONS = {
    20: lambda r: {"ethnicity": "Indian", "age_range": "20-29"},
    21: lambda r: {"attributes": pairs({**mapping(r["attributes"]), "Eyeglasses": True})},
    22: lambda r: {"caption": "Something else."},
    23: lambda r: {"action_units": pairs({"AU12": 1.0, "AU1": 2.0})},
}


@pytest.fixture(scope="module")
def held_together(sound_rows, entries, limits, tmp_path_factory):
    """The annotated frame of rows changed in every way, with how often a picture was decoded for either table."""
    folder, quality = tmp_path_factory.mktemp("together"), limits.validate
    rows = [row | (CHANGES[n][0](row) if n in CHANGES else {}) for n, row in enumerate(sound_rows)]
    rows = [row | (ADDITIONS[n](row) if n in ADDITIONS else {}) for n, row in enumerate(rows)]
    raw, annotated = write(folder / "raw", FACES, sound_rows), write(folder / "annotated", FACES, rows)
    decoded, counts = _decoded, []

    def counting(encoded):
        counts[-1] += 1
        return decoded(encoded)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("facemllm.validate.faces._decoded", counting)
        originals = Originals()
        counts.append(0)
        raw_frame(raw, quality, entries, originals)
        counts.append(0)
        frame = annotated_frame(annotated, quality, entries, originals, Labels(), Tallies())
    checks = annotated_checks(quality, usable(entries), with_raw=True)
    found = {outcome.name: outcome for outcome in run_suite("annotated", checks, frame)}
    return frame, found, counts


@pytest.mark.parametrize("row", CHANGES)
def test_what_annotation_changed_is_found(held_together, row):
    _, check, column = CHANGES[row]
    frame, _, _ = held_together
    assert (frame[check][row], frame["changed"][row]) == (False, column)  # neither true nor null


def test_what_annotation_added_is_no_change_and_a_picture_is_decoded_once_over_both_tables(held_together):
    frame, found, counts = held_together
    untouched = frame.drop(index=list(CHANGES))
    for check in ("in_raw", "identity_kept", "labels_kept"):
        assert untouched[check].all()
        rows = [row for row, (_, name, _) in CHANGES.items() if name == check]
        assert (found[check].passed, found[check].severity, found[check].failed) == (False, "critical", len(rows))
        assert [example["row"] for example in found[check].examples] == rows[:5]
    assert "(source_id)" in found["identity_kept"].line()
    replaced = 1 + 1  # the picture that is not in the raw table, the segmentation that is another one
    assert counts == [80, replaced + 1]  # and the segmentation of the picture that is not in the raw table


@pytest.fixture
def tables(sound_rows, tmp_path):
    """Writes raw faces, annotated faces and conversations, sound unless given, and gives their folders."""

    def make(raw=None, annotated=None, conversations=None):
        raw = [row | {"caption": None} for row in sound_rows] if raw is None else raw
        annotated = sound_rows if annotated is None else annotated
        conversations = [conversation(row, ASKED) for row in annotated] if conversations is None else conversations
        given = {"faces": (raw, FACES), "annotated": (annotated, FACES), "talks": (conversations, CONVERSATIONS)}
        for name, (rows, schema) in given.items():
            with TableWriter(tmp_path / name, schema) as table:
                table.write(rows)
        return [tmp_path / name for name in given]

    return make


def test_sound_tables_pass_with_the_same_report_every_time(tables, limits, tmp_path):
    sound = tables()
    verdict = validate(limits, *sound, tmp_path / "one")
    assert (verdict.passed, verdict.critical, verdict.warnings) == (True, (), ())
    expected = dict.fromkeys(("faces", "annotated", "conversations"), 40) | {"questions": 40 * 6, "failed": 0}
    assert verdict.counts.items() >= expected.items()
    assert "0 warnings" in verdict.figure
    validate(limits, *sound, tmp_path / "two")
    assert digests.of_tree(tmp_path / "one") == digests.of_tree(tmp_path / "two")
    page = (tmp_path / "one" / "report.html").read_text()
    assert str(tmp_path) not in page
    assert not re.search(r"https?:|<script|<link|src=|@import", page), "the report must open without a network"
    assert "prefers-color-scheme: dark" in page


def test_a_critical_failure_names_check_table_row_and_report_which_is_kept(tables, sound_rows, limits, tmp_path):
    row = sound_rows[7]
    changed = [r | {"gender": "<b>other</b>"} if r is row else r for r in sound_rows]
    paths = tables(raw=changed, annotated=changed)
    out = tmp_path / "out"
    message = refuses(None, validate, limits, *paths, out)
    for part in ("gender_known", "1 of 40 rows", "first row 7", row["image_id"][:12], str(out / "report.html")):
        assert part in message
    assert str(tmp_path / "faces") in message, "the first table with the fault is the one to look into"
    assert "\n" not in message
    found = json.loads((out / "result.json").read_text())
    assert found["passed"] is False
    assert [line.partition(":")[0] for line in found["critical"]] == ["faces", "annotated"]
    page = (out / "report.html").read_text()
    assert [part in page for part in (row["image_id"], "&lt;b&gt;other", "<b>other")] == [True, True, False]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["annotated", "faces", "out", "talks"]


def test_a_small_table_without_a_split_or_of_a_withdrawn_source_is_refused(tables, sound_rows, tmp_path):
    (tmp_path / "ledger.yaml").write_text("render: {status: withdrawn}\n")  # the user's own
    mine = settings.load("laptop", [*LIMITS, f"ingest.ledger={tmp_path / 'ledger.yaml'}"])
    rows = [row for row in sound_rows if row["split"] != "test"][:12]
    said = r"annotated: check 'min_rows' failed .*found 12 rows \(and \d+ more\)"
    refuses(said, validate, mine, None, *tables(annotated=rows)[1:], tmp_path / "out")
    critical = json.loads((tmp_path / "out" / "result.json").read_text())["critical"]
    assert "'splits_present' failed (every split has rows); missing: test" in critical[1]
    assert "check 'source_known' failed (the source stands in the ledger" in critical[2]


def test_empty_tables_are_refused_not_crashed_on_and_a_report_is_not_overwritten(tables, limits, tmp_path):
    empty = tables([], [], [])
    refuses("'min_rows' failed", validate, limits, *empty, tmp_path / "out")
    assert (tmp_path / "out" / "report.html").is_file()
    refuses("exists already", validate, limits, *empty, tmp_path / "out")


def test_warnings_and_a_lack_of_raw_faces_let_the_workflow_go_on(tables, sound_rows, limits, tmp_path):
    rows = [row | {"box": [0.0, 0.0, 900.0, 900.0]} if n == 3 else row for n, row in enumerate(sound_rows)]
    _, annotated, conversations = tables(annotated=rows)
    verdict = validate(limits, None, annotated, conversations, tmp_path / "out")
    (warning,) = verdict.warnings
    assert "'box_inside'" in warning
    assert (verdict.passed, verdict.counts.get("faces")) == (True, None)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Not counted: the tables at hand do not tell." in page
    assert "Raw faces" not in page


def test_a_check_that_cannot_be_run_counts_as_critical():
    frame = pd.DataFrame({"row": [0], "image_id": ["a"], "age": ["old"]})
    arguments = {"column": "age", "min_value": 0}
    check = Check("age", "the age is a number", "info", "ExpectColumnValuesToBeBetween", arguments)
    (outcome,) = run_suite("faces", [check], frame)
    assert (outcome.passed, outcome.severity) == (False, "critical")
    assert "could not be run" in outcome.line()
