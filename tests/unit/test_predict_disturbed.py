"""Pictures made worse: by how much, where, and the same every time."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from facemllm.evaluate.predict import GRAINS, GREY, KINDS, NOISE, TRAINED


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


def test_noise_is_gaussian_its_grains_grow_with_the_picture_and_the_faces_name_draws_them():
    grey = Image.new("RGB", (GRAINS, GRAINS), (127, 127, 127))
    grains = np.asarray(KINDS["noise"](grey, name(0)), float) - 127
    assert grains.mean() == pytest.approx(0, abs=0.5)
    assert grains.std() == pytest.approx(255 * NOISE, rel=0.02)
    assert (np.abs(grains) < 255 * NOISE).mean() == pytest.approx(0.683, abs=0.02)
    assert abs(np.corrcoef(grains[..., 0].ravel(), grains[..., 1].ravel())[0, 1]) < 0.03
    other = np.asarray(KINDS["noise"](grey, name(1)), float) - 127
    assert abs(np.corrcoef(grains.ravel(), other.ravel())[0, 1]) < 0.03
    large = KINDS["noise"](Image.new("RGB", (4 * GRAINS, 2 * GRAINS), (127, 127, 127)), name(0))
    blocks = np.asarray(large).reshape(GRAINS, 2, 2 * GRAINS, 2, 3)
    assert (blocks == blocks[:, :1, :, :1]).all(), "a grain is two pixels wide and high there"


def test_training_shows_some_kinds_and_not_others():
    assert set(TRAINED) < set(KINDS)
    assert not {"jpeg", "noise"} & set(TRAINED)
