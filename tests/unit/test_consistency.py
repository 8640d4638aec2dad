import pytest

from facemllm.scoring import consistency
from facemllm.tasks import all_names, get
from facemllm.tasks.relations import RELATIONS
from tests.scored import sheet_of

OVERRIDES = ["evaluate.bootstrap=100"]
FACES = [
    ("a", 0, "attributes", "beard", "No_Beard"),
    ("a", 0, "attributes", "beard", "false", "statement", "Goatee"),
    ("a", 0, "attributes", "hair_style", "Bald"),
    ("a", 0, "attributes", "Bangs", "no"),
    ("b", 1, "attributes", "beard", "Goatee"),
    ("b", 1, "attributes", "beard", "true", "statement", "Goatee"),
    ("b", 1, "attributes", "hair_style", "Bald"),
    ("b", 1, "attributes", "Bangs", "yes"),  # the label itself contradicts the other
]


def by_relation(settings, rows, parsed):
    found = consistency.measure(settings, sheet_of(rows), parsed)["relations"]
    return found, {entry["relation"]: entry for entry in found["by_relation"]}


def broken(found, relation):
    """Shares of cases in which the model and the truth break a relation, and how many cases there are."""
    assert set(found[relation]) == {"relation", "broken_by_model", "broken_by_truth", "n"}
    return tuple(found[relation][name] for name in ("broken_by_model", "broken_by_truth", "n"))


def test_no_beard_and_a_goatee_contradict_each_other(settings):
    truth = [row[4] for row in FACES]
    parsed = ["No_Beard", "true", "Bald", "no", "Goatee", "true", "Short_Hair", "yes"]
    overall, found = by_relation(settings, FACES, parsed)
    assert broken(found, "No_Beard excludes Goatee") == (0.5, 0.0, 2)
    assert broken(found, "Bald excludes Bangs")[:2] == (0.0, 0.5)
    # called a goatee, it is no mustache either; the true answers say that of b alone
    assert broken(found, "No_Beard excludes Mustache") == (0.0, 0.0, 2)
    assert "Bald excludes Short_Hair" not in found  # one question alone cannot contradict itself
    # four beards and Bangs on two faces
    assert (overall["model"]["value"], overall["model"]["n"]) == (pytest.approx(1 / 10), 10)
    assert (overall["truth"]["value"], overall["truth"]["n"]) == (pytest.approx(1 / 7), 7)
    assert by_relation(settings, FACES, truth)[0]["model"] == overall["truth"]


def test_what_is_not_said_contradicts_nothing(settings):
    overall, found = by_relation(settings, FACES, [None] * len(FACES))
    assert overall["model"] == {"value": None, "low": None, "high": None, "n": 0}
    assert all(entry["broken_by_model"] is None and entry["n"] == 0 for entry in found.values())
    half = ["No_Beard", None, None, "yes", None, "true", "Bald", None]
    assert not any(broken.any() for _, broken in consistency.check(sheet_of(FACES), half).values())


def test_a_caption_is_held_against_the_answers(settings):
    rows = [
        ("a", 0, "caption", "caption", "age=40;eyewear=Eyeglasses"),
        ("a", 0, "attributes", "eyewear", "Eyeglasses"),
        ("a", 0, "age", "age", "44"),
        ("b", 1, "caption", "caption", "Wearing_Hat=yes"),
        ("b", 1, "attributes", "Wearing_Hat", "yes"),
        ("b", 1, "attributes", "eyewear", "No_Eyewear"),
    ]
    parsed = ["age=40;eyewear=Eyeglasses", "No_Eyewear", "52", "", "yes", "No_Eyewear"]
    relations, held = by_relation(settings, rows, parsed)
    captions = consistency.measure(settings, sheet_of(rows), parsed)["captions"]
    found = {entry["relation"]: entry for entry in captions["by_relation"]}
    assert not set(found) & set(held)  # two kinds of figure
    assert (captions["model"]["value"], captions["model"]["n"]) == (1.0, 2)
    assert captions["truth"] == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 3}
    assert relations["truth"]["value"] == 0.0
    assert broken(found, "the caption agrees on eyewear")[:2] == (1.0, 0.0)
    assert broken(found, "the caption agrees on age")[:2] == (1.0, 0.0)  # twelve years off, and four
    assert broken(found, "the caption agrees on Wearing_Hat") == (None, 0.0, 0)  # silence denies nothing
    assert held["No_Eyewear excludes Eyeglasses"]["broken_by_model"] == 1.0


