"""Group balance: what filters do to groups, what is named and what is chance, and the check that says so."""

from html import unescape

import pytest

from facemllm import settings, tasks
from facemllm.validate.balance import _chance, _holm, balance_frame, of_manifest, sentence, shares
from facemllm.validate.memory import Count, Memory, groups_of, mark
from facemllm.validate.run import validate
from facemllm.validate.suites import balance_checks, run_suite
from tests.asked import conversation

LOSS = 0.05


def count(before, after):
    """A filter on one grouping that covers all rows: rows by value before and after."""
    sides = [{("skin_tone", value): n for value, n in side.items()} for side in (before, after)]
    return Count(sides[0], sides[1], sum(before.values()), sum(after.values()))


def named(counts, loss=LOSS):
    return [(share.filter, share.value) for share in shares(counts, loss) if share.thinned]


def test_a_group_that_loses_much_more_than_all_is_named_in_plain_words_beyond_the_limit():
    counts = {"annotation": count({"dark": 100, "light": 900}, {"dark": 88, "light": 882})}
    assert named(counts) == [("annotation", "dark")]
    share = next(share for share in shares(counts, LOSS) if share.thinned)
    said = sentence(share, counts["annotation"])
    assert said == "annotation dropped 12.0 % of the faces labelled 'dark' (skin tone), 3.0 % of all"
    counts = {"annotation": count({"dark": 1000, "light": 1000}, {"dark": 800, "light": 1000})}  # 20 % against 10 %
    assert [named(counts, loss) for loss in (0.099, 0.101)] == [[("annotation", "dark")], []]


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        ({"dark": 100, "light": 900}, {"dark": 100, "light": 900}, "nothing was dropped"),
        ({"dark": 100, "light": 900}, {"dark": 50, "light": 450}, "all lost alike"),
        ({"dark": 5, "light": 900}, {"dark": 4, "light": 890}, "a fifth of five rows is chance"),
        ({"dark": 10000, "light": 90000}, {"dark": 9600, "light": 90000}, "beyond chance, but within the limit"),
        ({"dark": 100, "light": 900}, {"dark": 100, "light": 700}, "a group that gains share is not thinned"),
    ],
)
def test_what_is_not_named(before, after, why):
    assert named({"annotation": count(before, after)}) == [], why


def test_many_groups_are_held_to_a_stricter_test():
    few = {"annotation": count({"a": 10, "b": 190}, {"a": 6, "b": 185})}
    assert named(few) == [("annotation", "a")]
    rest = {f"c{n}": 10 for n in range(200)}
    many = {"annotation": count({"a": 10, "b": 190, **rest}, {"a": 6, "b": 185, **dict.fromkeys(rest, 9)})}
    assert _chance(many["annotation"], ("skin_tone", "a")) < 0.05, "alone it would be named"
    assert named(many) == []
    twice = {"reformat": few["annotation"], "annotation": many["annotation"]}
    assert named(twice) == [], "the correction spans all filters"


def test_holm_by_hand():
    assert _holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert _holm([0.5, 0.9]) == [1.0, 1.0]
    assert _holm([]) == []


def test_the_chance_is_that_of_fishers_exact_test():
    from scipy.stats import fisher_exact

    counts = {"annotation": count({"dark": 40, "light": 160}, {"dark": 33, "light": 150})}
    found = {share.value: share.probability for share in shares(counts, LOSS)}
    dark = fisher_exact([[7, 10], [33, 150]], alternative="greater").pvalue
    light = fisher_exact([[10, 7], [150, 33]], alternative="greater").pvalue
    assert found["dark"] == pytest.approx(2 * dark)
    assert found["light"] == pytest.approx(max(2 * dark, light))


def test_the_duplicate_filter_is_read_from_the_manifest():
    read = {"gender": {"female": 5}, "source": {"render": 6, "celeba": 4}}
    kept = {"gender": {"female": 3}, "source": {"render": 4, "celeba": 4}}
    found = of_manifest({"duplicates": {"pictures alike, train": 2}, "groups": {"read": read, "kept": kept}})
    assert (found.rows_before, found.rows_after, found.before[("gender", "female")]) == (10, 8, 5)
    assert found.after[("source", "render")] == 4
    assert of_manifest({}) is None
    assert of_manifest({"groups": {"read": 3}}) is None


