"""What is read out of answers as people and models write them: `answers.csv`, and `answers_wrapped.csv` for what models
put around an answer (reasoning, sources, "final answer", politeness); labelled by hand, one answer a row.
`answers_blind.csv` and `answers_blind2.csv` were written and labelled by somebody who never saw the parser.

`way` is written as in the name of a wording (`statement=Brown_Hair`); an empty `answer` means that none is plainly
given. Labels are what a careful reader takes from the text, not what the parser makes of it.
"""

import csv
from pathlib import Path

import pytest

from facemllm import tasks
from facemllm.tasks.answers import refuses

ANSWERS, WRAPPED, BLIND, BLIND2 = (
    list(csv.DictReader((Path(__file__).parent / name).open(newline="", encoding="utf-8")))
    for name in ("answers.csv", "answers_wrapped.csv", "answers_blind.csv", "answers_blind2.csv")
)


def read(row):
    way = "" if row["way"] == "native" else f":{row['way']}"
    options = row["options"].split("|") if row["options"] else None
    turn = {"task": row["task"], "template": f"{row['item']}{way}/0", "options": options}
    return tasks.read(tasks.question_of(turn), row["text"])


def test_the_list_is_long_and_speaks_of_every_task_and_way():
    assert len(ANSWERS) >= 320
    assert {row["task"] for row in ANSWERS} == set(tasks.all_names())
    ways = {row["way"].split("=")[0] for row in ANSWERS}
    assert ways == {"native", "unseen", "statement", "lettered", "dialogue"}
    assert len({(row["item"], row["way"], row["options"], row["text"]) for row in ANSWERS}) == len(ANSWERS)


@pytest.mark.parametrize(
    ("answers", "bound"),
    [(ANSWERS, 0.97), (WRAPPED, 0.97), (BLIND, 0.93), (BLIND2, 0.85)],
    ids=["answers", "wrapped", "blind", "blind2"],
)
def test_precision_is_one_and_recall_high(capsys, answers, bound):
    wrong, missed, right = [], [], 0
    for row in answers:
        found, label = read(row), row["answer"] or None
        if found is not None and found != label:
            wrong.append((row["item"], row["text"], found, label))
        elif found is None and label is not None:
            missed.append((row["item"], row["text"], label))
        right += found is not None and found == label
    labelled = sum(1 for row in answers if row["answer"])
    precision, recall = right / (right + len(wrong)), right / labelled
    with capsys.disabled():
        print(f"\n{len(answers)} answers, {labelled} readable: precision {precision:.3f}, recall {recall:.3f}")
    assert not wrong
    assert recall >= bound, missed


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("I cannot help with that request.", True),
        ("I'm sorry, but I can't determine a person's gender from a photo.", True),
        ("I'm sorry, I can't assist with that.", True),
        ("As an AI language model, I am unable to identify hair colors.", True),
        ("I won't comment on a person's body.", True),
        ("I'm not comfortable guessing.", True),
        ("I'd rather not say.", True),
        ("I refuse to answer.", True),
        ("I cannot answer questions about people in images. Is there anything else I can help with?", True),
        ("It is against my policy to identify people.", True),
        ("Unfortunately, I am unable to determine the person's age. Please consult the person.", True),
        ("I don't feel comfortable making assumptions about a person's ethnicity.", True),
        ("I cannot provide information about a person's age, as this is sensitive information.", True),
        ("I must decline. If you have another question, feel free to ask.", True),
        ("I can't say.", True),
        ("<think>A woman? I am not sure I may say so.</think>I cannot help with that.", True),
        ("", False),
        ("A woman.", False),
        ("No.", False),
        ("I can't identify people, but this is a woman with brown hair.", False),
        ("I'm sorry, but the answer is B.", False),
        ("I'm sorry, but no.", False),
        ("The hair is not visible.", False),
        ("I cannot see any hat.", False),
        ("It could be a man or a woman.", False),
        ("It's hard to say.", False),
        ("I cannot tell who this is. She has brown hair.", False),
        ("I cannot be certain, but he looks about 35 years old.", False),
    ],
)
def test_refusals_are_recognised_and_answers_and_doubts_are_none(text, refusal):
    assert bool(refuses(text)) == refusal


def test_long_reasoning_leaves_a_short_answer_and_reading_stays_cheap():
    row = {"task": "age", "item": "age", "way": "native", "options": ""}
    aloud = "The hair is grey, so perhaps 50 or 60 years old. " * 400
    assert read({**row, "text": f"<think>{aloud}</think>55"}) == "55"
    assert read({**row, "text": f"{aloud}\n\n**Final answer:** 55"}) == "55"
    assert read({**row, "text": f"<think>{aloud}"}) is None
    assert read({**row, "text": "<think>" * 20_000}) is None
    assert read({**row, "text": '{"age": ' + "[" * 100_000 + "}"}) is None
    for hostile in ("final answer ", "\n", ",", "→", "not or ", "so, ", "{", "|a|b|\n"):
        assert read({**row, "text": hostile * 20_000}) is None


def test_an_expression_that_is_understood_and_is_no_option_is_no_fact_of_a_caption():
    assert tasks.get("caption").item("caption").parse("A contemptuous woman.") == "gender=female"
    assert tasks.get("expression").item("expression").mention("contempt") is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"happiness": 0.1, "sadness": 0.7, "neutral": 0.2}', "sadness"),
        ('{"happiness": "10%", "sadness": "70%", "neutral": "20%"}', "sadness"),
        ('{"happiness": false, "sadness": true}', "sadness"),
        ('{"happiness": 0.4, "sadness": 0.4, "neutral": 0.2}', None),
        ('{"happiness": 1, "sadness": 2, "neutral": 3}', None),  # ranks
        ('{"happiness": "low", "sadness": "high"}', None),
        ('{"happiness": 0.1, "sadness": 0.9}\n\nAnswer: happiness', None),
        ('{"expression": "happiness"}\n{"expression": "sadness"}', None),
        ("| Expression | Match |\n|---|---|\n| Neutral | low |\n| Fear | high |\n\n**Best match: Fear**", "fear"),
        ("| Expression | Match |\n|---|---|\n| Neutral | low |\n| Fear | high |", None),
        ("| # | Expression | Match |\n|---|---|---|\n| 1 | Neutral | low |\n| 2 | Fear | high |", None),
        ("| Attribute | Value |\n|---|---|\n| Expression | Fear |\n| Mouth | open |", "fear"),
        ("| Fear | 0.9 |\n| Anger | 0.1 |", None),
        ('{"fear": 0.05, "other": 0.95}', None),
        ('{"fear": 0.05}', None),
        ("Final answer: fear\n\nFinal answer: anger", None),
        ("Final answer: fear\n\nFinal answer: fear", "fear"),
        ("<answer>fear</answer> <answer>anger</answer>", None),
        ("It might be fear or anger. I'd pick fear.", None),
        ("He looks calm at first. I'd pick fear.", "fear"),
        ("Answer: fear\n\nNote that a person who shows fear may in fact feel sadness.", "fear"),
        ("Answer: fear\n\nNote that it could also be sadness.", None),
        ("\\boxed{fear}, so \\boxed{fear}", "fear"),
    ],
)
def test_options_with_numbers_or_rows_and_two_final_answers_are_never_misread(text, value):
    assert tasks.read(tasks.get("expression").question("expression"), text) == value


def test_one_word_again_and_again_is_read_and_says_nothing() -> None:
    """What a model that learnt nothing writes; each "the" once had two readings, so that this took for ever."""
    from facemllm.tasks.caption import stated_facts

    assert stated_facts("the " * 200) == {}
