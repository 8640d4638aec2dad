"""The report page: where the data came from, what contradicts what, and what was left out, in plain words."""

import json
import re

import pytest

from facemllm import settings, tasks
from facemllm.core import digests
from facemllm.tables import CONVERSATIONS, FACES, TableWriter, open_table, pairs
from facemllm.validate.balance import reasons
from facemllm.validate.memory import Tallies
from facemllm.validate.report import contradictions, sources
from facemllm.validate.run import validate
from facemllm.validate.suites import POLICY
from tests.asked import conversation
from tests.conftest import face
from tests.pages import Page

WORDS = {"female": "woman", "male": "man"}


def written(folder, rows, schema, refused=(), **options):
    with TableWriter(folder, schema, **options) as table:
        table.write(rows)
        for place in refused:
            table.quarantine(*place)
    return table.manifest["digest"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The words of a page about tables in which something of everything went wrong, the page, and its folder."""
    tmp_path, rows = tmp_path_factory.mktemp("report"), []
    for number, row in enumerate(face(number) for number in range(40)):
        says = f"This is a {WORDS[row['gender']]}, {row['age']:.0f} years old."
        source = "raf-db" if number % 4 == 0 else "render"
        rows.append(row | {"source": source, "caption": says})
    rows[3] = rows[3] | {"caption": "This is a woman, 23 years old."}
    rows[5] = rows[5] | {"attributes": pairs({"Bald": True, "Bangs": True})}
    raw = [row | {"caption": None} for row in rows]
    imported = [
        ("train/a.jpg", 2, "damaged: 17 bytes missing"),
        ("train/<b>.jpg", 3, "damaged: 4 bytes missing"),
        ("list.txt", 9, "a name that stands twice"),
        ("render/0003", 3, "looks like (9 of 256 bits differ) row 33 of the train split"),
    ]
    about = {"sources": ["raf-db", "render"], "groups": {"read": {"source": {"a": 41}}, "kept": {"source": {"a": 40}}}}
    faces = written(tmp_path / "raw", raw, FACES, imported, about=about)
    about = {"contradictions": {"hair_color": 31}, "label_contradictions": {"age": 2}, "ledger_refused": {"raf-db": 12}}
    lost = [(faces, 7, "the reply is not JSON: char 14")]
    annotated = written(tmp_path / "annotated", rows, FACES, lost, about=about, parents=[faces])
    asked = [tasks.get(name) for name in ("caption", "gender", "age")]
    talks = [conversation(row, asked) for row in rows]
    written(tmp_path / "talks", talks, CONVERSATIONS, [(annotated, 5, "no known label")], parents=[annotated])
    limits = settings.load("laptop", ["validate.min_rows=20"])
    validate(limits, tmp_path / "raw", tmp_path / "annotated", tmp_path / "talks", tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    return Page(page).text, page, tmp_path / "out"


def test_sources_stand_with_their_terms_and_what_all_of_them_allow(report):
    text, _, _ = report
    assert re.search(r"RAF-DB \(Real-world Affective Faces\) raf-db 10 .*? restricted train, evaluate", text)
    terms = r"Drawn heads of this project render 30 CC0-1\.0 .*? active train, evaluate, serve, third party"
    assert re.search(terms, text)
    assert "Allowed with all of them together: train, evaluate ." in text
    assert "third party: send its pictures to a third party." in text
    assert "no person is depicted" in text
    part = text.partition("Held back from the annotator by their terms")[2]
    assert re.search(r"^ Source Pictures Terms Allowed uses raf-db 12 non-commercial research", part)


def test_contradictions_are_counted_twice_and_shown(report):
    text, _, out = report
    assert re.search(r"gender 0 0 1 says female, labelled male \(row 3, image [0-9a-f]{12}\)", text)
    assert re.search(r"age 0 2 0 gender 0 0 1 says .*? hair_color 31 0 0", text)
    assert "Bald and Bangs 1" in text
    found = json.loads((out / "result.json").read_text())
    assert found["disagreements"] == {"gender": 1}
    assert [line.split("'")[1] for line in found["warnings"]] == ["caption_agrees", "attributes_agree"]


def test_every_filter_is_told_with_its_rows(report):
    text, _, _ = report
    assert "Import 3 rows refused. Their groups are not known." in text
    assert "41 faces before, 40 after: 1 dropped (2.4 %)." in text
    assert text.count("40 faces before, 40 after: 0 dropped.") == 2
    assert re.search(r"gender female 20 20 100\.0 % gender male 20 20 100\.0 %", text)
    assert "No group lost much more than the others." in text


def test_refused_rows_are_gathered_by_reason_with_their_files(report):
    text, page, _ = report
    assert re.search(r"2 damaged: 17 bytes missing \(and alike\) train/a\.jpg, row 2 train/<b>\.jpg, row 3", text)
    assert re.search(r"1 a name that stands twice list\.txt, row 9", text)
    assert "1 the reply is not JSON: char 14 row 7 of the raw faces" in text
    assert "1 no known label row 5 of the annotated faces" in text
    assert "train/<b>.jpg" not in page


def test_the_page_is_sound_says_the_policy_and_its_contents_lead_to_every_section(report):
    for severity, says in POLICY.items():
        assert f"{severity} {says}" in report[0]
    page = Page(report[1])
    assert page.links == [f"#{name}" for name in page.ids]
    assert len(page.ids) == 7
    # and its template enters the key of the step
    assert digests.PACKAGE / "report/templates/validation.html.jinja" in digests.code_files("facemllm.validate.run")


def test_a_source_that_is_not_in_the_ledger_allows_nothing():
    found = sources(["nowhere", "render"], {}, {"nowhere": 4}, {"nowhere": 2})
    assert (found["unknown"], found["shared"]) == ([("nowhere", 4), ("render", 0)], [])
    assert found["held_back"] == [("nowhere", 2, None)]


@pytest.mark.parametrize("own", [None, 3, "hair", []])
def test_a_manifest_of_another_shape_is_read_as_having_counted_nothing(own):
    assert contradictions(Tallies(), {"contradictions": own})["contradictions"] == []
    assert sources([], {}, {}, own)["held_back"] == []


def reasons_of(folder, wordings):
    written(folder, [], FACES, [("f", number, text) for number, text in enumerate(wordings)])
    return reasons(open_table(folder), {})


def test_reasons_that_differ_by_numbers_or_digests_are_one_and_those_without_end_stay_few(tmp_path):
    words = ["".join(chr(97 + int(digit)) for digit in str(number)) for number in range(1000)]
    found = reasons_of(tmp_path / "many", [f"odd {word}" for word in words])
    assert sum(reason.rows for reason in found) == 1000
    assert (len(found), found[0].wording, len(found[0].files)) == (201, "other reasons", 3)
    assert not found[0].varies
    said = ["row 3 of 9: 0.5 s", "row 41 of 10: 12.25 s", "image 0123456789abcdef", "image fedcba9876543210"]
    found = reasons_of(tmp_path / "few", [*said, "v2 of it", "v3 of it", None])
    assert [(reason.rows, reason.wording, reason.varies) for reason in found] == [
        (2, "image 0123456789abcdef", True),
        (2, "row 3 of 9: 0.5 s", True),
        (1, "no reason given", False),
        (1, "v2 of it", False),
        (1, "v3 of it", False),
    ]
