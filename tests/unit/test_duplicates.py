"""Copies and leaked people: found whatever their order, and the right one of each pair dropped."""

import hashlib
import io
import itertools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from facemllm.core.images import perceptual_hashes
from facemllm.heads.render import render_identity
from facemllm.ingest.duplicates import Census

BITS = 14


def noise(seed: int, cells: int = 12) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 255, (cells, cells, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((96, 96), Image.Resampling.BICUBIC)


def again(image: Image.Image, quality: int = 60, side: int = 80) -> Image.Image:
    buffer = io.BytesIO()
    image.resize((side, side)).save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def hashed(image: Image.Image) -> bytes:
    return perceptual_hashes(image.convert("RGB"))


def distance(first: bytes, second: bytes) -> int:
    """Bits in which two pictures differ; of their mirror images nothing is asked."""
    return (int.from_bytes(first[:32]) ^ int.from_bytes(second[:32])).bit_count()


def census(*rows: tuple[int | str, bytes, str, str | None]) -> Census:
    found = Census(BITS)
    for name, code, split, subject in rows:
        code = code if len(code) == 64 else code + hashlib.sha256(code).digest()  # no picture's: no mirror image
        found.add(hashlib.sha256(str(name).encode()).hexdigest(), code, split, subject, (("split", split),))
    return found


def test_a_perceptual_hash_survives_saving_and_shrinking_and_tells_pictures_apart() -> None:
    hashes = [hashed(noise(seed)) for seed in range(20)]
    assert max(distance(code, hashed(again(noise(seed)))) for seed, code in enumerate(hashes)) <= BITS
    assert min(distance(a, b) for a, b in itertools.combinations(hashes, 2)) > 60


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize(("near", "far"), [("test", "train"), ("test", "validation"), ("validation", "train")])
def test_of_a_pair_in_two_splits_the_one_farther_from_the_test_goes(near, far, order) -> None:
    rows = [("a", hashed(noise(1)), near, None), ("b", hashed(again(noise(1))), far, None)]
    dropped = census(*(rows[n] for n in order)).dropped()
    assert set(dropped) == {order.index(1)}
    assert f"of the {near} split" in next(iter(dropped.values()))


def test_in_one_split_the_later_goes_unless_both_are_of_one_person() -> None:
    code, copy = hashed(noise(1)), hashed(again(noise(1)))
    assert set(census(("a", code, "train", None), ("b", copy, "train", None)).dropped()) == {1}
    assert set(census(("a", code, "train", "x"), ("b", copy, "train", "y")).dropped()) == {1}
    assert not census(("a", code, "train", "x"), ("b", copy, "train", "x")).dropped()


def test_the_very_same_bytes_stay_once_even_of_one_person() -> None:
    code = hashed(noise(1))
    rows = [("a", code, "train", "x"), ("a", code, "train", "x"), ("c", hashed(noise(2)), "train", "x")]
    assert census(*rows).dropped() == {1: "the same picture as row 0 of the train split"}


def test_a_person_in_several_splits_keeps_the_one_nearest_the_test() -> None:
    splits = ["train", "test", "validation", "train", "test"]
    rows = [(n, hashed(noise(n)), split, "x") for n, split in enumerate(splits)]
    dropped = census(*rows, (9, hashed(noise(9)), "train", "y"), (10, hashed(noise(10)), "train", None)).dropped()
    assert (set(dropped), set(dropped.values())) == ({0, 2, 3}, {"the same person stands in the test split"})


def test_every_pair_within_the_bits_is_found_and_none_beyond() -> None:
    generator = np.random.default_rng(0)
    codes = generator.integers(0, 256, (400, 32), dtype=np.uint8)
    for row in range(0, 400, 2):  # its neighbour is a copy with up to 16 bits turned
        bits = np.unpackbits(codes[row])
        bits[generator.choice(256, row // 2 % 17, replace=False)] ^= 1
        codes[row + 1] = np.packbits(bits)
    found = census(*((n, code.tobytes(), "train", None) for n, code in enumerate(codes))).dropped()
    near = {row + 1 for row in range(0, 400, 2) if distance(codes[row].tobytes(), codes[row + 1].tobytes()) <= BITS}
    assert set(found) == near
    assert 100 < len(near) < 200


def test_groups_are_counted_before_and_after() -> None:
    code = hashed(noise(1))
    found = census(("a", code, "train", None), ("b", code, "test", None), ("c", hashed(noise(3)), "train", None))
    dropped = found.dropped()
    assert found.counted({}) == {"split": {"test": 1, "train": 2}}
    assert found.counted(dropped) == {"split": {"test": 1, "train": 1}}
    assert found.report(dropped) == {"pictures alike, train": 1}


def test_what_looks_like_a_forgotten_picture_goes_whatever_its_split_or_person() -> None:
    found = census(("a", hashed(again(noise(1))), "test", "x"), ("b", hashed(noise(2)), "test", "x"))
    found.bar(hashed(noise(1)))
    assert (found.dropped(), found.report({0: "forgotten"})) == ({0: "forgotten"}, {"forgotten, test": 1})


def test_thousands_of_frames_of_one_person_cost_no_memory_for_their_pairs() -> None:
    code = hashed(noise(1))
    found = census(*((n, code, "train", "x") for n in range(600)))
    assert next(found._alike(), None) is None
    assert not found.dropped()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize(("near", "far"), [("test", "train"), ("test", "validation"), ("validation", "train")])
def test_a_mirrored_copy_leaks_from_one_split_into_another(near: str, far: str, order: tuple[int, int]) -> None:
    rows = [("a", hashed(noise(1)), near, "x"), ("b", hashed(again(ImageOps.mirror(noise(1)))), far, "y")]
    dropped = census(*(rows[n] for n in order)).dropped()
    assert set(dropped) == {order.index(1)}
    assert dropped[order.index(1)].startswith("looks like the mirror image of (")


def test_mirrored_copies_in_one_split_are_training_material() -> None:
    rows = [(n, hashed(picture), "train", None) for n, picture in enumerate((noise(1), ImageOps.mirror(noise(1))))]
    assert not census(*rows).dropped()


def test_a_picture_that_is_its_own_mirror_image_stays_and_its_copy_is_called_a_copy() -> None:
    code = hashed(noise(1))[:32] * 2
    assert not census(("a", code, "test", None)).dropped()
    found = census(("a", code, "test", None), ("b", code, "train", None)).dropped()
    assert found == {1: "looks like (0 of 256 bits differ) row 0 of the test split"}


def test_the_mirror_image_of_a_forgotten_picture_goes() -> None:
    found = census(("a", hashed(ImageOps.mirror(again(noise(1)))), "train", "x"))
    found.bar(hashed(noise(1)))
    assert found.dropped() == {0: "forgotten"}


def saved(image: Image.Image, quality: int) -> Image.Image:
    return again(image, quality, image.width)


def bordered(image: Image.Image, share: float) -> Image.Image:
    return ImageOps.expand(image, round(image.width * share))


def cropped(image: Image.Image, share: float) -> Image.Image:
    return ImageOps.crop(image, round(image.width * share / 2))


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "saved again (JPEG, quality 60)": lambda face: saved(face, 60),
    "half the size": lambda face: face.resize((64, 64)),
    "grey": lambda face: face.convert("L"),
    "darker by 30 %": lambda face: ImageEnhance.Brightness(face).enhance(0.7),
    "brighter by 30 %": lambda face: ImageEnhance.Brightness(face).enhance(1.3),
    "blurred (radius 2)": lambda face: face.filter(ImageFilter.GaussianBlur(2)),
    "mirrored": ImageOps.mirror,
    "mirrored, grey, half the size, saved again": lambda face: saved(
        ImageOps.mirror(face).convert("L").resize((64, 64)), 60
    ),
    "cropped by 2 %": lambda face: cropped(face, 0.02),
    "cropped by 5 %": lambda face: cropped(face, 0.05),
    "border of 2 %": lambda face: bordered(face, 0.02),
    "turned by 1 degree": lambda face: face.rotate(1, Image.Resampling.BILINEAR),
    "turned by 3 degrees": lambda face: face.rotate(3, Image.Resampling.BILINEAR),
    "turned by 90 degrees, or upside down": lambda face: face.rotate(90),
}


def test_the_docs_say_which_changed_copies_are_found_in_another_split() -> None:
    faces = [
        Image.open(io.BytesIO(head["image"])).convert("RGB")
        for one in range(40)
        for head in render_identity(0, one, 1, 128)
    ]
    known = [(n, hashed(face), "test", None) for n, face in enumerate(faces)]
    measured = {
        kind: len(
            census(*known, *((100 + n, hashed(change(face)), "train", None) for n, face in enumerate(faces))).dropped()
        )
        for kind, change in CHANGES.items()
    }
    docs = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")
    documented = {kind: int(found) for kind, found in re.findall(r"^\| ([^|]+) \| (\d+) of 40 \|$", docs, re.MULTILINE)}
    assert set(documented) == set(measured)
    assert documented == pytest.approx(measured, abs=2), measured
