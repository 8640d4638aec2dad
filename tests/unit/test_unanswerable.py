"""Questions that a face does not answer: refused in a few words, and marked beside questions that are answered."""

from collections import Counter

import numpy as np
import pytest

from facemllm import tasks
from facemllm.scoring import metrics
from facemllm.tasks import asking
from facemllm.tasks.answers import refuses
from facemllm.tasks.paraphrases import normal
from facemllm.tasks.unanswerable import ANSWERED, CANNOT_TELL, NEW, REFUSAL, TAUGHT, read
from tests.unit.test_tasks_asking import ROWS

TASK = tasks.get("unanswerable")
KNOWN, LATER = TASK.items


def asked_of(item, split, count=600):
    rows = (dict(ROWS[n % len(ROWS)], image_id=f"face {n}", split=split) for n in range(count))
    return [(row, asking.ask(TASK, item, asking.NATIVE, row)) for row in rows]


def test_there_are_many_wordings_of_many_subjects():
    assert len(TAUGHT) >= 30
    assert len(KNOWN.wordings) >= 400
    for words in ("religion", "nationality", "race", "ill", "criminal", "salary", "car", "weather", "shoes", "brand"):
        assert any(f" {words} " in f" {normal(text)} " for text in KNOWN.wordings), words


@pytest.mark.parametrize(("item", "split"), [(KNOWN, "train"), (KNOWN, "test"), (LATER, "test"), (LATER, "validation")])
def test_half_of_the_faces_are_asked_what_cannot_be_told_and_half_what_can(item, split):
    counts: Counter[str] = Counter()
    for row, asked in asked_of(item, split):
        assert asking.question_of(TASK, {"template": asked.template, "options": None}) == asked.question
        assert asked.question.templates[int(asked.template.partition("/")[2])] == asked.text
        assert tasks.read(asked.question, asked.reply) == asked.answer == item.label(row)
        own = asked.text in item.wordings
        assert own == (asked.answer == CANNOT_TELL) == (asked.reply == REFUSAL)
        counts[asked.answer] += 1
    assert min(counts.values()) > 240


def test_what_is_kept_for_evaluation_is_not_asked_in_training():
    assert {asked for _, asked in asked_of(LATER, "train", 50)} == {None}
    taught = {asked.text for _, asked in asked_of(KNOWN, "train", 3000)}
    assert len(taught) > 400
    assert not {normal(text) for text in taught} & {normal(text) for text in NEW}
    unseen = {text for name in ("attributes", "expression") for item in tasks.get(name).items for text in item.unseen}
    lent = {asked.text for _, asked in asked_of(LATER, "test") if asked.answer == ANSWERED}
    assert lent
    assert lent <= unseen
    assert not taught & unseen


def test_a_face_of_which_nothing_is_known_is_not_asked():
    row = {"image_id": "a", "split": "train", "attributes": {}, "expression": None}
    assert asking.ask(TASK, KNOWN, asking.NATIVE, row) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (REFUSAL, CANNOT_TELL),
        (f"{REFUSAL.capitalize()}.", CANNOT_TELL),
        ("I cannot tell from this picture.", CANNOT_TELL),
        ("It is impossible to know.", CANNOT_TELL),
        ("I'm sorry, I can't help with that.", CANNOT_TELL),
        ("brown hair", ANSWERED),
        ("yes", ANSWERED),
        ("no beard", ANSWERED),
        ("happy", ANSWERED),
        ("his name is Bob", None),
        ("a blue car", None),
        ("", None),
    ],
)
def test_answers_are_read_as_refusals_or_answers(text, said):
    assert read(text) == said


def test_the_taught_words_count_as_a_refusal_of_any_question():
    assert refuses(REFUSAL)
    for name in ("attributes", "expression", "age", "gender", "head_pose"):
        for question in tasks.get(name).questions():
            assert tasks.read(question, REFUSAL) is None


def test_neither_constant_answer_scores_more_than_half():
    metric = metrics.of(TASK)
    answers = [asked.answer for _, asked in asked_of(KNOWN, "test")]
    for constant in (CANNOT_TELL, ANSWERED):
        columns = metric.columns(answers, [constant] * len(answers), ())
        assert metric.value(np.asarray(columns).sum(0)[None])[0] == 0.5
    assert metrics.recall_by_class([CANNOT_TELL, CANNOT_TELL, ANSWERED], [CANNOT_TELL, None, CANNOT_TELL]) == {
        ANSWERED: {"value": 0.0, "n": 1},
        CANNOT_TELL: {"value": 0.5, "n": 2},
    }