def test_each_way_to_ask_has_its_accuracy_and_its_agreement(settings):
    rows = [
        ("a", 0, "attributes", "beard", "No_Beard"),
        ("b", 1, "attributes", "beard", "Goatee"),
        ("a", 0, "attributes", "beard", "false", "statement", "Goatee"),
        ("b", 1, "attributes", "beard", "true", "statement", "Goatee"),
        ("a", 0, "attributes", "beard", "No_Beard", "lettered"),
        ("c", 2, "attributes", "beard", "not_visible", "lettered"),  # never asked outright
        ("a", 0, "age", "age", "30"),
        ("b", 1, "age", "age", "30"),
        ("a", 0, "age", "age", "30", "unseen"),
        ("b", 1, "age", "age", "30", "unseen"),
        ("a", 0, "caption", "caption", "gender=male", "unseen"),  # open: no wording to agree with
    ]
    parsed = ["Mustache", "Goatee", "true", "true", None, "not_visible", "31", "50", "34", "42", "gender=male"]
    found = consistency.measure(settings, sheet_of(rows), parsed)["ways"]
    assert list(found) == ["statement", "lettered", "unseen"]
    shares = {way: (entry["accuracy"]["value"], entry["agreement"]["value"]) for way, entry in found.items()}
    assert shares["statement"] == (0.5, 0.5)  # a mustache is no goatee
    assert shares["lettered"] == (0.5, 0.0)  # unreadable says nothing
    assert shares["unseen"] == (0.5, 0.5)  # 34 is within a step of 30, 42 is not
    outright = {way: entry["outright"]["value"] for way, entry in found.items()}
    assert outright == {"statement": 0.5, "lettered": 0.0, "unseen": 0.5}, "of the same faces, in the item's own form"
    assert found["unseen"]["n"] == 2


def test_an_opening_question_agrees_when_it_means_the_same(settings):
    rows = [(face, n, "attributes", "beard", "Goatee" if n else "No_Beard") for n, face in enumerate("abcd")]
    rows += [(*row[:4], "yes" if row[1] else "no", "dialogue", "present") for row in rows]
    parsed = ["No_Beard", "Mustache", "No_Beard", None, "no", "yes", "yes", "yes"]
    found = consistency.measure(settings, sheet_of(rows), parsed)["ways"]["dialogue"]
    assert found["accuracy"]["value"] == 1.0
    assert found["agreement"]["value"] == 0.5  # of c it says no beard, of d nothing
    assert "blind" not in found


def test_statements_are_held_against_answers_without_a_look_at_the_face(settings):
    claims = [("Goatee", "false")] * 3 + [("Goatee", "true"), ("No_Beard", "true"), ("No_Beard", "true")]
    rows = [
        (str(number), number, "attributes", "beard", answer, "statement", claim)
        for number, (claim, answer) in enumerate(claims)
    ]
    sheet = sheet_of(rows)
    # in training a goatee is claimed rightly more often: the majority of the test split is not to be known
    learnt = [("Goatee", "true")] * 2 + [("Goatee", "false"), ("No_Beard", "true"), ("Mustache", "false")]
    train = sheet_of([(*row[:4], answer, "statement", c) for row, (c, answer) in zip(rows, learnt, strict=False)])
    ways = consistency.measure(settings, sheet, [None] * 6, train)["ways"]
    assert ways["statement"]["blind"] == pytest.approx(3 / 6)
    # a claim that training lacks is answered by what is more often true of all of its claims
    other = sheet_of([row for row in rows if row[6] == "Goatee"])
    assert consistency.measure(settings, sheet, [None] * 6, other)["ways"]["statement"]["blind"] == pytest.approx(3 / 6)
    assert "blind" not in consistency.measure(settings, sheet, [None] * 6)["ways"]["statement"]


def test_relations_speak_of_attributes_that_tasks_know():
    known = {option.value for name in all_names() for question in get(name).questions() for option in question.options}
    known |= {question.item for name in all_names() for question in get(name).questions()}
    assert {name for relation in RELATIONS for name in relation.attributes} <= known
    assert len({str(relation) for relation in RELATIONS}) == len(RELATIONS)
