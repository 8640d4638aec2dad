"""Reading answers to a benchmark's questions: by its own rule, and by ours. An article is no option."""

import pytest

from facemllm.tasks.multiple_choice import BENCHMARKS, read

FACEXBENCH, HUMAN = BENCHMARKS["facexbench"], BENCHMARKS["face-human-bench"]
PEOPLE = ("woman", "man", "child")
A, B, C = range(3)

SAID = [
    ("B", B, B, B),
    ("(b)", B, None, None),
    ("B. man", B, B, B),
    ("**C**", C, C, None),
    ("Answer: B", B, B, None),
    ("The correct option is (C).", C, C, C),
    ("B, since the beard is full", B, B, B),
    ("The answer is B because he does not smile", B, B, None),
    ("<think>A, or not?</think> C", C, A, A),
    ("man", B, B, B),
    ("The person is a man.", B, B, None),
    ("A man", B, A, None),
    ("A man with a hat.", B, A, None),
    ("a child", C, C, None),
    ("The answer is A child.", C, A, None),
    ("A face", None, A, None),
    ("A person of some age", None, A, None),
    ("a", A, None, None),
    ("A) woman, B) man", None, A, None),
    ("A. man", None, A, A),
    ("(A) or (B)", None, A, None),
    ("A or B", None, A, None),
    ("not B", None, B, None),
    ("It is a man, not a woman", None, A, None),
    ("D", None, None, None),
    ("I cannot help with that", None, None, None),
    ("", None, None, None),
    ("B" + " x" * 2000, None, B, None),
]


@pytest.mark.parametrize(("text", "ours", "facexbench", "human"), SAID)
def test_an_answer_is_read_by_our_rule_and_by_the_benchmarks_own(text, ours, facexbench, human):
    assert read(text, PEOPLE) == ours
    assert FACEXBENCH.mark(text, PEOPLE) == facexbench
    assert HUMAN.mark(text, PEOPLE) == human


@pytest.mark.parametrize(
    ("options", "text", "ours"),
    [
        (("yes", "no"), "No, it is not manipulated.", 1),
        (("yes", "no"), "I see no face", None),
        (("yes", "no"), "yes or no", None),
        (("Image 1", "Image 1, Image 4", "Neither"), "Image 1, Image 4", 1),
        (("Image 1", "Image 1, Image 4", "Neither"), "Image 1 and Image 4", None),
        (("Image 1", "Image 1, Image 4", "Neither"), "Neither of them", 2),
        (("20", "30", "40"), "About 30 years", 1),
        (("20", "30", "40"), "30 to 35", None),
        (("2", "12"), "There are 12", 1),
        (("bald, not smiling", "without beard, smiling"), "B. without beard, smiling", 1),
        (("bald, not smiling", "without beard, smiling"), "bald, not smiling", 0),
    ],
)
def test_options_of_the_questions_own(options, text, ours):
    assert read(text, options) == ours


def test_questions_are_put_in_the_benchmarks_words():
    assert FACEXBENCH.prompt("Who smiles?", ("Image 1", "Both")).splitlines() == [
        "Who smiles?",
        "Please answer the question and provide only the correct option letter, e.g., A, B, C, D.",
        "(A) Image 1",
        "(B) Both",
    ]
    assert HUMAN.prompt("How old?", ("20", "30")).splitlines() == [
        *("Question: How old?", "A. 20", "B. 30"),
        "Please select the correct answer from the options above.",
    ]


def test_every_subset_has_its_place():
    assert FACEXBENCH.place("facexbench_face_localization_crowd_counting", "x/1") == (
        "face_localization",
        "crowd_counting",
    )
    assert FACEXBENCH.place("facexbench_expression_expression", "x/1") == ("expression_expression",)
    subset = "human_attribute_compound_cropped_cropped"
    assert HUMAN.place(f"face_human_bench_{subset}", "x/1") == ("human", "attribute", "compound", subset)
    assert HUMAN.place("face_human_bench_face_expression_compound_original", "x/1") is None
