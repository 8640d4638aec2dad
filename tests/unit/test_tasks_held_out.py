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
        ("The person has earrings.", None),
        ("This is a woman. The person has earrings.", "This is a woman."),
        ("The person has brown hair, earrings, and a hat.", "The person has brown hair, and a hat."),
        ("The person has brown hair, a hat and earrings.", "The person has brown hair and a hat."),
        ("The person has earrings and brown hair.", "The person has brown hair."),
        ("This is a woman, about 35 years old with earrings.", "This is a woman, about 35 years old."),
        ("This is a woman with earrings, a hat, and bangs.", "This is a woman with a hat, and bangs."),
        ("A man who has earrings and a goatee. The head is upright.", "A man who has a goatee. The head is upright."),
        ("This is a man. He is not wearing any earrings. He has brown hair.", "This is a man. He has brown hair."),
        ("A woman wearing large golden earrings that glitter, with brown hair.", None),
        ("This is a woman with brown hair.", "This is a woman with brown hair."),
        (None, None),
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
