"""Pictures beyond what evaluation covers are refused; those that it measures are not."""

import io
import os
from functools import cache
from pathlib import Path

import pytest
from PIL import Image, ImageFilter, ImageOps

from facemllm import settings
from facemllm.errors import UserError
from facemllm.evaluate.predict import KINDS
from facemllm.heads.render import render_identity
from facemllm.serve.asked.quality import Coverage, Faces, face_detector, measure, refuses

NO_LIMITS = Coverage(None, None, None, None, None)
WEIGHTS = os.environ.get("FACEMLLM_EXPERTS")


@cache
def heads():
    rows = [row for identity in range(12) for row in render_identity(77, identity, 1, 128)]
    return [Image.open(io.BytesIO(row["image"])).convert("RGB") for row in rows]


@pytest.fixture(scope="module")
def coverage():
    return Coverage(**settings.load().serve.quality.model_dump(exclude={"detector"}))


def reasons(change, coverage):
    return [refuses(measure(change(head)), coverage) for head in heads()]


def darker(share):
    return lambda head: head.point([round(share * value) for value in range(256)] * 3)


def test_heads_as_drawn_and_as_evaluation_disturbs_them_are_taken(coverage):
    assert not any(reasons(lambda head: head, coverage))
    for name, change in KINDS.items():
        refused = [reason for reason in reasons(lambda head, change=change: change(head, "a"), coverage) if reason]
        assert len(refused) <= 1, (name, refused)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda head: head.resize((16, 16)), "too small"),
        (lambda head: head.convert("L"), "grey"),
        (lambda head: ImageOps.colorize(head.convert("L"), "black", "#fffaf0"), "grey"),
        (lambda head: head.filter(ImageFilter.GaussianBlur(8)), "too blurred"),
        (darker(0.12), "too dark"),
        (lambda head: Image.blend(head, Image.new("RGB", head.size, "gray"), 0.95), "one color"),
        (lambda head: Image.new("RGB", (256, 256), "gray"), "one color"),
        (lambda head: Image.new("RGB", (256, 256), "black"), "too dark"),
    ],
)
def test_worse_ones_are_refused_and_told_why(coverage, change, word):
    found = reasons(change, coverage)
    assert all(word in (reason or "") for reason in found), found
    small = word == "too small"
    assert not any(reasons(change, NO_LIMITS)), "without limits nothing is refused"
    assert all((reason is None) is not small for reason in reasons(change, Coverage(24, None, None, None, None)))


def test_a_small_picture_enlarged_is_blurred(coverage):
    found = reasons(lambda head: head.resize((10, 10)).resize((256, 256), Image.Resampling.BICUBIC), coverage)
    assert all("blurred" in (reason or "") for reason in found)


def test_sharpness_hangs_on_the_blur_not_on_size_or_light():
    head = heads()[0]
    plain, large, dim = (measure(one)["sharpness"] for one in (head, head.resize((512, 512)), darker(0.4)(head)))
    blurred = measure(KINDS["blur"](head, "a"))["sharpness"]
    assert blurred < plain / 3
    assert 0.5 < large / plain < 2
    assert 0.5 < dim / plain < 2


def test_facts_of_known_pictures():
    facts = measure(Image.new("RGB", (40, 30), "white"))
    assert (facts["width"], facts["height"], facts["brightness"], facts["saturated"]) == (40, 30, 1.0, 1.0)
    assert facts["sharpness"] == 0
    assert facts["contrast"] == 0
    half = Image.new("L", (100, 100), 0)
    half.paste(255, (0, 0, 50, 100))
    assert measure(half)["brightness"] == pytest.approx(0.5, abs=0.02)
    assert measure(half)["contrast"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("image", [Image.new("1", (1, 1)), Image.new("RGBA", (1, 4000)), Image.new("P", (3000, 2))])
def test_odd_pictures_are_measured(image, coverage):
    assert "too small" in refuses(measure(image), coverage)


@pytest.mark.parametrize(("faces", "word"), [(0, "no face"), (1, None), (3, "3 faces")])
def test_faces_are_spoken_of_only_when_somebody_counts_them(coverage, faces, word):
    head = heads()[0]
    reason = refuses(measure(head, lambda image: Faces(faces)), coverage)
    assert reason is None if word is None else word in reason
    assert "faces" not in measure(head)
    assert refuses(measure(head), coverage) is None


def test_a_face_upside_down_is_said_to_be(coverage):
    assert "upside down" in refuses(measure(heads()[0], lambda image: Faces(1, True)), coverage)


def test_a_detector_without_its_weights_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"serve\.quality\.detector: .*is missing; get it with: python -m"):
        face_detector(tmp_path)


def beside(one, other):
    both = Image.new("RGB", (one.width + other.width, one.height))
    both.paste(one, (0, 0))
    both.paste(other, (one.width, 0))
    return both


@pytest.mark.skipif(WEIGHTS is None, reason="set FACEMLLM_EXPERTS to a folder made by facemllm.annotate.experts")
def test_the_detector_counts_drawn_heads_and_tells_those_upside_down(coverage):
    find = face_detector(Path(WEIGHTS))
    shapes = [Image.linear_gradient("L").convert("RGB"), Image.radial_gradient("L").convert("RGB")]
    assert [find(head) for head in heads()] == [Faces(1)] * len(heads())
    assert [find(head.rotate(180)).upside_down for head in heads()].count(True) >= len(heads()) - 1
    assert [find(beside(*pair)).count for pair in zip(heads()[::2], heads()[1::2], strict=True)] == [2] * 6
    assert [find(shape).count for shape in shapes] == [0, 0]
