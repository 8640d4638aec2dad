"""The checks of both tables: a sound pair passes, and every check finds the row that breaks it, and only that row.

All broken rows stand in one pair of tables, one row a fault, so that the suites run once.
"""

from __future__ import annotations

import hashlib
import json
import re

import pytest

from facemllm import digests, settings
from facemllm.errors import UserError
from facemllm.quality import validate
from facemllm.quality.checking import run_suite
from facemllm.quality.columns import Tallies, conversations_frame, faces_frame
from facemllm.quality.suites import Check, conversations_checks, faces_checks
from facemllm.records import CONVERSATIONS, FACES, TableWriter, open_table, pairs

LIMITS = ["quality.min_rows=20", "quality.caption_share=1.0", "quality.contradiction_share=0.0"]


@pytest.fixture(scope="module")
def limits():
    return settings.load("laptop", LIMITS)


def sealed(row, data):
    """The row with other image bytes and the id that belongs to them."""
    return row | {"image": {"bytes": data, "path": None}, "image_id": hashlib.sha256(data).hexdigest()}


def png(pixels):
    import io

    import numpy as np
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def recoded(row):
    """The row's picture saved again: other bytes, the same look."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.open(io.BytesIO(row["image"]["bytes"])).save(buffer, "PNG")
    return buffer.getvalue()


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
}


def turn(row, number, **change):
    return {"turns": [t | change if n == number else t for n, t in enumerate(row["turns"])]}


def messages(row, change):
    copied = json.loads(json.dumps(row["messages"]))
    change(copied)
    return {"messages": copied}


def swap_roles(m):
    m[0]["role"], m[1]["role"] = m[1]["role"], m[0]["role"]


TALK_FAULTS = {
    0: (lambda r, rows: {"conversation_id": rows[1]["conversation_id"]}, {"conversation_id_unique"}),
    1: (lambda r, rows: {}, {"conversation_id_unique"}),
    2: (
        lambda r, rows: {
            "image_id": hashlib.sha256(b"x").hexdigest(),
            "images": [{"bytes": b"x", "path": None}],
        },
        {"image_known"},
    ),
    3: (lambda r, rows: {"split": "dev", "subject_id": None}, {"split_known", "split_matches", "subject_matches"}),
    4: (lambda r, rows: {"subject_id": "someone else"}, {"subject_matches"}),
    5: (lambda r, rows: {"images": [rows[6]["images"][0]]}, {"image_matches"}),
    6: (lambda r, rows: {"images": r["images"] * 2}, {"image_matches"}),
    7: (lambda r, rows: {"turns": r["turns"][:1]}, {"turns_match"}),
    8: (lambda r, rows: {"turns": [], "messages": []}, {"turns_match", "image_first"}),
    9: (lambda r, rows: messages(r, swap_roles), {"roles_alternate"}),
    10: (lambda r, rows: messages(r, lambda m: m[0]["content"].pop(0)), {"image_first"}),
    11: (
        lambda r, rows: messages(r, lambda m: m[2]["content"].append({"type": "image", "text": None})),
        {"image_first"},
    ),
    12: (lambda r, rows: messages(r, lambda m: m[3]["content"][0].update(text="  ")), {"texts_filled"}),
    13: (lambda r, rows: turn(r, 0, answer=""), {"texts_filled"}),
    14: (lambda r, rows: turn(r, 0, sample_id=rows[15]["turns"][0]["sample_id"]), {"samples_unique"}),
    15: (lambda r, rows: {}, {"samples_unique"}),
    16: (lambda r, rows: turn(r, 1, answer="other"), {"answers_in_options"}),
    17: (lambda r, rows: turn(r, 1, options=None), {"answers_in_options"}),
    18: (lambda r, rows: turn(r, 1, form="boolean", options=["yes", "no"], answer="maybe"), {"answers_in_options"}),
    19: (lambda r, rows: {"source": None}, {"source_present"}),
    20: (lambda r, rows: {"split": "test"}, {"split_matches", "subject_in_one_split"}),
    21: (lambda r, rows: {}, {"subject_in_one_split"}),
    22: (lambda r, rows: {"conversation_id": None}, {"conversation_id_present"}),
    23: (lambda r, rows: {"image_id": "f" * 64}, {"image_known", "image_matches"}),
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
def make():
    """The builders of sound rows, for fixtures that live longer than a test."""
    import importlib.util
    from pathlib import Path

    spec = importlib.util.spec_from_file_location("sound_rows", Path(__file__).parents[1] / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def broken(make, limits, tmp_path_factory):
    """Outcomes of both suites on tables with every fault, by (table, check)."""
    folder = tmp_path_factory.mktemp("broken")
    sound = [make.face(n) for n in range(40)]
    tallies = Tallies()
    faces = write(folder / "faces", FACES, with_faults(sound, FACE_FAULTS))
    outcomes = run_suite("faces", faces_checks(limits.quality), faces_frame(faces, 24, tallies))
    talks = write(folder / "talks", CONVERSATIONS, with_faults([make.conversation(row) for row in sound], TALK_FAULTS))
    known = faces_frame(write(folder / "sound", FACES, sound), 24, Tallies())
    frame = conversations_frame(talks, known, tallies)
    outcomes += run_suite("conversations", conversations_checks(limits.quality), frame)
    return {(outcome.table, outcome.name): outcome for outcome in outcomes}


def expected(faults):
    rows = {}
    for row, (_, checks) in faults.items():
        for check in checks:
            rows.setdefault(check, []).append(row)
    return sorted(rows.items())


@pytest.mark.parametrize(
    ("table", "check", "rows"),
    [("faces", *item) for item in expected(FACE_FAULTS)] + [("conversations", *item) for item in expected(TALK_FAULTS)],
)
def test_a_check_finds_the_broken_rows_and_no_others(broken, table, check, rows):
    outcome = broken[(table, check)]
    assert not outcome.error
    assert not outcome.passed
    assert [example["row"] for example in outcome.examples] == rows
    assert outcome.failed == len(rows)
    assert f"first row {rows[0]}, image" in outcome.line()


def test_every_check_was_shown_to_fail(broken):
    counted = {"min_rows", "splits_present"}  # about the whole table: the tests below
    shown = {("faces", check) for check, _ in expected(FACE_FAULTS)}
    shown |= {("conversations", check) for check, _ in expected(TALK_FAULTS)}
    assert {key for key in broken if key[1] not in counted} == shown
    assert all(broken[key].passed for key in broken if key[1] in counted)


@pytest.fixture
def sound(faces_table, conversations_table):
    return faces_table(), conversations_table()


def test_a_sound_pair_passes_with_the_same_report_every_time(sound, limits, tmp_path):
    verdict = validate(limits, *sound, tmp_path / "one")
    assert verdict.passed
    assert verdict.critical == verdict.warnings == ()
    assert verdict.counts["faces"] == verdict.counts["conversations"] == 40
    assert verdict.counts["questions"] == 80
    assert verdict.counts["failed"] == 0
    assert "0 warnings" in verdict.figure
    validate(limits, *sound, tmp_path / "two")
    assert digests.of_tree(tmp_path / "one") == digests.of_tree(tmp_path / "two")
    page = (tmp_path / "one" / "report.html").read_text()
    assert str(tmp_path) not in page
    assert not re.search(r"https?:|<script|<link|src=|@import", page), "the report must open without a network"
    assert "prefers-color-scheme: dark" in page


def test_a_critical_failure_names_check_table_row_and_report_which_is_kept(
    face_rows, faces_table, conversations_table, conversation_rows, limits, tmp_path
):
    rows = face_rows()
    conversations = conversations_table(conversation_rows(rows))
    rows[7]["gender"] = "<b>other</b>"
    out = tmp_path / "out"
    with pytest.raises(UserError) as refused:
        validate(limits, faces_table(rows), conversations, out)
    message = str(refused.value)
    for part in ("gender_known", "1 of 40 rows", "first row 7", rows[7]["image_id"][:12], str(out / "report.html")):
        assert part in message
    assert str(tmp_path / "faces") in message
    assert "\n" not in message
    found = json.loads((out / "result.json").read_text())
    assert found["passed"] is False
    assert len(found["critical"]) == 1
    page = (out / "report.html").read_text()
    assert rows[7]["image_id"] in page
    assert "&lt;b&gt;other" in page
    assert "<b>other" not in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["conversations", "faces", "out"]


def test_a_small_table_without_a_split_is_refused(face_rows, faces_table, conversations_table, limits, tmp_path):
    rows = [row for row in face_rows() if row["split"] != "test"][:12]
    with pytest.raises(UserError, match=r"'min_rows' failed .*found 12 rows \(and \d+ more\)"):
        validate(limits, faces_table(rows), conversations_table(), tmp_path / "out")
    critical = json.loads((tmp_path / "out" / "result.json").read_text())["critical"]
    assert "'splits_present' failed (every split has rows); missing: test" in critical[1]


def test_empty_tables_are_refused_not_crashed_on(faces_table, conversations_table, limits, tmp_path):
    with pytest.raises(UserError, match="'min_rows' failed"):
        validate(limits, faces_table([]), conversations_table([]), tmp_path / "out")
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_warning_lets_the_workflow_go_on(face_rows, faces_table, conversations_table, limits, tmp_path):
    rows = face_rows()
    rows[3]["box"] = [0.0, 0.0, 900.0, 900.0]
    verdict = validate(limits, faces_table(rows), conversations_table(), tmp_path / "out")
    assert verdict.passed
    assert len(verdict.warnings) == 1
    assert "'box_inside'" in verdict.warnings[0]


def test_a_check_that_cannot_be_run_counts_as_critical():
    import pandas as pd

    frame = pd.DataFrame({"row": [0], "image_id": ["a"], "age": ["old"]})
    check = Check(
        "age", "the age is a number", "info", "ExpectColumnValuesToBeBetween", {"column": "age", "min_value": 0}
    )
    (outcome,) = run_suite("faces", [check], frame)
    assert not outcome.passed
    assert outcome.severity == "critical"
    assert "could not be run" in outcome.line()


def test_an_existing_report_is_not_overwritten(sound, limits, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        validate(limits, *sound, tmp_path / "out")
