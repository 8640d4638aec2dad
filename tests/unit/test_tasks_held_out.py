import random

import pytest

from facemllm import tasks
from facemllm.tasks.held_out import HeldOut

WORDS = (
    *("earrings", "Earrings", "ear-rings", "a hat", "brown hair", "a woman", "glasses", "visible earrings"),
    *(",", " and", " with", " wearing", ".", ";", "?", "the person has", "who has"),
)


@pytest.fixture(scope="module")
def earrings():
    return HeldOut.of(["Wearing_Earrings"], [tasks.get("caption")])


@pytest.mark.parametrize(
    ("caption", "left"),
    [
        ("Earrings and a hat.", "A hat."),
        ("A woman. Visible earrings, brown hair.", "A woman. Brown hair."),
        ("This is a woman. Earrings.", "This is a woman."),
        ("Earrings.", None),
        ("He wears a hat; earrings too.", "He wears a hat."),
        ("Earrings with a hat.", None),
        ("A man with earrings, a hat and glasses.", "A man with a hat and glasses."),
        ("A man wearing ear-rings.", "A man."),
        ("A woman with ear studs and a hat.", "A woman with a hat."),
        ("A woman with a hat.", "A woman with a hat."),
    ],
)
def test_a_caption_loses_the_thing_and_nothing_else(earrings, caption, left):
    assert earrings.caption(caption) == left


def test_no_caption_keeps_it_and_every_one_comes_to_an_end(earrings):
    draw = random.Random(0)
    for _ in range(1000):
        text = " ".join(draw.choice(WORDS) for _ in range(draw.randrange(1, 12)))
        left = earrings.caption(text)
        assert left is None or not earrings.named_in(left), text


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("Wearing_Hat", "A woman, hats and caps."),
        ("Wearing_Necktie", "A man in ties."),
        ("Smiling", "She smiled."),
        ("Smiling", "A broad grin."),
        ("Bushy_Eyebrows", "With bushy brows."),
        ("Rosy_Cheeks", "A rosy-cheeked child."),
    ],
)
def test_plurals_and_other_names_are_known(name, caption):
    assert HeldOut.of([name], [tasks.get("caption")]).named_in(caption)