def test_the_check_runs_through_great_expectations_one_a_filter():
    fair = count({"dark": 100, "light": 900}, {"dark": 100, "light": 900})
    unfair = count({"dark": 100, "light": 900}, {"dark": 60, "light": 890})
    counts = {"duplicates": fair, "annotation": unfair, "reformat": fair}
    frame = balance_frame(shares(counts, LOSS), counts)
    outcomes = run_suite("balance", balance_checks(counts), frame, examples=50)
    assert [(o.name, o.passed, o.severity) for o in outcomes] == [
        ("duplicates_keeps_groups", True, "warning"),
        ("annotation_keeps_groups", False, "warning"),
        ("reformat_keeps_groups", True, "warning"),
    ]
    assert (outcomes[1].failed, outcomes[1].checked) == (1, 2)
    assert "annotation dropped 40.0 % of the faces labelled 'dark' (skin tone), 5.0 % of all" in outcomes[1].line()


def test_memory_counts_rows_before_and_after_and_marks_differ_where_values_do():
    memory = Memory()
    rows = [("a", "female"), ("b", "male"), ("c", "female"), ("a", "female")]
    for image_id, gender in rows:
        memory.add(image_id, [mark(gender), mark(None)], groups_of({"gender": gender, "source": "x"}))
    assert memory.recall("a") == [mark("female"), bytes(8)]
    assert memory.recall("b") == [mark("male"), bytes(8)]
    assert memory.recall("nobody") is memory.recall(None) is None
    found = memory.count()
    assert (found.rows_before, found.rows_after) == (3, 2), "a picture that comes twice is one"
    assert found.before == {("gender", "female"): 2, ("gender", "male"): 1, ("source", "x"): 3}
    assert found.after == {("gender", "female"): 1, ("gender", "male"): 1, ("source", "x"): 2}

    values = ["a", "b", 1.0, 1.5, [1.0, 2.0], [2.0, 1.0], b"a", False, True, 0]
    assert len({bytes(8), *map(mark, values)}) == len(values) + 1
    assert {mark(value) for value in (None, "", [])} == {bytes(8)}, "what is not known has none"


def test_groups_of_a_row_leave_out_what_is_not_known():
    row = {"gender": "male", "age": 70.0, "expression": "fear", "source": "render"}
    row |= dict.fromkeys(("skin_tone", "ethnicity"))
    assert groups_of(row | {"split": "test"}) == (
        *(("age_band", "old"), ("expression", "fear"), ("gender", "male")),
        *(("source", "render"), ("split", "test")),
    )


def test_filters_that_drop_women_are_named_end_to_end(face_rows, faces_table, conversations_table, tmp_path):
    """The search for duplicates drops 12 of 20 extra women, annotation 12 of 20, question making 7 of the 8 left."""
    rows = [row | {"caption": "A face of a person."} for row in face_rows()]
    women = [row["image_id"] for row in rows if row["gender"] == "female"]
    read = {"gender": {"female": 32, "male": 20}, "source": {"render": 52}}
    kept = {"gender": {"female": 20, "male": 20}, "source": {"render": 40}}
    raw = faces_table(rows, "raw", about={"groups": {"read": read, "kept": kept}})
    kept = [row for row in rows if row["image_id"] not in women[:12]]
    asked = [tasks.get("gender"), tasks.get("age")]
    talks = conversations_table(conversation(row, asked) for row in kept if row["image_id"] not in women[12:19])
    limits = settings.load("laptop", ["validate.min_rows=20"])
    verdict = validate(limits, raw, faces_table(kept), talks, tmp_path / "out")
    assert verdict.passed
    said = [line for line in verdict.warnings if line.startswith("balance")]
    dropped = (("duplicates", 37.5, 23.1), ("annotation", 60.0, 30.0), ("question making", 87.5, 25.0))
    for line, (what, of_women, of_all) in zip(said, dropped, strict=True):
        assert f"{what} dropped {of_women} % of the faces labelled 'female' (gender), {of_all} % of all" in line
    page = (tmp_path / "out" / "report.html").read_text()
    assert "annotation dropped 60.0 % of the faces labelled 'female' (gender), 30.0 % of all." in unescape(page)
