"""Pictures made worse: by how much, where, and the same every time."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from facemllm.evaluate.predict import GREY, KINDS


def noise(side=120):
    coarse = np.random.default_rng(3).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.NEAREST)


def name(number):
    return hashlib.sha256(str(number).encode()).hexdigest()


@pytest.mark.parametrize("kind", KINDS)
def test_a_disturbance_changes_the_picture_and_nothing_else(kind):
    image = noise()
    before = image.tobytes()
    after = KINDS[kind](image, name(0))
    assert image.tobytes() == before != after.tobytes(), "the picture itself stays as it is"
    assert (after.size, after.mode) == (image.size, "RGB")
    assert KINDS[kind](image, name(0)).tobytes() == after.tobytes()


def test_dark_keeps_thirty_percent_and_blur_grows_with_the_picture():
    """A picture of twice the size, blurred and halved, is the blurred picture."""
    dark = KINDS["dark"](Image.new("RGB", (8, 8), (200, 100, 10)), "")
    assert dark.getpixel((3, 3)) == (60, 30, 3)
    small = np.asarray(KINDS["blur"](noise(120), ""), float)
    large = KINDS["blur"](noise(240), "").resize((120, 120), Image.Resampling.BOX)
    plain = np.asarray(noise(120), float)
    assert np.abs(small - np.asarray(large, float)).mean() < 0.1 * np.abs(small - plain).mean()


def test_occlusion_covers_a_third_drawn_by_the_faces_name():
    covered = set()
    for number in range(60):
        grey = (np.asarray(KINDS["occlusion"](noise(), name(number))) == GREY).all(axis=2)
        assert grey.mean() == pytest.approx(1 / 3, abs=0.01)
        covered.add(grey.tobytes())
    assert len(covered) == 6
