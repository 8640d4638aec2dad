"""How pictures are changed in training: what is drawn, and what it does to a picture, beside scipy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d

from facemllm.train.augment import BLURRED, COVERED, DIMMEST, Changes, apply_changes, draw_changes

SIDE = 48


def unchanged(images: int) -> Changes:
    return Changes(
        mirror=np.zeros(images, bool),
        shift=np.zeros((images, 2), np.int64),
        contrast=np.ones((images, 1, 1, 1), np.float32),
        offset=np.zeros((images, 1, 1, 3), np.float32),
    )


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(3).integers(0, 256, (6, SIDE, SIDE, 3)).astype(np.uint8))


def test_undisturbed_changes_are_drawn_as_if_nothing_could_disturb():
    plain = draw_changes(np.random.default_rng(5), 32, SIDE)
    beside = draw_changes(np.random.default_rng(5), 32, SIDE, 0.5)
    for name in ("mirror", "shift", "contrast", "offset"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(beside, name))
    assert plain.dim is None
    assert plain.blur is None
    assert plain.cover is None


def test_each_disturbance_comes_with_its_chance_and_within_its_bounds():
    drawn = draw_changes(np.random.default_rng(1), 4000, SIDE, 0.2)
    dimmed, blurred = drawn.dim[:, 0, 0, 0] < 1, drawn.blur > 0
    top, bottom, left, right, grey = drawn.cover.T
    covered = bottom > top
    for one in (dimmed, blurred, covered):
        assert abs(one.mean() - 0.2) < 0.03
    assert abs((dimmed & blurred).mean() - 0.04) < 0.015
    assert drawn.dim.min() >= DIMMEST
    assert drawn.blur.max() <= BLURRED * SIDE
    area = ((bottom - top) * (right - left) / SIDE**2)[covered]
    assert area.min() > COVERED[0] - 0.05
    assert area.max() < COVERED[1] + 0.05
    assert bottom.max() <= SIDE
    assert right.max() <= SIDE
    assert (grey >= 0).all()
    assert (grey < 256).all()
    long = ((bottom - top)[covered] / (right - left)[covered]) > 1.5
    assert 0.2 < long.mean() < 0.6


def test_blur_is_scipys(pixels):
    deviation = np.array([0, 0.5, 1.1, 0, 0.24 * 5, 0.7], np.float32)
    found = apply_changes(pixels, replace(unchanged(6), blur=deviation)).numpy()
    for place, sigma in enumerate(deviation):
        wanted = pixels[place].numpy().astype(np.float64)
        if sigma:
            for axis in (0, 1):
                radius = int(np.ceil(2.5 * deviation.max()))
                wanted = gaussian_filter1d(wanted, float(sigma), axis=axis, mode="nearest", radius=radius)
        np.testing.assert_allclose(found[place], wanted, atol=0.02)


def test_covers_dims_and_parts(pixels):
    cover = np.zeros((6, 5), np.int64)
    cover[2] = (10, 20, 5, 40, 77)
    dim = np.ones((6, 1, 1, 1), np.float32)
    dim[1] = 0.3
    changes = replace(unchanged(6), cover=cover, dim=dim)
    found = apply_changes(pixels, changes)
    wanted = pixels.float().clone()
    wanted[2, 10:20, 5:40] = 77
    wanted[1] *= 0.3
    torch.testing.assert_close(found, wanted)
    part = apply_changes(pixels[1:3], changes.part(slice(1, 3)))
    torch.testing.assert_close(part, wanted[1:3])
